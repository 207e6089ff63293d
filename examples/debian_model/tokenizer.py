"""The tokenizer: byte-level BPE, learned from the training text with every language capped.

Given up: normalisation (bytes go in as they are) and splitting words before merging.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from .architecture import BOS, MAXIMUM_POSITIONS, SPECIAL_TOKENS, VOCABULARY_SIZE
from .corpus import TRAINING, Description
from .files import write_json, written_by
from .prompts import LANGUAGES, prompt

BYTES_PER_LANGUAGE = 5_000_000

TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "bos_token": "<bos>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<eos>",
    "model_max_length": MAXIMUM_POSITIONS,
    "pad_token": "<pad>",
    "padding_side": "left",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
}


def learn_tokenizer(documents: Iterator[Description]) -> tokenizers.Tokenizer:
    """Byte-level BPE over the training text, every language capped so that none drowns.

    Each line break is a token of its own: a prompt that ends in line breaks is then cut into the
    same tokens alone as in front of its description.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    line_break = tokenizers.pre_tokenizers.Split(tokenizers.Regex("\n"), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([line_break, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(balanced_text(documents), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def balanced_text(documents: Iterator[Description]) -> Iterator[str]:
    """Plain training documents, up to the same number of bytes in every language."""
    left = dict.fromkeys(LANGUAGES, BYTES_PER_LANGUAGE)
    for document in documents:
        if document.split == TRAINING and left[document.language] > 0:
            left[document.language] -= len(document.text.encode())
            yield prompt(document.package, document.language) + document.text


def load_tokenizer(model: Path) -> tokenizers.Tokenizer:
    path = written_by("tokenizer", model / "tokenizer.json")
    return tokenizers.Tokenizer.from_file(str(path))


def save_tokenizer(tokenizer: tokenizers.Tokenizer, model: Path) -> None:
    """Write the tokenizer and the configuration that transformers wants beside it."""
    model.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(model / "tokenizer.json"))
    write_json(model / "tokenizer_config.json", TOKENIZER_CONFIG)
