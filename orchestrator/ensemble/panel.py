"""Which workers take the places of an ensemble: all different, the least loaded first. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from ..routing.registry import Worker, WorkerState
from ..routing.router import Wish, candidates, typical_speed
from .spec import MemberWish


def seat(
    workers: Collection[Worker], wishes: Sequence[MemberWish], tokens: int = 0
) -> list[Worker | None]:
    """A worker for each place; None where nobody is left who fits and serves.

    Places with the fewest choices are filled first, so that a place for anybody does not take the
    only worker that another one can have. As in the router, what counts is when the ask would be
    done, so that a slow worker is not taken for being idle.

    Args:
        workers: all that are known.
        wishes: one a place.
        tokens: what the ask may cost each of them.

    Raises:
        WorkerNotFound: no known worker fits a place.
    """
    speed = typical_speed(workers)

    def work(worker: Worker) -> tuple[float, int, str]:
        seconds = (worker.outstanding_tokens + tokens) / (worker.speed or speed)
        return (seconds, worker.served_requests, worker.name)

    fitting = [
        [w for w in candidates(workers, Wish(wish.selector)) if w.state is WorkerState.SERVING]
        for wish in wishes
    ]
    seats: list[Worker | None] = [None] * len(wishes)
    taken: set[str] = set()
    for place in sorted(range(len(wishes)), key=lambda place: len(fitting[place])):
        free = [worker for worker in fitting[place] if worker.name not in taken]
        if free:
            best = min(free, key=work)
            seats[place] = best
            taken.add(best.name)
    return seats


def wish_of(place: int, wishes: Sequence[MemberWish], seats: Sequence[Worker | None]) -> Wish:
    """What a call for one place asks of the router: its own worker, or one that nobody else has."""
    others = (w.name for n, w in enumerate(seats) if w is not None and n != place)
    worker = seats[place]
    wish = Wish(wishes[place].selector, avoid=frozenset(others))
    return wish if worker is None else replace(wish, pinned=worker.name)
