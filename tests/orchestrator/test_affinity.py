"""The gateway's core: one of those it may use, chosen by the seed, for this thread alone."""

import os
import threading

import pytest

from conclave.orchestrator.gateway.affinity import keep_to_one_core

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")


def test_keeps_the_calling_thread_to_a_core_it_was_allowed() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    seen: dict[int, set[int]] = {}

    def bind(seed: int) -> None:
        keep_to_one_core(seed)
        seen[seed] = set(os.sched_getaffinity(0))

    for seed in range(len(allowed) + 1):
        thread = threading.Thread(target=bind, args=(seed,))
        thread.start()
        thread.join()
        assert seen[seed] == {allowed[seed % len(allowed)]}
    assert sorted(os.sched_getaffinity(0)) == allowed
