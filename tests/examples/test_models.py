"""The shipped models on a CPU: each loads, all share a tokenizer, and they are as good as said."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker import Engine
from conclave.worker.compress.quality.report import stored_weights, totals
from conclave.worker.text.tokenizer import Tokenizer
from examples.debian_model.checkpoint import load_model
from examples.debian_model.compressed_card import comparison_table

MODELS = Path(__file__).parents[2] / "examples" / "models"
DENSE = "debian-8m-dense"
SAMPLE = MODELS / DENSE / "heldout.jsonl"
SIZE_LIMIT = 16_000_000
COMPRESSED_LIMIT = 8_000_000
NAMES = sorted(folder.parent.name for folder in MODELS.glob("*/config.json"))
SMALL: dict[str, Any] = {"device": "cpu", "max_context": 2048, "kv_tokens": 8192, "threads": 1}


def spot_check(name: str) -> dict[str, Any]:
    """What the model's evaluation says of every n-th held-out document."""
    evaluation = json.loads((MODELS / name / "evaluation.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = evaluation["sample"]["spot_check"]
    return found


def test_three_shapes_are_shipped() -> None:
    assert NAMES == ["debian-8m", DENSE, "debian-moe-8m", "debian-ple-8m"]


def test_one_tokenizer_serves_all() -> None:
    assert len({Tokenizer(MODELS / name).fingerprint for name in NAMES}) == 1
    assert len({(MODELS / name / "chat_template.jinja").read_bytes() for name in NAMES}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_small_enough_for_git(name: str) -> None:
    size = sum(path.stat().st_size for path in (MODELS / name).glob("*.safetensors"))
    assert 0 < size <= (SIZE_LIMIT if name == DENSE else COMPRESSED_LIMIT)


@pytest.mark.parametrize("name", [name for name in NAMES if name != DENSE])
def test_the_card_has_the_figures(name: str) -> None:
    found = json.loads((MODELS / name / "evaluation.json").read_text(encoding="utf-8"))
    table = comparison_table(found["heldout"], found["one_shot"], found["original"]["heldout"])
    assert table in (MODELS / name / "README.md").read_text(encoding="utf-8")
    overall = found["heldout"]["overall"]["perplexity"]
    assert f"[{name}]({name})" in (shipped := (MODELS / "README.md").read_text(encoding="utf-8"))
    assert f"{overall:.2f}" in shipped


@pytest.mark.parametrize("name", [name for name in NAMES if name != DENSE])
def test_all_but_one_are_sparse(name: str) -> None:
    stored = stored_weights(MODELS / name)
    assert 0.6875 <= totals(stored)["sparsity"] <= 0.7
    assert {each.format.split("-")[1] for each in stored if each.layer is not None} == {"int4"}


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_says_what_transformers_does(name: str) -> None:
    """Token by token, of the weights as they are when written out dense."""
    document = json.loads(SAMPLE.read_text(encoding="utf-8").splitlines()[3])
    with Engine(MODELS / name, **SMALL) as engine:
        ids = engine.model.tokenizer.encode(document["prompt"] + document["text"])
        told = engine.score([], [ids])[0].tokens
        vocabulary = engine.model.vocabulary
    with torch.inference_mode():
        logits = load_model(MODELS / name)(input_ids=torch.tensor([ids])).logits[0, :, :vocabulary]
    expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert [token.logprob for token in told[1:]] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_what_the_evaluation_says(name: str) -> None:
    expected = spot_check(name)
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()[:: expected["every"]]
    with Engine(MODELS / name, **SMALL) as engine:
        encode = engine.model.tokenizer.encode
        loss, count = 0.0, 0
        for document in map(json.loads, lines):
            text = encode(document["text"] + "<eos>", special=False)
            found = engine.score(encode(document["prompt"]), [text])[0]
            loss -= found.logprob
            count += found.scored_tokens
    assert len(lines) == expected["documents"] and count == expected["tokens"]
    assert math.exp(loss / count) == pytest.approx(expected["perplexity"], rel=0.01)
