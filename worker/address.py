"""A worker's second address: a Unix socket, for a gateway on the same machine.

A message through it costs the kernel a fraction of what it costs through TCP's loopback. The socket
lies in Linux's abstract namespace: it has no file, ends with its process, and can be reached from
where the loopback can, which is one network namespace.
"""

import re


def local_name(address: str) -> str:
    """The socket's name; it follows from where the worker listens, so nobody has to tell it.

    What stands before a worker, a proxy say, listens elsewhere and so is not passed by.
    """
    return "conclave-" + re.sub(r"[^0-9A-Za-z.]", "-", address)
