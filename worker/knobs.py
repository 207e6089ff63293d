"""The knobs: how much of a model is kept, and what it may take.

The same words for `conclave compress`, an engine, a fleet file and a request; docs/knobs.md has the
table of who takes which. None leaves a thing as it is. Nothing here needs torch, and a format goes
by its name, so that settings and requests are checked where no model is.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from .errors import InvalidRequest, Violation
from .precision import Precision

MOST_SPARSITY = 0.75
"""What 4:16 prunes."""
WEIGHT_BITS = (4, 8, 16)
MOST_GIB = 2.0**20
"""Of any memory: more is a mistake, and would not even be a number of bytes."""
MOST_AHEAD, AHEAD = 8, 2
"""Layers that are copied ahead of the one that runs: at most, and by default. Two, with a slot
for each layer beside them, keep the link busy although copies take longer at times."""
LEAST_ERROR, MOST_ERROR = 0.001, 0.5
"""Less is hardly more than what bfloat16 itself is off; more would keep nothing."""
GROUP = 64
"""Columns that share a scale: 64 divides the widths of every Gemma 4, 128 not."""
WORKERS_OWN = ("memory_budget", "prefetch")
"""Knobs that are no business of a request."""
_SPAN = 16
"""Weights of which so many are pruned."""
_ROUNDING = 1e-6
"""What averages of many weights may differ by."""


class Knobs(BaseModel):
    """How much of a model is kept, and what it may take.

    Of a request it is the least that the answering worker must keep.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    sparsity: float | None = None
    """The fraction of the large weights (attention, MLP, experts) that is pruned, on average."""
    weight_bits: int | None = None
    """Bits of a large weight's value: 4, 8, or 16 for exact bfloat16."""
    max_error: float | None = None
    """||x - stored|| / ||x|| at most, of every key and value of every token, layer and head: they
    are then stored in narrow numbers. None stores them in the model's dtype."""
    memory_budget: float | str | None = None
    """What weights, KV cache and workspace of a worker may take together: GiB, or a share of the
    device's memory such as "60%"."""
    prefetch: bool | int | None = None
    """Whether weights that do not fit `memory_budget` are copied while other layers run, or how
    many layers ahead; False copies each when it is needed. None is True."""

    @field_validator("sparsity")
    @classmethod
    def _can_be_pruned(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value <= MOST_SPARSITY:
            raise ValueError(f"must be 0 to {MOST_SPARSITY}, the fraction that is pruned")
        return value

    @field_validator("weight_bits")
    @classmethod
    def _are_stored(cls, value: int | None) -> int | None:
        if value not in (None, *WEIGHT_BITS):
            raise ValueError(f"choose one of {', '.join(map(str, WEIGHT_BITS))}")
        return value

    @field_validator("max_error")
    @classmethod
    def _can_be_promised(cls, value: float | None) -> float | None:
        if value is not None and not LEAST_ERROR <= value <= MOST_ERROR:
            raise ValueError(f"must be {LEAST_ERROR} to {MOST_ERROR}, relative to the vector")
        return value

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _is_a_size(cls, value: object) -> object:
        if value is None:
            return None
        text = "" if isinstance(value, bool) else str(value)
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = math.nan
        if not 0 < number <= (100 if text.endswith("%") else MOST_GIB):
            raise ValueError('give GiB, such as 12.5, or a share of the memory, such as "60%"')
        return value if text.endswith("%") else number

    @field_validator("prefetch")
    @classmethod
    def _is_a_depth(cls, value: bool | int | None) -> bool | int | None:
        if value is not None and not 0 <= value <= MOST_AHEAD:
            raise ValueError(f"must be true, false, or 0 to {MOST_AHEAD} layers ahead")
        return value

    @classmethod
    def checked(cls, fields: Mapping[str, object]) -> Self:
        """Of a request's plain fields; raises InvalidRequest that names every field at fault."""
        try:
            found = cls.model_validate(dict(fields))
        except ValidationError as error:
            raise InvalidRequest([*_violations(error)]) from None
        own = [name for name in WORKERS_OWN if getattr(found, name) is not None]
        if own:
            text = "is a worker's: set it in its `engine`"
            raise InvalidRequest([Violation(f"knobs.{name}", text) for name in own])
        return found

    @property
    def kept(self) -> int | None:
        """N of N:16, the most that prunes as much as `sparsity`; 16 if that is 0."""
        return None if self.sparsity is None else math.floor(_SPAN * (1 - self.sparsity))

    @property
    def weight_format(self) -> str | None:
        """The name of the format of a large weight; None if it stays a plain tensor."""
        kept, bits = self.kept or _SPAN, self.weight_bits or 16
        if kept == _SPAN:
            return None if bits == 16 else f"dense-int{bits}-g{GROUP}"
        return f"{kept}:{_SPAN}-bf16" if bits == 16 else f"{kept}:{_SPAN}-int{bits}-g{GROUP}"

    def budget(self, memory: int) -> int | None:
        """`memory_budget` in bytes, on a device with so much memory."""
        if isinstance(self.memory_budget, str):
            return int(memory * float(self.memory_budget.removesuffix("%")) / 100)
        return None if self.memory_budget is None else int(self.memory_budget * 2**30)

    @property
    def ahead(self) -> int:
        """Layers that are copied ahead of the one that runs; 0 copies each when it is needed."""
        return AHEAD if self.prefetch is None or self.prefetch is True else int(self.prefetch)

    def limits_broken(self, found: Precision) -> list[Violation]:
        """Why weights of such precision must not answer a request with these knobs."""
        broken = []
        if self.sparsity is not None and found.sparsity > self.sparsity + _ROUNDING:
            text = f"is at most {self.sparsity:g}, but the weights here are pruned to"
            broken.append(Violation("knobs.sparsity", f"{text} {found.sparsity:.3f}"))
        if self.weight_bits is not None and found.weight_bits < self.weight_bits:
            text = f"is at least {self.weight_bits}, but the weights here have {found.weight_bits}"
            broken.append(Violation("knobs.weight_bits", text))
        if self.max_error is not None and found.kv_error > self.max_error:
            text = f"is {self.max_error:g}, but keys and values here can be kept within"
            broken.append(Violation("knobs.max_error", f"{text} {found.kv_error:.3g} at best"))
        return broken

    def misses(self, found: Precision) -> list[str]:
        """In what weights of such precision are not what these knobs make of a model."""
        missed = []
        if self.sparsity is not None:
            more = found.sparsity - self.sparsity
            if not -_ROUNDING <= more < 1 / _SPAN:
                text = f"sparsity is {self.sparsity:g} and its weights have"
                missed.append(f"{text} {found.sparsity:.3f}")
        if self.weight_bits is not None and min(found.weight_bits, 16) != self.weight_bits:
            text = f"weight_bits is {self.weight_bits} and its weights have"
            missed.append(f"{text} {found.weight_bits}")
        return missed

    def __str__(self) -> str:
        """As limits of a request."""
        parts = [] if self.sparsity is None else [f"sparsity at most {self.sparsity:g}"]
        parts += [] if self.weight_bits is None else [f"weight_bits at least {self.weight_bits}"]
        parts += [] if self.max_error is None else [f"max_error at most {self.max_error:g}"]
        return ", ".join(parts)


def _violations(error: ValidationError) -> Iterator[Violation]:
    for each in error.errors():
        name = ".".join(["knobs", *map(str, each["loc"][:1])])
        if each["type"] == "extra_forbidden":
            known = "sparsity, weight_bits and max_error"
            yield Violation(name, f"is unknown; a request may have {known}")
        else:
            text = each["msg"].removeprefix("Value error, ")
            yield Violation(name, f"{text} (got {each['input']!r})")
