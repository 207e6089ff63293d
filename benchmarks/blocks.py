"""Whole parts of a decode step in `benchmarks.kernels`, as one graph against their byte limit.

The linears of a sliding layer of the 31B model in their order, and the experts of a layer of the
26B model. Attention, norms and the router are left out: their bytes are not in the limit either.
What is around the products of experts is a block of its own.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from conclave.kernels.experts import reference

from .contestants import Builder, Contestant, check
from .experts import Stack, bytes_read, check_stack, choices, random_stack
from .shapes import EXPERTS_EACH, STACKS

_SLIDING = ((16384, 5376), (5376, 8192), (43008, 5376), (5376, 21504))
"""q, k and v; o; gate and up; down."""


class Block(NamedTuple):
    """Something to time: launch number i with its own weights."""

    launch: Callable[[int], object]
    launches: int
    nbytes: int
    """That one launch must read."""


def sliding_layer(build: Builder) -> list[Contestant]:
    """The four linears of a kind, with random weights."""
    found = []
    for rows, columns in _SLIDING:
        weight = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
        found.append(next(iter(build(weight))))
    return found


def sliding_block(layer: list[Contestant], tokens: int) -> Block:
    """`layer` for so many tokens, checked."""
    for linear in layer:
        check(linear, tokens)
    qkv, o, gate_up, down = layer
    x, mixed = qkv.activations(tokens), o.activations(tokens)

    def launch(index: int) -> object:
        qkv.multiply(x, index % qkv.copies)
        hidden = o.multiply(mixed, index % o.copies)
        inner = gate_up.gate(hidden, index % gate_up.copies)
        return down.multiply(inner, index % down.copies)

    return Block(launch, 4, sum(linear.nbytes for linear in layer))


def expert_weights() -> tuple[Tensor, Tensor]:
    """Random stacks of gate and up, and of down."""
    first, second = map(random_stack, STACKS)
    return first, second


def expert_block(
    build: Callable[[Tensor, list[Tensor]], Stack], weights: tuple[Tensor, Tensor], tokens: int
) -> Block:
    """Eight experts of each token, weighted and summed; checked.

    Rows come sorted by expert, as `choices` gives them; which token a row belongs to does not
    matter for the time, so that here row i is of token i / 8.
    """
    chosen = choices(tokens, STACKS[0].experts)
    gate_up, down = (build(weight, chosen) for weight in weights)
    x = gate_up.activations(tokens)
    check_stack(gate_up, x, chosen[0])
    check_stack(down, down.activations(tokens), chosen[0])
    shares = torch.rand(tokens, 1, EXPERTS_EACH, dtype=torch.bfloat16, device="cuda")

    def launch(index: int) -> object:
        outputs = down.multiply(gate_up.gate(x, index), index)
        return shares @ outputs.view(tokens, EXPERTS_EACH, -1)

    return Block(launch, len(chosen), bytes_read(gate_up, chosen) + bytes_read(down, chosen))


def routing_block(ops: ModuleType, tokens: int) -> Block:
    """Experts chosen, rows sorted by expert, outputs summed, by the ops of a module; checked."""
    experts, width = STACKS[0].experts, STACKS[0].columns
    # No two of a token are equal: bfloat16 keeps multiples of 1/16 below 8 apart.
    scores = torch.rand(tokens, experts, device="cuda").argsort(-1).to(torch.bfloat16) / 16
    scale = torch.ones(experts, dtype=torch.bfloat16, device="cuda")
    hidden, outputs = (
        torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
        for rows in (tokens, tokens * EXPERTS_EACH)
    )

    def once(ops: ModuleType) -> tuple[Tensor, ...]:
        weights, chosen = ops.choose(scores, scale, EXPERTS_EACH)
        inputs, own, back = ops.dispatch(hidden, chosen)
        return inputs, own, ops.combine(outputs, weights, back)

    torch.testing.assert_close(once(ops), once(reference))
    return Block(lambda _: once(ops), 12, scores.nbytes + hidden.nbytes + outputs.nbytes)
