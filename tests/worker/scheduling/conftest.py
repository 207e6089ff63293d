"""Sequences without an engine."""

from collections.abc import Callable

import pytest

from conclave.worker.sampling import SamplingParams
from conclave.worker.scheduling.sequence import Sequence

MakeSequence = Callable[..., Sequence]


@pytest.fixture
def make_sequence() -> MakeSequence:
    """Builds sequences that arrive one after the other."""
    arrivals = iter(range(10_000))

    def make(tokens: list[int], answer: int = 8, **fields: object) -> Sequence:
        arrival = next(arrivals)
        return Sequence(
            request_id=f"request-{arrival}",
            output_index=0,
            tokens=list(tokens),
            prompt_length=len(tokens),
            max_length=len(tokens) + answer,
            sampling=SamplingParams(temperature=0.0),
            seed=0,
            arrival=arrival,
            **fields,  # type: ignore[arg-type]
        )

    return make
