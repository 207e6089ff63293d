"""A tokenizer with one token a byte."""

from pathlib import Path

import pytest

from conclave.worker.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(text_checkpoint: Path) -> Tokenizer:
    """Byte b is token 16 + b; <pad> 0, <eos> 1, <bos> 2."""
    return Tokenizer(text_checkpoint)
