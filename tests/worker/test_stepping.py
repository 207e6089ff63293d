"""Answers that their caller steps: the same tokens as ordinary ones, and no block left behind."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker import Engine, Made
from conclave.worker.errors import (
    ConclaveError,
    DeadlineExceeded,
    InvalidRequest,
    Unavailable,
)
from conclave.worker.requests.events import Stepped
from conclave.worker.requests.stepping import Stepper
from conclave.worker.scheduling import scheduler
from conclave.worker.scheduling.sequence import FinishReason

TinyCheckpoint = Callable[[int | str], Path]

SMALL: dict[str, Any] = {"max_context": 96, "kv_tokens": 4096, "block_size": 4, "threads": 1}
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def until(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


def assert_nothing_leaked(engine: Engine) -> None:
    assert until(lambda: engine.load.running == engine.load.waiting == 0)
    assert until(lambda: not any(pool.used for pool in engine.load.pools))
    assert not engine._open and not engine._loop._answers and not engine._loop._logits
    assert not engine._loop.scheduler.parked


@pytest.fixture(scope="module")
def engine(text_checkpoint: Path) -> Iterator[Engine]:
    with Engine(text_checkpoint, **SMALL) as engine:
        yield engine
        assert_nothing_leaked(engine)


def follow(stepper: Stepper, generate: Callable[[], int] = lambda: 0) -> list[int]:
    """Greedy steps to the end, with runs that the worker generates itself in between."""
    with stepper:
        step = stepper.open()
        while step.end is None:
            step = stepper.take(step.ids[:1], generate())
    return [token.id for token in stepper.tokens]


def test_stepping_by_the_likeliest_is_greedy(engine: Engine) -> None:
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 20}
    whole = engine.generate("abc", **asked)
    stepper = engine.step("abc", **asked)
    assert follow(stepper) == whole.token_ids
    assert stepper.text == whole.text


@pytest.mark.parametrize("variant", [3, 4, 6])
def test_stepping_works_with_every_kind_of_layer(
    tiny_checkpoint: TinyCheckpoint, variant: int
) -> None:
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 30}
    with Engine(tiny_checkpoint(variant), **SMALL) as engine:
        whole = engine.generate([5, 6, 7], **asked).token_ids
        draw = random.Random(1)
        assert follow(engine.step([5, 6, 7], **asked)) == whole
        assert follow(engine.step([5, 6, 7], **asked), lambda: draw.choice([0, 0, 2, 3])) == whole
        assert_nothing_leaked(engine)


def test_whole_distribution_is_the_model_s_own(engine: Engine) -> None:
    prompt, chosen = [30, 40, 50], [60, 70, 80, 90]
    with engine.step(prompt, candidates=512) as stepper:
        steps = [stepper.open(), *(stepper.take([token]) for token in chosen)]
    (score,) = engine.score(prompt, [chosen])
    for step, token in zip(steps, score.tokens, strict=False):
        assert sorted(step.ids) == list(range(512))
        assert list(step.logprobs) == sorted(step.logprobs, reverse=True)
        told = dict(zip(step.ids, step.logprobs, strict=True))
        assert told[token.id] == pytest.approx(token.logprob, abs=1e-5)
        assert torch.tensor(step.logprobs).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_distribution_equals_prompt_logprobs_to_the_last_bit(engine: Engine) -> None:
    """The same step of the model behind both: nothing is rounded on the way out."""
    (score,) = engine.score([30, 40, 50], [[60]])
    with engine.step([30, 40, 50], candidates=512) as stepper:
        step = stepper.open()
    told = dict(zip(step.ids, step.logprobs, strict=True))
    assert told[60] == pytest.approx(score.tokens[0].logprob, abs=1e-6)


@pytest.mark.parametrize("run", [1, 3, 50])
def test_generated_runs_are_ordinary_sampling(engine: Engine, run: int) -> None:
    asked: dict[str, Any] = {
        "max_tokens": 20,
        "temperature": 1.4,
        "seed": 12,
        "frequency_penalty": 0.5,
        "logprobs": 1,
        "ignore_eos": True,
    }
    whole = engine.generate("abc", **asked)
    with engine.step("abc", generate=run, **asked) as stepper:
        step = stepper.open()
        while step.end is None:
            assert not step.ids and len(step.tokens) == run
            step = stepper.take(generate=run)
    assert [t.id for t in stepper.tokens] == whole.token_ids
    assert stepper.text == whole.text and step.end == whole.outputs[0].end
    for mine, theirs in zip(stepper.tokens, whole.outputs[0].tokens, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_taking_and_generating_mix(engine: Engine) -> None:
    """Whatever the mixture, the draw is the one of the token's place in the answer."""
    asked: dict[str, Any] = {"max_tokens": 40, "temperature": 1.2, "seed": 5, "ignore_eos": True}
    whole = engine.generate("abc", **asked).token_ids
    draw = random.Random(2)
    with engine.step("abc", **asked) as stepper:
        step = stepper.open()
        while step.end is None:
            at, count = step.position, draw.randrange(0, 4)
            step = stepper.take(whole[at : at + count], draw.choice([0, 0, 1, 2, 5]))
            assert step.position == len(stepper.tokens)
            assert [t.id for t in stepper.tokens] == whole[: step.position]


def test_a_distribution_can_be_told_again_and_sampled_of(engine: Engine) -> None:
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 3, "ignore_eos": True, "max_tokens": 8}
    whole = engine.generate("abc", **asked).token_ids
    steps = engine.load.steps
    with engine.step("abc", candidates=5, **asked) as stepper:
        first = stepper.open()
        again = stepper.take()
        assert (again.ids, again.logprobs) == (first.ids, first.logprobs)
        assert [token.id for token in stepper.take(generate=1).tokens] == whole[:1]
        assert engine.load.steps - steps == 1, "the prompt's last logits were there already"
        assert [token.id for token in stepper.take(generate=2).tokens] == whole[1:3]


def test_first_response_says_what_was_opened(engine: Engine) -> None:
    with engine.step("abc", top_p=0.9, stop_token_ids=[77]) as stepper:
        opened = stepper.open().opened
    assert opened is not None and opened.prompt == tuple(engine.intake.encode("abc"))
    assert opened.sampling.temperature == 0.5 and opened.sampling.top_p == 0.9
    assert opened.sampling.top_k == 40 and opened.sampling.seed is not None
    assert opened.sampling.max_tokens == 96 - len(opened.prompt)
    assert opened.stop_ids == (1, 5, 77)
    with engine.step("abc") as stepper:
        assert stepper.open().opened is not None and stepper.take([20]).opened is None


def test_taken_tokens_carry_text_and_known_logprobs(engine: Engine) -> None:
    first, second, third = (16 + byte for byte in "€".encode())
    with engine.step("x", candidates=512, logprobs=2, **GREEDY) as stepper:
        told = stepper.open()
        (one,) = stepper.take([first]).tokens
        two, three = stepper.take([second, third]).tokens
    assert one.logprob == dict(zip(told.ids, told.logprobs, strict=True))[first]
    assert len(one.candidates) == 2 and two.logprob is not None and three.logprob is None
    assert [one.text, two.text, three.text] == ["", "", "€"]


@pytest.mark.parametrize(
    ("asked", "ids", "reason", "matched"),
    [
        ({}, [20, 1], FinishReason.STOP, 1),
        ({"stop": ["ab"]}, [16 + 97, 16 + 98], FinishReason.STOP, "ab"),
        ({"max_tokens": 3}, [20, 21, 22], FinishReason.LENGTH, None),
    ],
)
def test_taken_token_may_end_the_answer(
    engine: Engine, asked: dict[str, Any], ids: list[int], reason: FinishReason, matched: object
) -> None:
    with engine.step("x", **asked) as stepper:
        stepper.open()
        assert stepper.take(ids[:1]).end is None
        last = stepper.take(ids[1:])
        assert last.end is not None and not last.ids
        assert (last.end.reason, last.end.matched) == (reason, matched)
        assert last.end.completion_tokens == len(ids) == last.position
        with pytest.raises(InvalidRequest, match="ended"):
            stepper.take([20])


def test_begun_answers_are_stepped_on(engine: Engine) -> None:
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 20}
    whole = engine.generate("abc", **asked).token_ids
    stepper = engine.step("abc", made=[Made(tuple(whole[:6]))], **asked)
    assert follow(stepper) == whole[6:]
    with engine.step("abc", made=[Made(tuple(whole))], **asked) as stepper:
        step = stepper.open()
    assert step.end is not None and step.position == 20 and step.opened is not None


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"n": 2}, "sampling.n"),
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"prompt_logprobs": 1}, "sampling.prompt_logprobs"),
        ({"candidates": 513}, "open.candidates"),
        ({"generate": -1}, "open.generate"),
        ({"made": [Made((), True)]}, "made[0].ended"),
        ({"made": [Made(), Made()]}, "made"),
        ({"made": [Made((600,))]}, "made[0].ids"),
    ],
)
def test_step_that_cannot_be_opened_names_its_field(
    engine: Engine, asked: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.step("x", **asked)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_steps_that_cannot_be_made_name_their_field(engine: Engine) -> None:
    def refused(act: Callable[[], object]) -> str:
        with pytest.raises(InvalidRequest) as caught:
            act()
        return caught.value.violations[0].field

    with engine.step("x", max_tokens=3) as stepper:
        assert refused(lambda: stepper.take([20])) == "take"
        stepper.open()
        assert refused(stepper.open) == "open"
        assert refused(lambda: stepper.take([512])) == "take.ids"
        assert refused(lambda: stepper.take([20], -1)) == "take.generate"
        assert stepper.take([20]).position == 1  # refused by the caller's own side: goes on
        assert refused(lambda: stepper.take([20, 21, 22])) == "take.ids"
        assert refused(lambda: stepper.take([20])) == "take"


def test_leaving_frees_the_blocks(engine: Engine) -> None:
    stepper = engine.step([30] * 20, **GREEDY)
    stepper.open()
    assert until(lambda: any(pool.used for pool in engine.load.pools))
    assert engine.load.running == engine.load.parked == 1
    stepper.close()
    assert_nothing_leaked(engine)


def test_deadline_passes_while_nothing_is_computed(engine: Engine) -> None:
    stepper = Stepper(lambda: None, lambda ids, generate: None, lambda: None)
    engine.submit(engine.intake.stepping([30], {}, stepper.put, deadline=time.monotonic() + 0.2))
    assert stepper._response().opened is not None
    with pytest.raises(DeadlineExceeded):
        stepper._response()


def test_closing_the_engine_ends_steps(text_checkpoint: Path) -> None:
    engine = Engine(text_checkpoint, **SMALL)
    stepper = engine.step([30])
    stepper.open()
    engine.close()
    with pytest.raises(Unavailable):
        stepper.take([20])


@pytest.mark.parametrize(
    "how", [{"prefix_cache": True}, {"prefix_cache": False}, {"kv_host_gib": 0.01}]
)
def test_thirty_steppers_among_others_in_a_tiny_pool(
    text_checkpoint: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "PATIENCE", 0.05)
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 20}
    prompts = [[20 + number, *range(30, 30 + number % 7)] for number in range(40)]
    with Engine(text_checkpoint, **SMALL) as roomy:
        whole = [roomy.generate(prompt, **asked).token_ids for prompt in prompts]
    tight = {**SMALL, "kv_tokens": 160, "max_step_tokens": 32, **how}
    with Engine(text_checkpoint, **tight) as engine:
        got: dict[int, list[int]] = {}

        def run(number: int) -> None:
            draw = random.Random(number)
            if number >= 30:
                got[number] = engine.generate(prompts[number], **asked).token_ids
            else:
                got[number] = follow(
                    engine.step(prompts[number], **asked),
                    lambda: time.sleep(draw.choice([0, 0, 0.02])) or draw.choice([0, 0, 3]),  # type: ignore[func-returns-value]
                )

        threads = [threading.Thread(target=run, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert [got[number] for number in range(40)] == whole
        assert engine.load.preemptions > 0
        assert_nothing_leaked(engine)


@pytest.mark.parametrize("host", [None, 0.01])
def test_sleeping_callers_lose_their_blocks_to_others(
    text_checkpoint: Path, host: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "PATIENCE", 0.2)
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 12}
    tight = {**SMALL, "kv_tokens": 96, "max_sequences": 2, "kv_host_gib": host}
    with Engine(text_checkpoint, **tight) as engine:
        whole = engine.generate([30] * 60, **asked).token_ids
        sleepers = [engine.step([30] * 60, **asked) for _ in range(2)]
        steps = [sleeper.open() for sleeper in sleepers]
        started = time.monotonic()
        other = engine.generate([40] * 70, **asked)
        assert other.finished.timings.queued > 0 and time.monotonic() - started < 3
        for sleeper, step in zip(sleepers, steps, strict=True):
            while step.end is None:
                step = sleeper.take(step.ids[:1])
            assert [token.id for token in sleeper.tokens] == whole
        assert_nothing_leaked(engine)


def test_steppers_run_in_one_step(text_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(text_checkpoint, **SMALL) as engine:
        batches: list[int] = []
        forward = engine.model.runner.forward

        def slow(chunks: list[Any]) -> torch.Tensor:
            batches.append(len(chunks))
            time.sleep(0.03)
            return forward(chunks)

        steppers = [engine.step([30 + number], **GREEDY) for number in range(8)]
        heads = [stepper.open().ids[0] for stepper in steppers]
        monkeypatch.setattr(engine.model.runner, "forward", slow)
        threads = [
            threading.Thread(target=stepper.take, args=([head],))
            for stepper, head in zip(steppers, heads, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(batches) <= 3 and sum(batches) == 8
        for stepper in steppers:
            stepper.close()
        assert_nothing_leaked(engine)


def test_broken_model_ends_steps(text_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(text_checkpoint, **SMALL) as engine:
        forward = engine.model.runner.forward
        for broken in (lambda chunks: forward(chunks) * float("nan"), lambda chunks: 1 / 0):
            stepper = engine.step([30], candidates=0)
            assert isinstance(stepper.open(), Stepped)
            monkeypatch.setattr(engine.model.runner, "forward", broken)
            with pytest.raises(ConclaveError, match=r"NaN|the model failed"):
                stepper.take([20])
            monkeypatch.setattr(engine.model.runner, "forward", forward)
        assert_nothing_leaked(engine)
