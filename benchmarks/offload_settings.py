"""The models and budgets of the offload benchmark."""

from dataclasses import dataclass

from .random_model import TABLES


@dataclass(frozen=True)
class Setting:
    """One model under one budget."""

    name: str
    format: str | None
    gib: float
    scratch: float
    """GiB set aside for a step."""
    decode: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()
    tables: str = str(TABLES)
    """Format of embeddings, which always stay."""


SETTINGS = (
    Setting("sparse8", "5:16-int4-g128", 8, 0.4, decode=(1, 8, 32), tables="dense-int4-g64"),
    Setting("sparse8p", "5:16-int4-g128", 8, 2.4, prefill=(512, 832, 1024, 1152, 2048)),
    Setting("sparse8c", "5:16-int4-g128", 8, 2.4, prefill=(512, 768, 1024, 2048)),
    Setting("int16", "dense-int4-g128", 16, 0.8, decode=(1, 8, 32)),
    Setting("int16p", "dense-int4-g128", 16, 2.8, prefill=(448, 512, 576, 1024, 2048)),
    Setting("int8", "dense-int4-g128", 8, 0.8, decode=(1, 8, 32)),
    Setting("int16long", "dense-int4-g128", 16, 10.0, prefill=(4096, 8192)),
    Setting("bf24", None, 24, 1.0, decode=(1, 8, 32)),
    Setting("bf16", None, 16, 0.85, decode=(1, 8, 32)),
    Setting("bf8", None, 8, 0.75, decode=(1,)),
)
BALANCE = ("sparse8p", "int16p")
"""Settings whose layers stay plain and are run on demand as well, to find what prefetch gains."""
