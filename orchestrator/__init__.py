"""The fleet: a gateway in front of many workers, and the client that calls it."""

from .client import AsyncClient, Client
from .config import FleetConfig

__all__ = ["AsyncClient", "Client", "FleetConfig"]
