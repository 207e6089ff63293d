"""Encoded documents: token ids end to end in arrays, with what is needed to score each document.

A part of the training documents is written as a conversation instead of in the plain form. Given
up: documents that do not fit the model's positions, which are left out rather than cut.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import transformers
from numpy.typing import NDArray

from .architecture import MAXIMUM_POSITIONS
from .corpus import TRAINING, Description
from .files import written_by
from .prompts import LANGUAGES, prompt, question, stable_fraction
from .tokenizer import load_tokenizer

CHAT_SHARE = 0.18  # of the training documents, instead of their plain form
SYSTEM_SHARE = 0.25  # of the chat documents open with a system turn
SYSTEM_TEXT = "You describe Debian packages in the language of the question."


@dataclass(frozen=True)
class Encoded:
    """Documents as token ids, end to end, with what is needed to score each of them."""

    tokens: NDArray[numpy.uint16]  # all documents, one after the other
    ends: NDArray[numpy.int64]  # where each document ends in `tokens`
    prompts: NDArray[numpy.int32]  # tokens before the description
    sizes: NDArray[numpy.int32]  # UTF-8 bytes of the description
    languages: NDArray[numpy.uint8]  # index into LANGUAGES
    plain: NDArray[numpy.bool_]  # False: written as a conversation

    @property
    def starts(self) -> NDArray[numpy.int64]:
        """Where each document begins in `tokens`."""
        return numpy.concatenate([self.ends[:1] * 0, self.ends[:-1]])

    def save(self, path: Path) -> None:
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        numpy.savez_compressed(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Encoded:
        with numpy.load(written_by("encode", path)) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    def spread(self, count: int) -> Encoded:
        """Evenly spaced plain documents out of all, at most `count`."""
        plain = numpy.flatnonzero(self.plain)
        chosen = plain[numpy.linspace(0, len(plain) - 1, min(count, len(plain))).astype(int)]
        pieces = [self.tokens[self.starts[index] : self.ends[index]] for index in chosen]
        return Encoded(
            tokens=numpy.concatenate(pieces),
            ends=numpy.cumsum([len(piece) for piece in pieces], dtype=numpy.int64),
            prompts=self.prompts[chosen],
            sizes=self.sizes[chosen],
            languages=self.languages[chosen],
            plain=self.plain[chosen],
        )


@dataclass(frozen=True)
class Frame:
    """What stands before and after a description; `plain` unless that is a conversation."""

    before: str
    after: str
    plain: bool


def frame_of(document: Description, render: Any) -> Frame:
    """The document's frame, always the same one; only training documents become conversations."""
    chance = stable_fraction(f"chat {document.language} {document.package}")
    if document.split != TRAINING or chance >= CHAT_SHARE:
        return Frame("<bos>" + prompt(document.package, document.language), "<eos>", True)
    asked = {"role": "user", "content": question(document.language, document.package)}
    system = {"role": "system", "content": SYSTEM_TEXT}
    messages = [system, asked] if chance < CHAT_SHARE * SYSTEM_SHARE else [asked]
    opening = render(messages, tokenize=False, add_generation_prompt=True)
    return Frame(opening, "<turn|>\n", False)


def encode_documents(documents: list[Description], model: Path) -> Encoded:
    """Token ids of all documents that fit the model's positions, in the order given."""
    render: Any = transformers.AutoTokenizer.from_pretrained(model).apply_chat_template
    frames = [frame_of(document, render) for document in documents]
    before = token_ids([frame.before for frame in frames], model)
    text = token_ids([document.text for document in documents], model)
    after = token_ids([frame.after for frame in frames], model)
    parts = zip(before, text, after, strict=True)
    whole = [[*first, *middle, *last] for first, middle, last in parts]
    kept = [index for index, ids in enumerate(whole) if len(ids) <= MAXIMUM_POSITIONS]
    languages = [LANGUAGES.index(document.language) for document in documents]
    return Encoded(
        tokens=numpy.concatenate([numpy.array(whole[index], numpy.uint16) for index in kept]),
        ends=numpy.cumsum([len(whole[index]) for index in kept], dtype=numpy.int64),
        prompts=numpy.array([len(before[index]) for index in kept], numpy.int32),
        sizes=numpy.array([len(documents[index].text.encode()) for index in kept], numpy.int32),
        languages=numpy.array([languages[index] for index in kept], numpy.uint8),
        plain=numpy.array([frames[index].plain for index in kept], numpy.bool_),
    )


def token_ids(texts: list[str], model: Path) -> list[list[int]]:
    found = load_tokenizer(model).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in found]
