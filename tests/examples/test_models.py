"""The shipped models on a CPU: each loads, all share a tokenizer, and they are as good as said."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from conclave.worker import Engine
from conclave.worker.text.tokenizer import Tokenizer

MODELS = Path(__file__).parents[2] / "examples" / "models"
SAMPLE = MODELS / "debian-8m" / "heldout.jsonl"
SIZE_LIMIT = 16_000_000
NAMES = sorted(folder.parent.name for folder in MODELS.glob("*/config.json"))
SMALL: dict[str, Any] = {"device": "cpu", "max_context": 2048, "kv_tokens": 8192, "threads": 1}


def spot_check(name: str) -> dict[str, Any]:
    """What the model's evaluation says of every n-th held-out document."""
    evaluation = json.loads((MODELS / name / "evaluation.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = evaluation["sample"]["spot_check"]
    return found


def test_three_shapes_are_shipped() -> None:
    assert NAMES == ["debian-8m", "debian-moe-8m", "debian-ple-8m"]


def test_one_tokenizer_serves_all() -> None:
    assert len({Tokenizer(MODELS / name).fingerprint for name in NAMES}) == 1
    assert len({(MODELS / name / "chat_template.jinja").read_bytes() for name in NAMES}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_small_enough_for_git(name: str) -> None:
    assert (MODELS / name / "model.safetensors").stat().st_size <= SIZE_LIMIT


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
