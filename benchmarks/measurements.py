"""From a weight or a block to rows: check the answer, then time it; tell what went wrong."""

import gc
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from conclave.kernels.experts import reference, routing

from .blocks import (
    Block,
    expert_block,
    expert_weights,
    routing_block,
    sliding_block,
    sliding_layer,
)
from .clock import Launch, Time, launches_over, replayed
from .contestants import CUBLAS, SPARSE, Builder, Contestant, check
from .experts import (
    LAUNCHES,
    Stack,
    bytes_read,
    check_stack,
    choices,
    own_stack,
    random_stack,
    vendor_stack,
)
from .kinds import EVERYWHERE, takes
from .rows import Row, fastest, measured, refused
from .shapes import EXPERTS_EACH, Shape

Timer = Callable[[Launch, int], Time]
_STACKS: dict[str, Callable[[Tensor, list[Tensor]], Stack]] = {
    CUBLAS: vendor_stack,
    SPARSE: own_stack,
}


def rows_of(
    kind: str,
    build: Builder,
    weight: Tensor,
    shape: str,
    tokens: Iterable[int],
    rate: float,
    timer: Timer = replayed,
) -> Iterator[Row]:
    """What one kind does with one weight, at each number of tokens that it takes."""
    try:
        ways = list(build(weight))
    except Exception as fault:
        yield from (refused(kind, shape, count, told(fault)) for count in tokens)
        return
    for count in tokens:
        fitting = [way for way in ways if takes(way, count)]
        if fitting:
            yield fastest([row_of(way, shape, count, rate, timer) for way in fitting])
        del fitting
    del ways
    release()


def row_of(way: Contestant, shape: str, tokens: int, rate: float, timer: Timer) -> Row:
    """Check one way to multiply, then time it."""
    try:
        error = check(way, tokens)
        x = way.activations(tokens)
        launches = launches_over(way.copies, 12 if tokens <= 64 else 6)
        time = timer(lambda index: way.multiply(x, index % way.copies), launches)
    except Exception as fault:
        return refused(way.kind, shape, tokens, told(fault))
    row = measured(way.kind, shape, tokens, time, way.nbytes, rate)
    return {**row, "error": error, "note": way.way}


def stack_rows(shape: Shape, tokens: Iterable[int], rate: float) -> Iterator[Row]:
    """Experts by torch's grouped matmul and by our kernel."""
    weight = random_stack(shape)
    for count in tokens:
        chosen = choices(count, shape.experts)
        for kind, build in _STACKS.items():
            try:
                stack = build(weight, chosen)
                x = stack.activations(count)
                error = check_stack(stack, x, chosen[0])
                time = replayed(partial(stack.multiply, x), LAUNCHES)
            except Exception as fault:
                yield refused(kind, str(shape), count, told(fault))
                continue
            row = measured(kind, str(shape), count, time, bytes_read(stack, chosen), rate)
            yield {**row, "error": error, "note": f"{EXPERTS_EACH} experts a token"}
            del stack
            release()


def block_rows(rate: float) -> Iterator[Row]:
    """Whole layers, each as one graph."""
    for kind, build in EVERYWHERE.items():
        layer = sliding_layer(build)
        for tokens in (1, 8, 64):
            yield block_row("31B layer", kind, tokens, partial(sliding_block, layer), rate)
        del layer
        release()
    weights = expert_weights()
    for kind, builder in _STACKS.items():
        for tokens in (1, 8, 64):
            make = partial(expert_block, builder, weights)
            yield block_row("26B experts", kind, tokens, make, rate)
            release()
    for kind, ops in (("torch", reference), ("kernels", routing)):
        for tokens in (1, 8, 64):
            yield block_row("26B routing", kind, tokens, partial(routing_block, ops), rate)


def block_row(name: str, kind: str, tokens: int, make: Callable[[int], Block], rate: float) -> Row:
    """One block, timed; `limit_us` is what reading its bytes takes at the rate of a copy."""
    row: Row = {"kind": kind, "shape": name, "tokens": tokens}
    measures = ("us", "low", "high", "vs_cublas", "limit_us", "of_limit")
    try:
        block = make(tokens)
        time = replayed(block.launch, block.launches)
    except Exception as fault:
        return {**row, **dict.fromkeys(measures), "note": told(fault)}
    limit = block.nbytes / rate / 1e3
    values = (*time, None, limit, limit / time.median)
    return {**row, **dict(zip(measures, values, strict=True)), "note": ""}


def told(fault: Exception) -> str:
    """An exception in the words of a row."""
    if isinstance(fault, ImportError):
        return "absent"
    first, *_ = str(fault).strip().splitlines() or [""]
    return f"{type(fault).__name__}: {first[:120]}".replace("|", "/")


def release() -> None:
    """Give memory back before the next weights."""
    gc.collect()
    torch.cuda.empty_cache()
