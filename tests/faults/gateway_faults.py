"""Faults of the gateway itself."""

from .arena import Fault, ProcessArena


async def kill_gateway(arena: ProcessArena) -> str:
    """SIGKILL under load, and a new gateway at the same address: its callers see UNAVAILABLE."""
    before = arena.gateway.pid
    served = (await arena.fleet()).requests
    await arena.restart_gateway()
    fresh = (await arena.fleet()).uptime_seconds
    return f"process {before} had served {served} requests; the new one is {fresh:.1f} s old"


FAULTS = (Fault("kill gateway", kill_gateway, allows=("UNAVAILABLE",)),)
