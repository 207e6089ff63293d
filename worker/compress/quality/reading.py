"""What `conclave evaluate` and `conclave audit` read: documents as tokens, plain weights."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import ConfigError
from ...model.config import ModelConfig
from ...model.decoder import Decoder
from ...text.tokenizer import Tokenizer
from ...weights import load_decoder
from ..calibration import Text
from ..reader import is_compressed, load_compressed
from .evaluation import Document


def evenly(texts: Sequence[Text], count: int | None) -> Sequence[Text]:
    """At most `count` texts, spread over all of them; None takes all."""
    step = max(1, len(texts) // (count or len(texts)))
    return texts[::step][: count or len(texts)]


def as_documents(texts: Sequence[Text], tokenizer: Tokenizer, length: int) -> list[Document]:
    """The first `length` tokens of each; those with nothing to predict are left out.

    Raises ConfigError if that are all.
    """
    found = []
    for text in texts:
        prompt = tokenizer.encode(text.prompt) if text.prompt else []
        ids = prompt + tokenizer.encode(text.text, special=not prompt)
        start = max(1, len(prompt))
        if len(ids[:length]) > start:
            found.append(Document(text.language, tuple(ids[:length]), start))
    if not found:
        raise ConfigError(
            f"the text has no document with a token to predict in its first {length}; give longer "
            "text, or raise --length"
        )
    return found


def load_unpacked(
    folder: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> Decoder:
    """The decoder of a plain or a compressed checkpoint, all its weights written out in `dtype`.

    Raises CheckpointError if it cannot be read.
    """
    config = ModelConfig.load(folder)
    if is_compressed(folder):
        return load_compressed(folder, config, device, dtype, packed=False)
    return load_decoder(folder, config, device, dtype)
