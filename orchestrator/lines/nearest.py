"""The shortest way to a worker: its Unix socket if it runs on this machine, else TCP."""

from pathlib import Path

from ...worker.address import local_name

SOCKETS = Path("/proc/net/unix")
"""Of this network namespace, one a line that ends with the name; only Linux has it."""


def nearest(address: str) -> str:
    """What to dial for a worker that listens at this address."""
    name = local_name(address)
    return f"unix-abstract:{name}" if f"@{name}" in _sockets() else address


def _sockets() -> set[str]:
    """The names of all Unix sockets that can be seen from here; @ stands for the abstract ones."""
    try:
        lines = SOCKETS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {line.rpartition(" ")[2] for line in lines}
