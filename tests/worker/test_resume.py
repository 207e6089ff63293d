"""An answer taken over at any token goes on as if it had never been interrupted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conclave.worker import Engine, Made
from conclave.worker.errors import InvalidRequest
from conclave.worker.requests.completion import Completion
from conclave.worker.scheduling.sequence import FinishReason

SMALL: dict[str, Any] = {"max_context": 96, "kv_tokens": 4096, "block_size": 4, "threads": 1}
BYTE = 16
"""Token id of byte 0."""


def letters(text: str) -> dict[int, float]:
    """A bias under which the model can only say these bytes."""
    return {BYTE + byte: 100.0 for byte in set(text.encode())}


@pytest.fixture(scope="module")
def engine(text_checkpoint: Path) -> Iterator[Engine]:
    with Engine(text_checkpoint, **SMALL) as engine:
        yield engine


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "ignore_eos": True},
    "sampled": {"temperature": 1.5, "seed": 4, "ignore_eos": True},
    "cut": {"temperature": 1.2, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "seed": 11},
    "penalties": {
        "temperature": 0.9,
        "seed": 5,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.4,
        "ignore_eos": True,
    },
    "stop token": {"temperature": 1.0, "seed": 2, "stop_token_ids": [BYTE + 97, BYTE + 98]},
    "min tokens": {
        "temperature": 1.0,
        "seed": 2,
        "min_tokens": 9,
        "stop_token_ids": [BYTE + 97],
        "stop": ["b"],
        "logit_bias": letters("abc"),
    },
    "stop text": {
        "temperature": 1.0,
        "seed": 3,
        "stop": ["abca", "cc"],
        "logit_bias": letters("abc"),
    },
    "stop text kept": {
        "temperature": 1.0,
        "seed": 9,
        "stop": ["aab", "bca"],
        "include_stop": True,
        "logit_bias": letters("abc"),
    },
    "bytes of several characters": {"temperature": 1.0, "seed": 6, "logit_bias": letters("é€😀")},
    "logprobs": {"temperature": 1.0, "seed": 8, "logprobs": 2, "ignore_eos": True},
    "special tokens shown": {"temperature": 2.0, "seed": 8, "skip_special_tokens": False},
}


def same_end(resumed: Completion, unbroken: Completion) -> None:
    assert [o.end for o in resumed.outputs] == [o.end for o in unbroken.outputs]
    wanted = unbroken.finished.usage.completion_tokens
    assert resumed.finished.usage.completion_tokens == wanted


@pytest.mark.parametrize("case", CASES)
def test_every_cut_gives_the_same_answer(engine: Engine, case: str) -> None:
    asked = {"max_tokens": 24, **CASES[case]}
    unbroken = engine.generate("Hä?", **asked)
    records = unbroken.outputs[0].tokens
    assert len(records) > 3
    for cut in range(len(records) + 1):
        made = [Made(tuple(record.id for record in records[:cut]))]
        resumed = engine.resume("Hä?", made, **asked).result()
        got = resumed.outputs[0].tokens
        assert [t.id for t in got] == [t.id for t in records[cut:]]
        assert [t.text for t in got] == [t.text for t in records[cut:]]
        for mine, theirs in zip(got, records[cut:], strict=True):
            assert mine.logprob == (theirs.logprob and pytest.approx(theirs.logprob, abs=1e-4))
            assert [c.id for c in mine.candidates] == [c.id for c in theirs.candidates]
        same_end(resumed, unbroken)


def test_texts_are_really_held_across_the_cut(engine: Engine) -> None:
    asked: dict[str, Any] = {"max_tokens": 24, **CASES["bytes of several characters"]}
    records = engine.generate("Hä?", **asked).outputs[0].tokens
    assert any(not record.text for record in records) and any(r.text for r in records)


@pytest.mark.parametrize("cuts", [(0, 3, 7), (5, 5, 5), (12, 0, 1), (2, 12, 12), (12, 12, 12)])
def test_outputs_are_cut_each_at_its_own_place(engine: Engine, cuts: tuple[int, ...]) -> None:
    asked: dict[str, Any] = {
        "max_tokens": 12,
        "n": 3,
        "temperature": 1.3,
        "seed": 1,
        "ignore_eos": True,
    }
    unbroken = engine.generate("abc", **asked)
    pairs = list(zip(unbroken.outputs, cuts, strict=True))
    resumed = engine.resume(
        "abc", [Made(tuple(output.token_ids[:cut])) for output, cut in pairs], **asked
    ).result()
    assert [o.token_ids for o in resumed.outputs] == [o.token_ids[cut:] for o, cut in pairs]
    same_end(resumed, unbroken)


def test_answers_that_have_ended_are_left_alone(engine: Engine) -> None:
    asked: dict[str, Any] = {"max_tokens": 9, "n": 3, "temperature": 1.3, "seed": 1}
    asked["ignore_eos"] = True
    unbroken = engine.generate("abc", **asked)
    ids = [tuple(output.token_ids) for output in unbroken.outputs]
    made = [Made(ids[0], ended=True), Made(ids[1][:4]), Made(ids[2], ended=True)]
    resumed = engine.resume("abc", made, **asked).result()
    (only,) = resumed.outputs
    assert only.end == unbroken.outputs[1].end and only.token_ids == list(ids[1][4:])
    assert resumed.finished.usage.completion_tokens == 27
    nothing = engine.resume("abc", [Made(each, ended=True) for each in ids], **asked).result()
    assert nothing.outputs == () and nothing.finished.usage.completion_tokens == 27
    assert 0 <= nothing.finished.timings.queued <= nothing.finished.timings.total


def test_answer_that_made_tokens_complete_ends_without_a_step(engine: Engine) -> None:
    steps = engine.load.steps
    length = engine.resume("x", [Made((BYTE + 97,) * 4)], max_tokens=4).result()
    assert length.outputs[0].end.reason is FinishReason.LENGTH
    token = engine.resume("x", [Made((BYTE + 97, 1))]).result()
    assert token.outputs[0].end.matched == 1 and token.outputs[0].tokens == ()
    text = engine.resume("x", [Made((BYTE + 97, BYTE + 98))], stop=["ab"]).result()
    assert text.outputs[0].end.matched == "ab"
    assert text.outputs[0].end.completion_tokens == 2
    assert engine.load.steps == steps


def test_prompt_logprobs_are_not_told_twice(engine: Engine) -> None:
    asked: dict[str, Any] = {"max_tokens": 5, "temperature": 0.0, "prompt_logprobs": 0}
    asked["ignore_eos"] = True
    unbroken = engine.generate("abc", **asked)
    begun = engine.resume("abc", [Made(tuple(unbroken.token_ids[:2]))], **asked).result()
    assert begun.prompt_tokens == () and begun.token_ids == unbroken.token_ids[2:]
    fresh = engine.resume("abc", [Made()], **asked).result()
    assert fresh.prompt_tokens == unbroken.prompt_tokens


@pytest.mark.parametrize(
    ("made", "asked", "field"),
    [
        ([Made(), Made()], {}, "made"),
        ([Made((512,))], {}, "made[0].ids"),
        ([Made((1, 20))], {}, "made[0].ids"),
        ([Made((BYTE + 97, BYTE + 98, 20))], {"stop": ["ab"]}, "made[0].ids"),
        ([Made(), Made((20,) * 5)], {"n": 2, "max_tokens": 4}, "made[1].ids"),
        ([Made((20,) * 96)], {}, "made[0].ids"),
        ([Made((20,))], {"max_tokens": 0}, "made[0].ids"),
    ],
)
def test_made_tokens_that_cannot_be_are_refused(
    engine: Engine, made: list[Made], asked: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.resume("x", made, **asked)
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(
    "how", [{"prefix_cache": True}, {"prefix_cache": False}, {"kv_host_gib": 0.01}]
)
def test_many_taken_over_at_once_under_preemption(
    text_checkpoint: Path, how: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"max_tokens": 30, "seed": 3, "temperature": 1.0, "ignore_eos": True}
    prompts = [[20 + number, 30, 40] for number in range(12)]
    with Engine(text_checkpoint, **SMALL) as roomy:
        whole = [roomy.generate(prompt, **asked).token_ids for prompt in prompts]
    tight = {**SMALL, "kv_tokens": 120, "max_step_tokens": 24, **how}
    with Engine(text_checkpoint, **tight) as engine:
        streams = [
            engine.resume(prompt, [Made(tuple(ids[: 2 * number]))], **asked)
            for number, (prompt, ids) in enumerate(zip(prompts, whole, strict=True))
        ]
        for number, (stream, ids) in enumerate(zip(streams, whole, strict=True)):
            assert stream.result().token_ids == ids[2 * number :]
        assert engine.load.preemptions > 0
