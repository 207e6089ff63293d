"""Stacks of experts in `benchmarks.kernels`: eight of 128 weights for each token, chosen anew."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from conclave.kernels.formats import Format
from conclave.kernels.layouts import pack, unpack
from conclave.kernels.linear import grouped_linear

from .contestants import CUBLAS, OURS, SPARSE, copied, gate_of, relative_error
from .shapes import EXPERTS_EACH, Shape, group_of

LAUNCHES = 16
"""Choices made ahead: at one token, they are all 128 experts."""
MOST_ERROR = 3e-3
COPIES = 4
"""Of a stack, taken in turn, so that an expert chosen twice in a row is not in the L2 cache."""


@dataclass(frozen=True)
class Stack:
    """One way to multiply by a stack of weights."""

    kind: str
    nbytes: int
    """Of one expert."""
    truth: Callable[[int], Tensor]
    """The dense weight [R, K] of an expert."""
    multiply: Callable[[Tensor, int], Tensor]
    """(x [tokens * 8, K], number of a choice) to [tokens * 8, R]."""
    gate: Callable[[Tensor, int], Tensor]
    """gelu(gate) * input, to [tokens * 8, R/2]."""

    def activations(self, tokens: int) -> Tensor:
        """Random bfloat16 [tokens * 8, K]."""
        shape = (tokens * EXPERTS_EACH, self.truth(0).shape[1])
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def choices(tokens: int, experts: int, device: str = "cuda") -> list[Tensor]:
    """For each launch the experts, int32 [tokens * 8], of eight different ones a token, ascending.

    Ascending order is what a grouped matmul needs; a router gets it by sorting.
    """
    if tokens == 1 and experts >= LAUNCHES * EXPERTS_EACH:
        order = torch.randperm(experts, device=device)[: LAUNCHES * EXPERTS_EACH]
        found = order.view(LAUNCHES, EXPERTS_EACH)
    else:
        draws = torch.rand(LAUNCHES, tokens, experts, device=device)
        found = draws.topk(EXPERTS_EACH, dim=-1).indices.flatten(1)
    return list(found.sort(dim=1).values.to(torch.int32))


def own_stack(weight: Tensor, chosen: list[Tensor]) -> Stack:
    """Our 5:16 int4."""
    packed = pack(weight, Format.parse(f"{OURS[SPARSE]}-g{group_of(weight.shape[2])}"))
    copies = copied(packed, COPIES)
    return Stack(
        SPARSE,
        packed.nbytes // weight.shape[0],
        lambda expert: unpack(packed.expert(expert)),
        lambda x, choice: grouped_linear(x, copies[choice % COPIES], chosen[choice]),
        lambda x, choice: grouped_linear(x, copies[choice % COPIES], chosen[choice], gated=True),
    )


def vendor_stack(weight: Tensor, chosen: list[Tensor]) -> Stack:
    """bfloat16 by torch's grouped matmul."""
    copies = [weight.clone().transpose(1, 2) for _ in range(COPIES)]
    numbers = torch.arange(weight.shape[0], device=weight.device, dtype=torch.int32)
    ends = [torch.searchsorted(own, numbers, right=True).to(torch.int32) for own in chosen]

    def multiply(x: Tensor, choice: int) -> Tensor:
        product: Tensor = torch._grouped_mm(x, copies[choice % COPIES], offs=ends[choice])
        return product

    return Stack(
        CUBLAS,
        weight[0].nbytes,
        lambda expert: weight[expert],
        multiply,
        lambda x, choice: gate_of(multiply(x, choice)),
    )


def random_stack(shape: Shape) -> Tensor:
    """bfloat16 [E, R, K] on the card."""
    size = (shape.experts, shape.rows, shape.columns)
    return torch.randn(size, dtype=torch.bfloat16, device="cuda")


def check_stack(stack: Stack, x: Tensor, experts: Tensor) -> float:
    """The relative error of the first choice, `experts`, against float64."""
    answer = stack.multiply(x, 0)
    wanted = torch.empty(answer.shape, dtype=torch.float64, device=x.device)
    for expert in experts.unique().tolist():
        own = experts == expert
        wanted[own] = x[own].double() @ stack.truth(expert).double().T
    return relative_error(answer, wanted, MOST_ERROR)


def bytes_read(stack: Stack, chosen: list[Tensor]) -> int:
    """Bytes of the experts that a launch must read, on average over the choices."""
    return stack.nbytes * sum(len(own.unique()) for own in chosen) // len(chosen)
