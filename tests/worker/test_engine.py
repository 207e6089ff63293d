"""The engine against one-at-a-time generation: batching, chunks, prefixes, preemption, endings."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker import Engine
from conclave.worker.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from conclave.worker.requests.completion import Stream
from conclave.worker.scheduling.sequence import FinishReason

TinyCheckpoint = Callable[[int | str], Path]

SMALL: dict[str, Any] = {"max_context": 96, "kv_tokens": 4096, "block_size": 4, "threads": 1}


def prompts(count: int, shared: int = 0) -> list[list[int]]:
    """Prompts of mixed lengths; some begin alike."""
    draw = random.Random(5)
    beginning = [draw.randrange(3, 290) for _ in range(shared)]
    return [
        [*beginning[: draw.choice([0, shared])], *(draw.randrange(3, 290) for _ in range(length))]
        for length in (draw.randrange(1, 40) for _ in range(count))
    ]


def answer_all(engine: Engine, asked: list[list[int]], **sampling: object) -> list[list[int]]:
    streams = [engine.stream(prompt, **sampling) for prompt in asked]
    return [stream.result().token_ids for stream in streams]


def assert_nothing_leaked(engine: Engine) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(pool.used for pool in engine.load.pools):
        time.sleep(0.01)
    assert [pool.used for pool in engine.load.pools] == [0] * len(engine.load.pools)
    assert engine.load.running == engine.load.waiting == 0
    for pool in engine._loop.scheduler.blocks.pools:
        assert pool.free == pool.blocks and not any(pool._references)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: TinyCheckpoint) -> Iterator[Engine]:
    with Engine(tiny_checkpoint(1), **SMALL) as engine:
        yield engine
        assert_nothing_leaked(engine)


@pytest.fixture(scope="module")
def text_engine(text_checkpoint: Path) -> Iterator[Engine]:
    with Engine(text_checkpoint, **SMALL) as engine:
        yield engine
        assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    ("variant", "count"), [(1, 64), (3, 24), (4, 24), ("5-small-table", 24), (6, 24), (11, 24)]
)
def test_many_at_once_equal_one_at_a_time(
    tiny_checkpoint: TinyCheckpoint, variant: int | str, count: int
) -> None:
    """Greedy answers do not depend on batching, prefix reuse, chunking or preemption."""
    folder, asked = tiny_checkpoint(variant), prompts(count, shared=16)
    lengths = [random.Random(i).randrange(1, 24) for i in range(count)]

    def run(at_once: bool, **settings: object) -> tuple[list[list[int]], Engine]:
        with Engine(folder, **{**SMALL, **settings}) as engine:
            streams, answers = [], []
            for prompt, length in zip(asked, lengths, strict=True):
                stream = engine.stream(prompt, max_tokens=length, temperature=0.0, ignore_eos=True)
                streams.append(stream)
                if not at_once:
                    stream.result()
            answers = [stream.result().token_ids for stream in streams]
            assert_nothing_leaked(engine)
        return answers, engine

    alone, _ = run(False, prefix_cache=False)
    assert [len(answer) for answer in alone] == lengths
    assert len({tuple(answer[:4]) for answer in alone}) > count // 4, "the answers hardly differ"
    together, _ = run(True, prefix_cache=False)
    assert together == alone
    cached, engine = run(True, prefix_cache=True, max_sequences=7)
    assert cached == alone and engine.load.cached_tokens > 0
    squeezed, engine = run(True, kv_tokens=120, max_step_tokens=24)
    assert squeezed == alone and engine.load.preemptions > 0
    spilled, engine = run(True, kv_tokens=120, max_step_tokens=24, kv_host_gib=0.01)
    assert spilled == alone and engine.load.preemptions > 0
    assert sum(use.restored for use in engine.load.host) > 0


def test_idle_sequences_come_back_from_the_host(tiny_checkpoint: TinyCheckpoint) -> None:
    """More of them than the cache holds, each stepped in turn; little is computed twice."""
    asked = prompts(6)

    def run(**settings: object) -> tuple[list[list[int]], int]:
        with Engine(tiny_checkpoint(3), **{**SMALL, "max_sequences": 8, **settings}) as engine:
            forward, computed = engine.model.runner.forward, 0

            def counted(chunks: list[Any]) -> torch.Tensor:
                nonlocal computed
                computed += sum(len(chunk.tokens) for chunk in chunks)
                return forward(chunks)

            engine.model.runner.forward = counted  # type: ignore[method-assign,assignment]
            answers = []
            for _ in range(3):
                for prompt in asked:
                    done = engine.generate(prompt, max_tokens=12, temperature=0.0, ignore_eos=True)
                    answers.append(done.token_ids)
            return answers, computed

    roomy, least = run()
    tight, most = run(kv_tokens=104)
    spilled, again = run(kv_tokens=104, kv_host_gib=0.01)
    assert roomy == tight == spilled
    assert most > 1.5 * least and again < 1.1 * least


def test_the_host_is_too_small(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(ConfigError, match="give at least"):
        Engine(tiny_checkpoint(3), **SMALL, kv_host_gib=1e-7)


def test_greedy_equals_transformers(
    engine: Engine,
    reference_logits: Callable[[str, list[int]], torch.Tensor],
) -> None:
    prompt = prompts(1)[0]
    answer = engine.generate(prompt, max_tokens=20, temperature=0.0, ignore_eos=True).token_ids
    logits = reference_logits("1", [*prompt, *answer])
    assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_logprobs_equal_transformers(
    engine: Engine,
    reference_logits: Callable[[str, list[int]], torch.Tensor],
) -> None:
    prompt = prompts(3)[2]
    whole = engine.generate(
        prompt, max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    tokens = [*prompt, *whole.token_ids]
    logprobs = reference_logits("1", tokens).log_softmax(-1)
    records = [*whole.prompt_tokens, *whole.outputs[0].tokens]
    assert [record.id for record in records] == tokens
    assert records[0].logprob is None
    for position, record in enumerate(records[1:]):
        row = logprobs[position]
        assert record.logprob == pytest.approx(row[record.id].item(), abs=1e-3)
        assert record.rank == (row > row[record.id]).sum() + 1
        wanted = 3 if position + 1 >= len(prompt) else 2
        assert [c.id for c in record.candidates] == row.topk(wanted).indices.tolist()


def test_prompt_logprobs_survive_chunks_and_preemption(tiny_checkpoint: TinyCheckpoint) -> None:
    asked = prompts(12)
    settings = {"max_tokens": 40, "temperature": 0.0, "prompt_logprobs": 0, "ignore_eos": True}
    with Engine(tiny_checkpoint(1), **SMALL) as roomy:
        expected = [roomy.generate(p, **settings) for p in asked]
    with Engine(tiny_checkpoint(1), **{**SMALL, "kv_tokens": 104, "max_step_tokens": 9}) as tight:
        streams = [tight.stream(p, **settings) for p in asked]
        for stream, wanted in zip(streams, expected, strict=True):
            got = stream.result()
            assert got.token_ids == wanted.token_ids
            assert [t.id for t in got.prompt_tokens] == [t.id for t in wanted.prompt_tokens]
            for a, b in zip(got.prompt_tokens[1:], wanted.prompt_tokens[1:], strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
        assert tight.load.preemptions > 0


def test_score_is_the_sum_of_logprobs(
    engine: Engine,
    reference_logits: Callable[[str, list[int]], torch.Tensor],
) -> None:
    context, *continuations = prompts(4)
    for continuation, score in zip(
        continuations, engine.score(context, continuations), strict=True
    ):
        logprobs = reference_logits("1", [*context, *continuation]).log_softmax(-1)
        rows = logprobs[len(context) - 1 : -1]
        expected = rows.gather(1, torch.tensor(continuation).unsqueeze(1)).sum().item()
        assert score.logprob == pytest.approx(expected, abs=1e-3)
        assert score.scored_tokens == len(continuation)


def test_score_without_context_leaves_the_first_token_out(engine: Engine) -> None:
    tokens = prompts(1)[0]
    alone, after_first = engine.score([], [tokens])[0], engine.score(tokens[:1], [tokens[1:]])[0]
    assert alone.scored_tokens == len(tokens) - 1
    assert alone.logprob == pytest.approx(after_first.logprob, abs=1e-4)


def test_seed_makes_answers_repeatable(engine: Engine) -> None:
    prompt = prompts(1)[0]
    asked = {"max_tokens": 12, "temperature": 2.0, "ignore_eos": True, "n": 3}
    first = engine.generate(prompt, seed=7, **asked)
    again = engine.generate(prompt, seed=7, **asked)
    other = engine.generate(prompt, seed=8, **asked)
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in again.outputs]
    assert [o.token_ids for o in first.outputs] != [o.token_ids for o in other.outputs]
    assert len({tuple(o.token_ids) for o in first.outputs}) == 3


def test_seeded_answers_do_not_depend_on_the_batch(engine: Engine) -> None:
    asked = prompts(8)
    settings = {"max_tokens": 10, "temperature": 1.5, "seed": 3, "ignore_eos": True}
    alone = [engine.generate(prompt, **settings).token_ids for prompt in asked]
    assert answer_all(engine, asked, **settings) == alone


def test_outputs_share_the_prompt(tiny_checkpoint: TinyCheckpoint) -> None:
    with Engine(tiny_checkpoint(1), **SMALL) as engine:
        prompt = list(range(3, 67))
        before = engine.load.steps
        whole = engine.generate(prompt, n=4, max_tokens=2, temperature=1.0, ignore_eos=True)
        assert whole.finished.usage.completion_tokens == 8
        assert engine.load.steps - before <= 4


def test_max_tokens_zero_generates_nothing(engine: Engine) -> None:
    whole = engine.generate([5, 6, 7], max_tokens=0, prompt_logprobs=1)
    assert whole.token_ids == [] and len(whole.prompt_tokens) == 3
    assert whole.outputs[0].end.reason is FinishReason.LENGTH


def test_prompt_of_one_token_has_nothing_to_score(engine: Engine) -> None:
    (token,) = engine.generate([5], max_tokens=1, prompt_logprobs=1).prompt_tokens
    assert token.id == 5 and token.logprob is None


def test_hopelessly_long_text_is_refused_before_it_is_tokenised(text_engine: Engine) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match="too long"):
        text_engine.generate("x" * 20_000_000)
    assert time.monotonic() - started < 1.0


def test_answer_ends_with_the_context(engine: Engine) -> None:
    prompt = list(range(3, 93))
    whole = engine.generate(prompt, temperature=0.0, ignore_eos=True)
    assert len(whole.token_ids) == 96 - 90
    assert whole.outputs[0].end.reason is FinishReason.LENGTH


def test_stop_token_of_the_caller(engine: Engine) -> None:
    prompt = prompts(1)[0]
    free = engine.generate(prompt, max_tokens=20, temperature=0.0, ignore_eos=True).token_ids
    stop = free[3]
    cut = engine.generate(prompt, max_tokens=20, temperature=0.0, stop_token_ids=[stop])
    assert cut.token_ids == free[: free.index(stop) + 1]
    assert cut.outputs[0].end.reason is FinishReason.STOP
    assert cut.outputs[0].end.matched == stop


def test_min_tokens_hold_the_stop_off(engine: Engine) -> None:
    prompt = prompts(1)[0]
    free = engine.generate(prompt, max_tokens=20, temperature=0.0, ignore_eos=True).token_ids
    held = engine.generate(
        prompt, max_tokens=20, temperature=0.0, stop_token_ids=[free[0]], min_tokens=6
    )
    assert len(held.token_ids) >= 6 and free[0] not in held.token_ids[:6]


def forced(text: str) -> dict[str, object]:
    """Sampling fields under which the byte tokenizer's model can only say these letters."""
    return {"logit_bias": {16 + byte: 100.0 for byte in set(text.encode())}, "temperature": 0.0}


def test_stop_text_across_token_borders(text_engine: Engine) -> None:
    free = text_engine.generate("x", max_tokens=40, **forced("ab ")).text
    stop = free[10:14]
    at = free.index(stop)
    cut = text_engine.generate("x", max_tokens=40, stop=[stop], **forced("ab "))
    assert cut.text == free[:at]
    assert cut.outputs[0].end.matched == stop
    kept = text_engine.generate("x", max_tokens=40, stop=[stop], include_stop=True, **forced("ab "))
    assert kept.text == free[: at + len(stop)]


def test_deltas_join_to_the_whole_text(text_engine: Engine) -> None:
    stream = text_engine.stream("x", max_tokens=60, temperature=1.0, seed=5, ignore_eos=True)
    pieces = [token.text for delta in stream for token in delta.tokens]
    whole = text_engine.generate("x", max_tokens=60, temperature=1.0, seed=5, ignore_eos=True)
    assert "".join(pieces) == whole.text
    decoded = text_engine.model.tokenizer.decode(whole.token_ids)
    assert whole.text == decoded


def test_checkpoint_defaults_apply_unless_overridden(text_engine: Engine) -> None:
    request = text_engine.intake.generation([5], {"top_k": 3}, lambda events: None)
    assert request.sampling.temperature == 0.5 and request.sampling.top_k == 3


def test_chat_prompt(text_engine: Engine) -> None:
    whole = text_engine.generate([{"role": "user", "content": "Hi"}], max_tokens=3)
    assert whole.finished.usage.prompt_tokens == len("user\nHi\nmodel\n") + 4


def test_cancel_frees_blocks_within_a_step(engine: Engine) -> None:
    stream = engine.stream([5, 6, 7], ignore_eos=True)
    next(stream)
    steps = engine.load.steps
    stream.close()
    with pytest.raises(Cancelled):
        stream.result()
    assert all(pool.used == 0 for pool in _uses(engine))
    assert engine.load.steps - steps <= 3  # one may be under way, one may be published late


def _uses(engine: Engine) -> list:  # type: ignore[type-arg]
    return list(engine._loop.scheduler.blocks.use())


def test_deadline_ends_a_request(engine: Engine) -> None:
    stream = Stream(lambda: None)
    engine.submit(
        engine.intake.generation(
            [5, 6], {"ignore_eos": True}, stream.put, deadline=time.monotonic() + 0.05
        )
    )
    with pytest.raises(DeadlineExceeded):
        stream.result()


@pytest.mark.parametrize("name", ["meta", "mps", "nonsense", "cuda:99"])
def test_devices_that_cannot_be_used_are_refused(
    name: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    with pytest.raises(ConfigError, match=f"device.*{name}") as refused:
        Engine(tiny_checkpoint("1"), device=name)
    assert len(str(refused.value)) < 400


def test_full_queue_refuses(tiny_checkpoint: TinyCheckpoint) -> None:
    with Engine(tiny_checkpoint(1), **SMALL, max_sequences=1, max_waiting=2) as engine:
        streams = [engine.stream([5, 6], ignore_eos=True) for _ in range(3)]
        with pytest.raises(Overloaded):
            engine.stream([5, 6])
        for stream in streams:
            stream.close()
        for stream in streams:
            with pytest.raises(Cancelled):
                stream.result()
        assert len(engine.generate([5, 6], max_tokens=2, ignore_eos=True).token_ids) == 2


def test_same_id_twice_is_refused(engine: Engine) -> None:
    stream = Stream(lambda: None)
    build = engine.intake.generation
    engine.submit(build([5], {"ignore_eos": True}, stream.put, request_id="twin"))
    with pytest.raises(InvalidRequest, match="already running"):
        engine.submit(build([5], {}, stream.put, request_id="twin"))
    engine.abort("twin")
    with pytest.raises(Cancelled):
        stream.result()


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ([], {}, "prompt"),
        ([5, 512], {}, "prompt.token_ids.ids"),
        ([5, -1], {}, "prompt.token_ids.ids"),
        ([5] * 96, {}, "prompt"),
        ([5] * 97, {"max_tokens": 0}, "prompt"),
        ([5] * 50, {"max_tokens": 47}, "sampling.max_tokens"),
        ([5], {"n": 17}, "sampling.n"),
        ([5], {"logprobs": 65}, "sampling.logprobs"),
        ([5], {"prompt_logprobs": 65}, "sampling.prompt_logprobs"),
        ([5], {"stop_token_ids": [512]}, "sampling.stop_token_ids"),
        ([5], {"logit_bias": {600: 1.0}}, "sampling.logit_bias"),
        ("text", {}, "prompt.text"),
    ],
)
def test_request_that_cannot_run_names_its_field(
    engine: Engine, prompt: object, sampling: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.generate(prompt, **sampling)  # type: ignore[arg-type]
    assert caught.value.violations[0].field == field


def test_memory_that_a_neighbour_takes_is_done_without(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of more than two sequences do not fit for a while; nobody's request is lost."""
    asked = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    with Engine(tiny_checkpoint(1), **SMALL) as engine:
        whole = answer_all(engine, prompts(6), **asked)
        forward, most = engine.model.runner.forward, 2

        def short(chunks: list[Any]) -> torch.Tensor:
            logits = forward(chunks)  # which is written when memory runs out
            if len(chunks) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return logits

        monkeypatch.setattr(engine.model.runner, "forward", short)
        streams = [engine.stream(prompt, **asked) for prompt in prompts(6)]
        assert [stream.result().token_ids for stream in streams] == whole
        assert engine.load.preemptions > 0
        assert_nothing_leaked(engine)
        most = 0
        with pytest.raises(Overloaded, match="too little memory left"):
            engine.generate([5, 6])
        most = 99
        assert answer_all(engine, prompts(6), **asked) == whole


def test_model_failure_ends_its_requests_and_spares_the_engine(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(tiny_checkpoint(1), **SMALL) as engine:
        forward = engine.model.runner.forward

        def fail(chunks: object) -> torch.Tensor:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine.model.runner, "forward", fail)
        with pytest.raises(Unavailable, match="out of memory"):
            engine.generate([5, 6])
        monkeypatch.setattr(engine.model.runner, "forward", forward)
        assert len(engine.generate([5, 6], max_tokens=2, ignore_eos=True).token_ids) == 2
        assert_nothing_leaked(engine)


def test_nan_logits_end_the_request(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(tiny_checkpoint(1), **SMALL) as engine:
        forward = engine.model.runner.forward
        monkeypatch.setattr(
            engine.model.runner, "forward", lambda chunks: forward(chunks) * float("nan")
        )
        with pytest.raises(Unavailable, match="NaN"):
            engine.generate([5, 6], n=2)
        assert_nothing_leaked(engine)


def test_close_ends_open_requests(tiny_checkpoint: TinyCheckpoint) -> None:
    engine = Engine(tiny_checkpoint(1), **SMALL)
    streams = [engine.stream([5, 6], ignore_eos=True) for _ in range(3)]
    engine.close()
    for stream in streams:
        with pytest.raises(Unavailable):
            stream.result()
    with pytest.raises(Unavailable):
        engine.generate([5])
    engine.close()


def test_many_threads_may_ask(engine: Engine) -> None:
    asked = prompts(16)
    expected = [engine.generate(p, max_tokens=6, temperature=0.0).token_ids for p in asked]
    answers: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        answers[index] = engine.generate(asked[index], max_tokens=6, temperature=0.0).token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(len(asked))] == expected
