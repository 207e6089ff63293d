"""Real engines behind a real gateway, and the faults that only a real engine can have."""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import grpc.aio

from benchmarks.processes import Child
from conclave.protos import generation_pb2 as pb
from conclave.protos.worker_pb2_grpc import WorkerServiceStub

from .arena import Fault, ProcessArena
from .client_faults import talk_nonsense
from .crowd import Question, mixture
from .fuzz import WORKER
from .ledger import Ledger
from .worker_faults import kill

PACKAGES = ("vim", "git", "gimp", "bash", "python3-numpy", "libreoffice-writer")
LENGTHS = (1, 12, 40, 80)
GREEDY_TEMPERATURE = 0.0
LONG = 120
"""Tokens of the answers that a pool of 1024 is too small for, eight at a time."""


class EngineArena(ProcessArena):
    """Two real workers of the shipped model. A truth is what one of them says, asked alone."""

    @classmethod
    async def open(cls, ledger: Ledger, **settings: Any) -> Self:
        """All processes up and serving, and the truths known."""
        prompts = [pb.Prompt(text=f"Package: {name}\nLanguage: en\n\n") for name in PACKAGES]
        pool = mixture(prompts, LENGTHS, most_outputs=2)
        starts = dict.fromkeys(("e0", "e1"), _start_engine)
        arena = await cls.of(ledger, pool, starts, **settings)
        await arena.learn(prompts)
        return arena

    async def learn(self, prompts: Sequence[pb.Prompt]) -> None:
        """Asks one worker, past the gateway, what it says greedily to each prompt."""
        address = next(iter(self.places.values())).child.address
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = WorkerServiceStub(channel)
            for prompt, endless in itertools.product(prompts, (False, True)):
                sampling = pb.SamplingParams(
                    temperature=GREEDY_TEMPERATURE, max_tokens=max(LENGTHS), ignore_eos=endless
                )
                answer = await stub.Complete(pb.GenerateRequest(prompt=prompt, sampling=sampling))
                ids = [token.id for token in answer.outputs[0].tokens]
                self._greedy[prompt.text, endless] = ids

    def truths(self, request: pb.GenerateRequest) -> Mapping[int, Sequence[int]] | None:
        """Greedy answers are the beginnings of what was learnt."""
        sampling = request.sampling
        known = self._greedy.get((request.prompt.text, sampling.ignore_eos))
        if known is None or sampling.temperature != GREEDY_TEMPERATURE:
            return None
        count = sampling.n if sampling.HasField("n") else 1
        return dict.fromkeys(range(count), known[: sampling.max_tokens])

    def __init__(self, *arguments: Any) -> None:
        self._greedy: dict[tuple[str, bool], list[int]] = {}
        super().__init__(*arguments)


async def _start_engine(name: str) -> Child:
    return await Child.start("tests.faults.engine_worker", "--name", name)


async def step_raises(arena: EngineArena) -> str:
    """The model raises inside a step."""
    return await _break(arena, "raise")


async def step_makes_nan(arena: EngineArena) -> str:
    """A step's logits are NaN."""
    return await _break(arena, "nan")


async def out_of_blocks(arena: EngineArena) -> str:
    """More long answers at once than the pools hold blocks for."""
    before = await _preemptions(arena)
    sampling = pb.SamplingParams(temperature=0.8, seed=1, max_tokens=LONG, ignore_eos=True, n=2)
    prompt = pb.Prompt(text="Package: bash\nLanguage: en\n\n")
    question = Question(pb.GenerateRequest(prompt=prompt, sampling=sampling))
    await asyncio.gather(*(arena.callers.ask(question) for _ in range(8)))
    count = await _preemptions(arena) - before
    return f"{count} sequences gave their blocks up" if count > 0 else ""


async def babble(arena: EngineArena) -> str:
    """Nonsense straight to a worker."""
    return await talk_nonsense(arena, arena.pick().child.address, WORKER)


async def _break(arena: EngineArena, how: str) -> str:
    place = arena.pick()
    await arena.busy(place)
    hit = (await place.child.tell(**{how: 1}))["hit"]
    return f"{hit} sequences were in the step" if hit else ""


async def _preemptions(arena: EngineArena) -> int:
    loads = [await arena.load(place.child.address) for place in arena.places.values()]
    return sum(load.preemptions for load in loads)


FAULTS = (
    Fault("engine: raise in a step", step_raises, where="engine"),
    Fault("engine: NaN logits", step_makes_nan, where="engine"),
    Fault("engine: out of blocks", out_of_blocks, where="engine"),
    Fault("engine: kill", kill, where="engine"),
    Fault("engine: babble", babble, where="engine"),
)
