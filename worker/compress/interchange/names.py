"""What a weight of the decoder is called in a Hugging Face checkpoint, and which of its rows.

`worker/weights.py` has the table; here it is read from the decoder's side, where one fused weight
is several tensors of theirs. Written are the names of text-only checkpoints; read are all.
"""

import re
from dataclasses import dataclass

from ...model.config import ModelConfig
from ...weights import FOREIGN, PREFIXES, tensor_map

_HEAD = "lm_head.weight"
_PROJECTION = re.compile(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of theirs: rows [start, start + shape[0]) of a weight of ours."""

    name: str
    """Without the prefix."""
    start: int
    shape: tuple[int, ...]

    @property
    def stored(self) -> str:
        """The name in a text-only checkpoint."""
        return self.name if self.name == _HEAD else f"model.{self.name}"

    @property
    def is_projection(self) -> bool:
        """Whether it is a linear layer that may be quantized: of attention or of the MLP."""
        return _PROJECTION.fullmatch(self.name) is not None


def parts_of(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """The parts of every weight of the decoder, by its name, in the order of their rows."""
    found: dict[str, list[Part]] = {}
    for name, target in tensor_map(config).items():
        found.setdefault(target.parameter, []).append(Part(name, target.start, target.shape))
    return {
        name: tuple(sorted(parts, key=lambda part: part.start)) for name, parts in found.items()
    }


def bare_name(stored: str) -> str | None:
    """A name without its prefix; None if it is of a tower that a text decoder has not."""
    if FOREIGN.match(stored):
        return None
    return stored.removeprefix(next(each for each in PREFIXES if stored.startswith(each)))
