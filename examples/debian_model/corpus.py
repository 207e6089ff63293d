"""The corpus: Debian's package descriptions, in nineteen languages, as documents.

A document is one description of one package in one language. Training, validation and held-out
documents are told apart by the hash of the source package, so `foo`, `foo-dev` and `foo-doc`,
which share most of their text, always fall on the same side, in every language.

Given up: languages outside `LANGUAGES`, and the near-duplicates between unrelated packages
(boilerplate paragraphs), which stay in.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .files import written_by
from .package_lists import descriptions, sources
from .prompts import LANGUAGES, stable_fraction

HELD_OUT_SHARE = 0.02
VALIDATION_SHARE = 0.01
TRAINING, VALIDATION, HELD_OUT = "training", "validation", "heldout"


@dataclass(frozen=True)
class Description:
    """One package described in one language; `split` is training, validation or heldout."""

    language: str
    package: str
    split: str
    text: str


def split_of(source: str) -> str:
    """The side on which all packages built from this source stand, in every language."""
    fraction = stable_fraction(source)
    if fraction < HELD_OUT_SHARE:
        return HELD_OUT
    return VALIDATION if fraction < HELD_OUT_SHARE + VALIDATION_SHARE else TRAINING


def build(lists: Path) -> Iterator[Description]:
    """All documents; text left in English or already seen in the language is dropped.

    Training documents are taken first, so a held-out text is never one that was trained on.
    """
    source_of = sources(lists)
    english = descriptions(lists, "en")
    for language in LANGUAGES:
        found = english if language == "en" else descriptions(lists, language)
        seen: set[str] = set()
        for wanted in (TRAINING, VALIDATION, HELD_OUT):
            for package, text in found.items():
                if split_of(source_of.get(package, package)) != wanted or text in seen:
                    continue
                seen.add(text)
                if language == "en" or text != english.get(package):
                    yield Description(language, package, wanted, text)


def write(path: Path, documents: Iterable[Description]) -> int:
    """Write documents as gzipped JSON lines; returns how many."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as stream:
        for document in documents:
            stream.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
            count += 1
    return count


def read(path: Path) -> Iterator[Description]:
    """The documents that `write` wrote."""
    with gzip.open(written_by("corpus", path), "rt", encoding="utf-8") as stream:
        for line in stream:
            yield Description(**json.loads(line))
