"""Who takes part in `benchmarks.kernels`, and their kernels compiled ahead by many processes."""

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from os import sched_getaffinity

import torch

from .contestants import (
    CUBLAS,
    DENSE4,
    DENSE8,
    GEMLITE,
    INT8,
    SEMI_SPARSE,
    SPARSE,
    TORCHAO,
    Builder,
    Contestant,
    cublas,
    int8,
    ours,
    semi_sparse,
)
from .peers import gemlite, torchao
from .shapes import Shape

EVERYWHERE: dict[str, Builder] = {
    CUBLAS: cublas,
    SPARSE: ours(SPARSE),
    DENSE4: ours(DENSE4),
    DENSE8: ours(DENSE8),
}
"""Measured at every shape."""
HEADLINE_ONLY: dict[str, Builder] = {
    INT8: int8,
    SEMI_SPARSE: semi_sparse,
    GEMLITE: gemlite,
    TORCHAO: torchao,
}
"""Measured at the headline shape, or with `--all` everywhere."""
_GEMLITE_TOKENS = (1, 8, 64, 256)
"""It compiles some twenty kernels for each."""


def takes(way: Contestant, tokens: int) -> bool:
    """Whether it is measured at so many tokens."""
    fewest, most = way.tokens
    return fewest <= tokens <= most and (way.kind != GEMLITE or tokens in _GEMLITE_TOKENS)


def warm(shape: Shape, tokens: Iterable[int], peers: bool) -> None:
    """Have every kernel of `shape` compiled into Triton's cache, for which one process is slow."""
    kinds = (SPARSE, DENSE4, DENSE8, GEMLITE) if peers else (SPARSE, DENSE4, DENSE8)
    units = [(kind, shape, count) for kind, count in product(reversed(kinds), tokens)]
    workers = min(12, len(sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_touch, units):
            pass


def _touch(unit: tuple[str, Shape, int]) -> None:
    """Multiply once; what goes wrong here is told by the measurement itself."""
    kind, shape, tokens = unit
    if kind == GEMLITE and tokens not in _GEMLITE_TOKENS:
        return
    try:
        weight = torch.randn(shape.rows, shape.columns, dtype=torch.bfloat16, device="cuda")
        for way in (EVERYWHERE | HEADLINE_ONLY)[kind](weight):
            if takes(way, tokens):
                way.multiply(way.activations(tokens), 0)
        torch.cuda.synchronize()
    except Exception:
        return
    finally:
        torch.cuda.empty_cache()
