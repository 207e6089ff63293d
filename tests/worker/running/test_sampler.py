"""Token choice against its definition, and against transformers' processors."""

from collections import Counter
from typing import Any

import pytest
import torch

from conclave.worker.draws import uniform
from conclave.worker.running.sampler import likeliest, sample, score
from conclave.worker.sampling import SamplingParams
from conclave.worker.scheduling.sequence import Sequence

VOCABULARY = 50


def sequence(prompt: list[int] | None = None, seed: int = 1, **fields: Any) -> Sequence:
    prompt = prompt or [1]
    return Sequence("r", 0, list(prompt), len(prompt), 999, SamplingParams(**fields), seed)


def draws(logits: torch.Tensor, count: int, **fields: Any) -> Counter[int]:
    """How often each token is chosen over many seeds."""
    rows = [sequence(seed=seed, **fields) for seed in range(count)]
    choices = sample(logits.expand(count, -1), rows, [()] * count)
    return Counter(choice.token for choice in choices if choice is not None)


def reference_probabilities(logits: torch.Tensor, **fields: Any) -> torch.Tensor:
    """The distribution that transformers' warpers leave."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    kinds = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    warpers = LogitsProcessorList([kind(fields[k]) for k, kind in kinds.items() if k in fields])
    warped: Any = warpers(torch.LongTensor([[1]]), logits.clone().unsqueeze(0))
    return torch.as_tensor(warped[0].softmax(-1))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 2.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_follow_the_reference_distribution(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(VOCABULARY) * 2
    count = 20_000
    expected = reference_probabilities(logits, **fields)
    observed = draws(logits, count, **fields)
    for token, probability in enumerate(expected.tolist()):
        deviation = (count * probability * (1 - probability)) ** 0.5
        assert abs(observed[token] - count * probability) <= 5 * deviation + 1e-6
        if probability == 0:
            assert observed[token] == 0


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.randn(4, VOCABULARY)
    choices = sample(logits, [sequence(temperature=0.0)] * 4, [()] * 4)
    assert [c.token for c in choices if c] == logits.argmax(-1).tolist()


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, VOCABULARY)
    rows = [
        sequence(seed=s, temperature=t, top_k=k)
        for s, t, k in [
            (1, 1.0, 0),
            (2, 0.7, 5),
            (3, 0.0, 0),
            (4, 1.5, 50),
            (5, 1.0, 1),
            (6, 2.0, 7),
        ]
    ]
    together = sample(logits, rows, [()] * 6)
    alone = [sample(logits[i : i + 1], [row], [()])[0] for i, row in enumerate(rows)]
    assert together == alone


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.zeros(1, VOCABULARY)
    row = sequence(seed=9)
    first = sample(logits, [row], [()])
    assert first == sample(logits, [sequence(prompt=[4, 5, 6], seed=9)], [()])
    tokens = set()
    for _ in range(20):
        row.append(3)
        tokens.add(sample(logits, [row], [()])[0])
    assert len(tokens) > 5


def test_uniform_numbers_are_uniform() -> None:
    numbers = torch.tensor([uniform(seed, index) for seed in range(100) for index in range(100)])
    assert 0 <= numbers.min() and numbers.max() < 1
    assert abs(numbers.mean().item() - 0.5) < 0.01
    assert abs(numbers.histc(10, 0, 1) - 1000).max() < 150


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.randn(1, VOCABULARY) * 30
    choice = sample(logits, [sequence(temperature=temperature)], [()])[0]
    assert choice is not None and 0 <= choice.token < VOCABULARY
    if temperature < 1:
        assert choice.token == logits.argmax().item()


def test_bias_and_bans() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 7] = 5.0
    pushed = sequence(temperature=0.0, logit_bias={3: 10.0})
    assert sample(logits, [pushed], [()])[0].token == 3  # type: ignore[union-attr]
    assert sample(logits, [pushed], [[3]])[0].token == 7  # type: ignore[union-attr]
    assert logits[0, 3] == 0, "the caller's logits were changed"


def test_each_row_has_its_own_bans() -> None:
    """Given as any kind of list; the logits stay as they were."""
    torch.manual_seed(0)
    logits = torch.randn(5, VOCABULARY)
    order = logits.argsort(-1, descending=True)
    best, rows = order[:, :3].tolist(), [sequence(temperature=0.0) for _ in range(5)]
    before = logits.clone()
    bans: list[Any] = [tuple(best[0][:2]), [], best[2][:1], tuple(best[0][:2]), best[4][:2]]
    chosen = [choice.token for choice in sample(logits, rows, bans) if choice is not None]
    left = [[t for t in order[row].tolist() if t not in bans[row]] for row in range(5)]
    assert chosen == [own[0] for own in left]
    alike = [choice.token for choice in sample(logits, rows, [(7, 9)] * 5) if choice is not None]
    assert alike == [next(t for t in own.tolist() if t not in (7, 9)) for own in order]
    assert torch.equal(logits, before)


def test_penalties_follow_their_definitions() -> None:
    logits = torch.linspace(-2, 2, VOCABULARY).unsqueeze(0)
    row = sequence(
        prompt=[49],
        temperature=0.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        logprobs=0,
    )
    for token in (48, 48, 2):
        row.append(token)
    expected = logits[0].clone()
    for token in (49, 48, 2):
        expected[token] *= 1.5 if expected[token] < 0 else 1 / 1.5
    expected[48] -= 0.5 + 2 * 0.25
    expected[2] -= 0.5 + 0.25
    choice = sample(logits, [row], [()])[0]
    assert choice is not None and choice.token == expected.argmax().item()
    # Log-probabilities are the model's own, before penalties.
    assert choice.logprob == pytest.approx(logits[0].log_softmax(-1)[choice.token].item())


def test_scores_carry_rank_and_candidates() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, VOCABULARY)
    order = logits.argsort(dim=-1, descending=True)
    tokens = [int(order[0, 0]), int(order[1, 4]), int(order[2, -1])]
    scored = score(logits, tokens, [2, 0, 50])
    assert [choice.rank for choice in scored] == [1, 5, VOCABULARY]
    assert [len(choice.candidates) for choice in scored] == [2, 0, 50]
    logprobs = logits.log_softmax(-1)
    token, logprob = scored[0].candidates[0]
    assert token == tokens[0] and logprob == pytest.approx(logprobs[0].max().item())


def test_nan_logits_give_no_token_and_spare_the_neighbours() -> None:
    logits = torch.randn(3, VOCABULARY)
    logits[1, 20] = float("nan")
    rows = [sequence(temperature=t, logprobs=1) for t in (0.0, 1.0, 1.0)]
    choices = sample(logits, rows, [()] * 3)
    assert choices[1] is None and choices[0] is not None and choices[2] is not None


def test_likeliest_tells_as_many_as_each_row_wants() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    logits[2, 7] = torch.nan
    none, some, broken, everything = likeliest(logits, [0, 3, 3, 50])
    assert none == ([], []) and broken is None and some is not None and everything is not None
    wanted = logits.log_softmax(-1)
    assert some[0] == wanted[1].topk(3).indices.tolist() and len(some[1]) == 3
    assert everything[1] == wanted[3].sort(descending=True).values.tolist()
    assert sorted(everything[0]) == list(range(50))
