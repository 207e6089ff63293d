"""The held-out sample beside the dense model: real text to measure all shapes on, in 19 languages.

Given up: languages with few tokens, which stay too small to compare.
"""

from __future__ import annotations

import json
from pathlib import Path

from .corpus import HELD_OUT, Description
from .files import written_by
from .prompts import LANGUAGES, prompt, stable_fraction
from .shapes import DENSE_FOLDER
from .tokenizer import load_tokenizer

FILE_NAME = "heldout.jsonl"
TOKENS_PER_LANGUAGE = 20_000


def write_sample(documents: list[Description], model: Path) -> None:
    """The held-out documents shipped beside the model: up to a number of tokens per language."""
    tokenizer = load_tokenizer(model)
    left = dict.fromkeys(LANGUAGES, TOKENS_PER_LANGUAGE)
    with (model / FILE_NAME).open("w", encoding="utf-8") as stream:
        for document in sorted(documents, key=sample_order):
            count = len(tokenizer.encode(document.text, add_special_tokens=False).ids)
            if count <= left[document.language]:
                left[document.language] -= count
                line = {
                    "language": document.language,
                    "package": document.package,
                    "prompt": prompt(document.package, document.language),
                    "text": document.text,
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def sample_order(document: Description) -> tuple[int, float]:
    """By language, then in an order that depends on the package name alone."""
    language = LANGUAGES.index(document.language)
    return language, stable_fraction(f"sample {document.package}")


def read_sample(model: Path) -> list[Description]:
    """The held-out documents beside the model, or the dense model's where it has none."""
    folder = model if (model / FILE_NAME).exists() else DENSE_FOLDER
    lines = written_by("encode", folder / FILE_NAME).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [
        Description(item["language"], item["package"], HELD_OUT, item["text"]) for item in records
    ]
