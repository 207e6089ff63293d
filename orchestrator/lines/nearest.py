"""The shortest way to a worker: its Unix socket if it runs on this machine, else TCP.

Anyone on a machine may take a socket's name. So it counts only for addresses of this machine's own,
whose ports anyone here could take as well.
"""

import ipaddress
import socket
from pathlib import Path

from ...worker.address import local_name

SOCKETS = Path("/proc/net/unix")
"""Of this network namespace, one a line that ends with the name; only Linux has it."""


def nearest(address: str) -> str:
    """What to dial for a worker that listens at this address."""
    name = local_name(address)
    if f"@{name}" in _sockets() and _is_own(address.rpartition(":")[0].strip("[]")):
        return f"unix-abstract:{name}"
    return address


def _sockets() -> set[str]:
    """The names of all Unix sockets that can be seen from here; @ stands for the abstract ones."""
    try:
        lines = SOCKETS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {line.rpartition(" ")[2] for line in lines}


def _is_own(host: str) -> bool:
    """Whether a host, by its number, is this machine: only then something can be bound to it."""
    try:
        version = ipaddress.ip_address(host).version
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError):
        return False
    return True
