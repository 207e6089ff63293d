"""The shapes: three decoders of one size and one tokenizer, each with the recipe that trained it.

They differ in architecture, seed and recipe so that their mistakes differ too: an ensemble is worth
as much as its members disagree. A fourth, `large`, is one dense model of the three's size together:
what an ensemble of them has to beat; only its figures are shipped, in
`examples/models/ensembles.json`. The three are shipped compressed, and the dense one in bfloat16
too. Given up: shipping shapes of more than 16 MB in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from .architecture import CONFIG

MODELS = Path(__file__).parents[1] / "models"
UNSHIPPED = Path("build")
"""Where weights go that stay out of the repository."""
DENSE_FOLDER = MODELS / "debian-8m-dense"
"""Also where the held-out sample lies that all shapes are measured on."""


class ShapeName(StrEnum):
    """What `--shape` takes."""

    DENSE = "dense"
    PLE = "ple"
    MOE = "moe"
    LARGE = "large"


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a training run, apart from the data and the shape.

    The defaults are the dense model's.
    """

    epochs: float = 18
    minutes: float = 60
    row_length: int = 1024
    tokens_per_step: int = 131_072
    learning_rate: float = 6e-3
    weight_decay: float = 2.6
    warmup_steps: int = 200
    evaluations: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Shape:
    """A decoder: in what it differs from the dense one, and how it is trained."""

    folder: Path
    """Where it is trained into."""
    compressed: Path | None
    """What is shipped of it; None if nothing is."""
    changes: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = Recipe()

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return CONFIG | self.changes


def layer_types(pattern: str) -> list[str]:
    """`SSF` as the names of sliding and full layers."""
    names = {"S": "sliding_attention", "F": "full_attention"}
    return [names[kind] for kind in pattern]


SHAPES = {
    ShapeName.DENSE: Shape(DENSE_FOLDER, MODELS / "debian-8m"),
    ShapeName.PLE: Shape(  # after E2B and E4B
        UNSHIPPED / "debian-ple-8m",
        MODELS / "debian-ple-8m",
        {
            "attention_k_eq_v": False,
            "hidden_size": 192,
            "hidden_size_per_layer_input": 64,
            "intermediate_size": 384,
            "num_global_key_value_heads": None,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
        },
        Recipe(epochs=21.1, weight_decay=3.6, seed=1),
    ),
    ShapeName.MOE: Shape(  # after 26B-A4B
        UNSHIPPED / "debian-moe-8m",
        MODELS / "debian-moe-8m",
        {
            "enable_moe_block": True,
            "intermediate_size": 448,
            "layer_types": layer_types("SSSSSF"),
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "sliding_window": 256,
            "top_k_experts": 2,
        },
        Recipe(epochs=15.1, weight_decay=4.0, seed=2),
    ),
    ShapeName.LARGE: Shape(  # the dense one, 1.5 times as wide and as deep
        UNSHIPPED / "debian-23m",
        None,
        {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "layer_types": layer_types("SSFSSFSSF"),
            "num_attention_heads": 6,
            "num_hidden_layers": 9,
        },
        Recipe(epochs=18.5, learning_rate=5e-3, weight_decay=5.0, seed=3),
    ),
}
