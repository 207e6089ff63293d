"""What the report says of two models, against sums made by hand."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conclave.kernels.formats import Format
from conclave.worker.compress.quality.evaluation import Document, Scores, score, summarize
from conclave.worker.errors import ConfigError
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.packed import round_decoder
from conclave.worker.weights import load_decoder

Checkpoint = Callable[[int | str], Path]


def decoders(folder: Path) -> tuple[Decoder, Decoder]:
    config = ModelConfig.load(folder)
    full, changed = (
        load_decoder(folder, config, torch.device("cpu"), torch.float32) for _ in range(2)
    )
    round_decoder(changed, Format.parse("8:16-bf16"))
    return full, changed


def logits_of(decoder: Decoder, ids: tuple[int, ...]) -> torch.Tensor:
    attention = DenseAttention(decoder.config, [len(ids)])
    with torch.inference_mode():
        hidden = decoder(torch.tensor(ids), torch.arange(len(ids)), attention)
        return decoder.logits(hidden).double().log_softmax(-1)


def test_sums_of_a_document(tiny_checkpoint: Checkpoint) -> None:
    full, changed = decoders(tiny_checkpoint("1"))
    draw = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(3, 290, (40,), generator=draw).tolist())
    (found,) = score(full, changed, [Document("en", ids, start=5)])
    theirs, ours = logits_of(full, ids), logits_of(changed, ids)
    places = range(5, 40)
    assert found.tokens == 35
    assert found.original == pytest.approx(-sum(float(theirs[i - 1, ids[i]]) for i in places))
    assert found.compressed == pytest.approx(-sum(float(ours[i - 1, ids[i]]) for i in places))
    kl = torch.nn.functional.kl_div(ours[4:-1], theirs[4:-1], log_target=True, reduction="sum")
    assert found.divergence == pytest.approx(float(kl)) and found.divergence > 0
    assert found.agreed == int((theirs.argmax(-1) == ours.argmax(-1))[4:-1].sum())


def test_the_same_model_twice(tiny_checkpoint: Checkpoint) -> None:
    full, _ = decoders(tiny_checkpoint("3"))
    ids = tuple(range(3, 300))
    (whole,) = summarize(score(full, full, [Document("", ids)]))
    assert whole.ratio == whole.ratio_low == whole.ratio_high == 1
    assert whole.divergence == 0 and whole.agreement == 1 and whole.tokens == 296


def made_up(language: str, count: int, tokens: int, loss: float, more: float) -> list[Scores]:
    draw = torch.Generator().manual_seed(len(language) + count)
    found = []
    for _ in range(count):
        off = float(torch.randn((), generator=draw)) * 0.02
        original = tokens * (loss + off)
        own = original + tokens * (more + off)
        found.append(Scores(language, tokens, original, own, tokens * 0.1, tokens // 2))
    return found


def test_languages_out_of_line() -> None:
    scores = made_up("en", 50, 100, 2.0, 0.02) + made_up("zz", 50, 100, 2.0, 0.2)
    scores += made_up("rare", 3, 20, 2.0, 0.5)
    overall, *languages = summarize(scores)
    assert [each.language for each in languages] == ["rare", "zz", "en"]
    assert [each.out_of_line for each in languages] == [False, True, False]
    assert overall.tokens == 10060 and overall.documents == 103
    tokens = sum(each.tokens for each in scores)
    more = sum(each.compressed - each.original for each in scores) / tokens
    assert overall.ratio == pytest.approx(math.exp(more))
    assert overall.ratio_low < overall.ratio < overall.ratio_high
    assert summarize(scores) == summarize(scores)


def test_nothing_to_predict(tiny_checkpoint: Checkpoint) -> None:
    full, changed = decoders(tiny_checkpoint("1"))
    with pytest.raises(ConfigError, match="document 2"):
        score(full, changed, [Document("", (3, 4)), Document("", (3,))])


def test_ids_that_a_model_lacks(tiny_checkpoint: Checkpoint) -> None:
    """Told before anything is read, also where only the per-layer table is short."""
    whole, _ = decoders(tiny_checkpoint("5"))
    short, _ = decoders(tiny_checkpoint("5-small-table"))
    documents = [Document("", (3, 4)), Document("", (3, 300))]
    told: list[tuple[int, int]] = []
    assert len(score(whole, whole, documents)) == 2
    with pytest.raises(ConfigError, match=r"document 2 has token id 300.*below 300"):
        score(whole, short, documents, lambda *done: told.append(done))
    assert not told
