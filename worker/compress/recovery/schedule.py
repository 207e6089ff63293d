"""How long recovery trains, how fast, and when sparsity is where it shall be."""

import math
from dataclasses import dataclass

from ....kernels.formats import SPAN
from ...errors import ConfigError


@dataclass(frozen=True, slots=True)
class Schedule:
    """A run of recovery. Raises ConfigError for what cannot be run."""

    steps: int = 1000
    """Of the optimizer."""
    sequences: int = 32
    """In one step."""
    at_once: int = 8
    """Of them on the device; activations take memory by this."""
    learning_rate: float = 1e-3
    """At its highest: it rises over the first steps and falls to zero, linearly."""
    text_share: float = 0.2
    """Of the loss that is the text itself; the rest is the divergence from the teacher."""
    gradual: float = 0.0
    """Share of the steps over which sparsity rises from none to what is asked for."""
    looks: int = 20
    """At the held-out text, evenly spaced; the weights that were best there are kept."""
    patience: int = 5
    """Looks without a better one after which training ends, once sparsity has risen."""
    seed: int = 0
    """Of the order of the sequences."""

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "at_once", "looks", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("text_share", "gradual"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be above 0")

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        rising = (step + 1) / max(1, self.steps // 20)
        return self.learning_rate * min(1.0, rising) * (1 - step / self.steps)

    def kept(self, step: int, final: int) -> int:
        """Survivors of each 16: falls as a cube, fast at first (Zhu, Gupta, arXiv:1710.01878)."""
        rising = self.gradual * self.steps
        left = 0.0 if step >= rising else (1 - step / rising) ** 3
        return final + math.ceil((SPAN - final) * left)

    def is_look(self, step: int) -> bool:
        """Whether the held-out text is looked at when so many steps are done."""
        marks = self.looks * step // self.steps, self.looks * (step - 1) // self.steps
        return step > 0 and marks[0] > marks[1]
