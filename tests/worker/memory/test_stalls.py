"""Which steps are timed on a GPU, and what these stand for; events are made up."""

import pytest
import torch

from conclave.worker.memory.stalls import EVERY, StallClock


class Event:
    """Passes at once; each begins a second after the one before it."""

    count = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        Event.count += 1
        self.at = Event.count

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


def test_timed_steps_stand_for_those_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    clock, told = StallClock(torch.device("cuda")), []
    for _ in range(2 * EVERY + 1):
        clock.begin()
        for _ in range(3):
            with clock.waiting():
                pass
        told.append(clock.seconds())
    assert told == [3.0] * EVERY + [3.0 + 3 * EVERY] * EVERY + [3.0 + 6 * EVERY]


def test_a_cpu_times_every_step() -> None:
    clock = StallClock(torch.device("cpu"))
    for _ in range(3):
        before = clock.seconds()
        clock.begin()
        with clock.waiting():
            sum(range(1000))
        assert clock.seconds() > before
