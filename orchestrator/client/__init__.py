"""Python client of a gateway, blocking and asyncio.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Package: vim\\nLanguage: de\\n\\n", max_tokens=64).text)
        for delta in client.stream("Package: git\\nLanguage: fr\\n\\n", temperature=0.0):
            print(delta.text, end="", flush=True)

Every call, and every step of a stream, may raise:

    ConclaveError
    ├── InvalidRequest     a rule is broken; `violations` names every field
    ├── WorkerNotFound     no worker of the fleet fits the selector
    ├── Overloaded         every worker is full; `retry_after` says when to try again
    ├── Unavailable        no worker serves, or the one that was answering died
    ├── Unauthenticated    the gateway wants a token, and has been shown none that it knows
    ├── DeadlineExceeded   the timeout ran out
    ├── QuorumNotMet       too few members of an ensemble answered
    ├── Cancelled          the call was closed
    └── RemoteError        anything else; `code` is its name in gRPC
"""

from ...worker.errors import (
    Cancelled,
    ConclaveError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unauthenticated,
    Unavailable,
    Violation,
)
from ..ensemble.calls import QuorumNotMet
from ..routing.registry import WorkerState
from ..routing.router import WorkerNotFound
from ..status import RemoteError
from .answers import (
    Candidate,
    Completion,
    Delta,
    FleetStatus,
    Output,
    Score,
    Timings,
    Token,
    Usage,
    Vote,
    WorkerStatus,
)
from .calls import DEFAULT_ADDRESS, DEFAULT_TIMEOUT, AsyncClient, AsyncStream, Client, Stream
from .reports import Ensemble, MemberReport
from .requests import Chat, Message, Options, Prompt, Sampling, Select

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_TIMEOUT",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Candidate",
    "Chat",
    "Client",
    "Completion",
    "ConclaveError",
    "DeadlineExceeded",
    "Delta",
    "Ensemble",
    "FleetStatus",
    "InvalidRequest",
    "MemberReport",
    "Message",
    "Options",
    "Output",
    "Overloaded",
    "Prompt",
    "QuorumNotMet",
    "RemoteError",
    "Sampling",
    "Score",
    "Select",
    "Stream",
    "Timings",
    "Token",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Violation",
    "Vote",
    "WorkerNotFound",
    "WorkerState",
    "WorkerStatus",
]
