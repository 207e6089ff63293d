"""One GPU, one model, one gRPC server; the engine also works alone, in a notebook.

The names below are loaded when they are first used, so that reading a worker's settings or naming
its Ray actor does not bring torch along.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EngineConfig, WorkerConfig
    from .engine import Engine
    from .knobs import Knobs
    from .requests.events import Made
    from .sampling import SamplingParams

__all__ = ["Engine", "EngineConfig", "Knobs", "Made", "SamplingParams", "WorkerConfig"]

_HOMES = {
    "Engine": "engine",
    "EngineConfig": "config",
    "Knobs": "knobs",
    "Made": "requests.events",
    "SamplingParams": "sampling",
    "WorkerConfig": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
