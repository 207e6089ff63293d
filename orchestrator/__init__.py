"""The fleet: a gateway in front of many workers, and the client that calls it."""

import os

# gRPC's older polling engine hands a message over to one thread less, which takes 0.13 to 0.2 ms
# off what the gateway adds (docs/log.md). gRPC reads this once, when it is first imported: hence
# before everything else. What the operator has set stays.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

from .client import AsyncClient, Client
from .config import FleetConfig

__all__ = ["AsyncClient", "Client", "FleetConfig"]
