"""What multiplies in `benchmarks.kernels`: our formats, the vendor's libraries, other projects.

Each has enough copies of its weight to pass the L2 cache, and the dense weight that it stands for,
which its answers are checked against.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conclave.kernels.formats import Format, PackedWeight, from_tensors
from conclave.kernels.layouts import pack, unpack
from conclave.kernels.linear import gated_linear, linear

from .clock import copies_past_cache
from .shapes import group_of

SPARSE, DENSE4, DENSE8 = "5:16 int4", "dense int4", "dense int8"
CUBLAS, INT8, SEMI_SPARSE = "cublas bf16", "cublas int8", "cusparselt 2:4"
GEMLITE, TORCHAO = "gemlite int4", "torchao int4"
OURS = {SPARSE: "5:16-int4", DENSE4: "dense-int4", DENSE8: "dense-int8"}
"""Format of each kind of our own, less its group."""


@dataclass(frozen=True)
class Contestant:
    """One way to multiply by a weight; the fastest of those of a kind counts."""

    kind: str
    way: str
    nbytes: int
    """Of one copy of the weight, as it is read."""
    truth: Tensor
    """The dense weight [R, K] that the copies stand for."""
    copies: int
    multiply: Callable[[Tensor, int], Tensor]
    """(x [tokens, K], number of a copy) to [tokens, R]."""
    gated: Callable[[Tensor, int], Tensor] | None = None
    """The same with rows as pairs of gate and input, if it does that itself."""
    dtype: torch.dtype = torch.bfloat16
    """Of x."""
    most_error: float = 3e-3
    tokens: tuple[int, int] = (1, 1 << 20)
    """The fewest and the most that it takes."""

    def activations(self, tokens: int) -> Tensor:
        """Random [tokens, K] of its dtype."""
        shape, device = (tokens, self.truth.shape[1]), self.truth.device
        if self.dtype == torch.int8:
            return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        return torch.randn(shape, device=device, dtype=self.dtype)

    def gate(self, x: Tensor, copy: int) -> Tensor:
        """gelu(gate) * input, [tokens, R/2]."""
        return self.gated(x, copy) if self.gated else gate_of(self.multiply(x, copy))


def gate_of(both: Tensor) -> Tensor:
    """gelu(gate) * input of [tokens, gate and input]."""
    gate, up = both.chunk(2, -1)
    return F.gelu(gate, approximate="tanh").mul_(up)


class WrongAnswer(Exception):
    """Further from the truth than rounding explains; such a kernel gets no time."""


def relative_error(answer: Tensor, wanted: Tensor, most: float) -> float:
    """|answer - wanted| / |wanted| (2-norms); `WrongAnswer` if that is more than `most`, or NaN."""
    error = float((answer.double() - wanted).norm() / wanted.norm())
    if not error <= most:
        raise WrongAnswer(f"relative error {error:.2g}")
    return error


def check(contestant: Contestant, tokens: int) -> float:
    """The relative error for fresh random activations, against float64.

    An element that nobody writes shows: freed memory, where the answer will lie, is filled with NaN
    before.
    """
    x = contestant.activations(tokens)
    wanted = x.double() @ contestant.truth.double().T
    torch.full(wanted.shape, torch.nan, dtype=torch.bfloat16, device=x.device)
    return relative_error(contestant.multiply(x, 0), wanted, contestant.most_error)


Builder = Callable[[Tensor], Iterator[Contestant]]
"""Makes what one kind does with a bfloat16 weight [R, K]; ImportError if it is not installed."""


def ours(kind: str) -> Builder:
    """`conclave.kernels.linear` of a packed weight."""

    def build(weight: Tensor) -> Iterator[Contestant]:
        format = Format.parse(f"{OURS[kind]}-g{group_of(weight.shape[1])}")
        first = pack(weight, format)
        copies = copied(first, copies_past_cache(first.nbytes))
        yield Contestant(
            kind,
            str(format),
            first.nbytes,
            unpack(first),
            len(copies),
            lambda x, copy: linear(x, copies[copy]),
            lambda x, copy: gated_linear(x, copies[copy]),
        )

    return build


def copied(weight: PackedWeight, count: int) -> list[PackedWeight]:
    """`count` of the same, each in its own memory."""
    size = (weight.format, weight.rows, weight.columns)
    return [
        from_tensors(*size, {name: tensor.clone() for name, tensor in weight.tensors().items()})
        for _ in range(count)
    ]


def cublas(weight: Tensor) -> Iterator[Contestant]:
    """bfloat16 by torch.mm, and by torch.mv for one token."""
    copies = _clones(weight)
    own = (weight.nbytes, weight, len(copies))
    yield Contestant(CUBLAS, "mm", *own, lambda x, copy: torch.mm(x, copies[copy].t()))
    yield Contestant(
        CUBLAS, "mv", *own, lambda x, copy: torch.mv(copies[copy], x[0])[None], tokens=(1, 1)
    )


def int8(weight: Tensor) -> Iterator[Contestant]:
    """int8 times int8 to int32, no scales: the most that int8 tensor cores give."""
    codes = (weight.float() / weight.abs().amax().float() * 127).round().to(torch.int8)
    copies = _clones(codes)
    yield Contestant(
        INT8,
        "_int_mm",
        codes.nbytes,
        codes,
        len(copies),
        lambda x, copy: torch._int_mm(x, copies[copy].t()),
        dtype=torch.int8,
        most_error=0.0,
        tokens=(32, 1 << 20),
    )


def semi_sparse(weight: Tensor) -> Iterator[Contestant]:
    """Half of the weights, bfloat16, on the sparse tensor cores."""
    if not torch.backends.cusparselt.is_available():
        raise ImportError("cuSPARSELt")
    fours = weight.unflatten(1, (-1, 4))
    weakest = fours.abs().topk(2, dim=-1, largest=False).indices
    pruned = fours.scatter(-1, weakest, 0.0).flatten(1)
    torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = False
    count = copies_past_cache(weight.nbytes * 9 // 16)
    copies: list[Any] = [torch.sparse.to_sparse_semi_structured(pruned) for _ in range(count)]
    yield Contestant(
        SEMI_SPARSE,
        "linear",
        weight.nbytes * 9 // 16,
        pruned,
        count,
        lambda x, copy: F.linear(x, copies[copy]),
        most_error=4e-3,
    )


def _clones(weight: Tensor) -> list[Tensor]:
    return [weight.clone() for _ in range(copies_past_cache(weight.nbytes))]
