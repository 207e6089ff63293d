"""Which core the gateway runs on.

Its event loop and gRPC's own threads hand every message over to each other, and only one of them
holds the interpreter at a time; within one core a hand-over costs less than across two. On two
cores that took a quarter off what the gateway adds to a unary call (docs/log.md).
"""

import os


def keep_to_one_core(seed: int) -> None:
    """Bind this thread, and those it starts from now on, to one of the cores it may use.

    Threads that run already keep their cores. A no-op where the system has no such call.

    Args:
        seed: spreads several processes of one machine; the gateway's port.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[seed % len(cores)]})
