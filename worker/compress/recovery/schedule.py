"""How long recovery trains, how fast, and when sparsity is where it shall be.

All goes by the share of the run that is done, by its steps or by its time.
"""

import math
from dataclasses import dataclass

from ....kernels.formats import SPAN
from ...errors import ConfigError

OPTIMIZERS = ("adamw", "muon")
_BETWEEN = 20
"""Steps from one choice of survivors to the next."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A run of recovery. Raises ConfigError for what cannot be run."""

    steps: int = 1000
    """Of the optimizer."""
    sequences: int = 32
    """In one step."""
    at_once: int = 8
    """Of them on the device; activations take memory by this."""
    learning_rate: float = 5e-4
    """At its highest: it rises over the first steps and falls to zero, linearly."""
    text_share: float = 0.2
    """Of the loss that is the text itself; the rest is the divergence from the teacher."""
    weight_decay: float = 0.0
    """Of every matrix, times the learning rate, at each step; stored weights with their scales."""
    gradual: float = 0.0
    """Share of the steps over which sparsity rises from none to what is asked for."""
    remap: float = 0.0
    """Share of the run in which it is learned, too, which weights survive."""
    looks: int = 20
    """At the held-out text, evenly spaced; the weights that were best there are kept."""
    patience: int = 5
    """Looks without a better one after which training ends, once sparsity has risen."""
    seed: int = 0
    """Of the order of the sequences."""
    optimizer: str = OPTIMIZERS[0]
    """One of `OPTIMIZERS`; see `optimizers`."""

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "at_once", "looks", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("text_share", "gradual", "remap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"optimizer is {self.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not 0 <= self.learning_rate * self.weight_decay < 1:
            raise ConfigError(
                f"weight_decay is {self.weight_decay}; it must be from 0 to "
                f"{1 / self.learning_rate:.6g}, or a step would take more than there is"
            )

    def rate(self, step: int, done: float) -> float:
        """The learning rate of a step, the first being 0, begun with a share `done` of the run."""
        rising = max((step + 1) / max(1, self.steps // 20), 20 * done)
        return self.learning_rate * min(1.0, rising) * (1 - done)

    def kept(self, done: float, final: int) -> int:
        """Survivors of each 16: falls as a cube, fast at first (Zhu, Gupta, arXiv:1710.01878)."""
        left = 0.0 if done >= self.gradual else (1 - done / self.gradual) ** 3
        return final + math.ceil((SPAN - final) * left)

    def remaps(self, step: int, done: float) -> bool:
        """Whether survivors are chosen anew when so many steps are done."""
        return done < self.remap and step % _BETWEEN == 0

    def looks_by(self, done: float) -> int:
        """How many looks at the held-out text are due."""
        return math.floor(self.looks * done + 1e-9)  # 100 * 0.29 is less than 29
