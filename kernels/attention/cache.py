"""How keys and values lie in a paged cache of narrow numbers, and how far off they can be.

A head's vector x is stored as digits of `bits` bits under one scale: x is first turned by Hadamard
matrices, which spreads its outliers over all its numbers (Ashkboos et al. 2024, arXiv:2404.00456),
then x' = scale (q1 + q2 scale2 / scale). The first digit q1 is always there; the second, which
stores what the first left over, only for heads of tokens whose error would be too large without it.
Second digits lie in a pool that all layers of a group share. A page, for one layer:

| tensor  | type and shape                                        | bytes of a token's head      |
| ------- | ----------------------------------------------------- | ---------------------------- |
| codes   | uint8 [pages, sides, kv_heads, page_size, width]      | sides width                  |
| scales  | bfloat16 [pages, sides, kv_heads, page_size]          | 2 sides                      |
| second  | int32 [pages, kv_heads, page_size]: row of the pool   | 4                            |

Sides are keys, then values. Where the keys are made of the values (`attention_k_eq_v`: a key is its
value times k_norm's weight, turned by RoPE), only values are stored. Codes are two's complement:
a byte each, or byte i of a head holds number i low and number i + head_dim / 2 high. A row of the
pool has codes [sides, width] and scales [sides]: the second digit of one head of one token, key and
value together. `second` is -1 where there is none.

What it gave up: a scale for groups of numbers, which would take more bytes than rotating takes
time, and widths between one digit and two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import LayoutError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of vectors that kernels store, and of plain caches."""
MOST = 512
"""Numbers of a head."""
NONE = -1
"""In `second`: the first digit is all there is."""
BITS = (8, 4)
STRICT = 1 - 2**-13
"""Errors are held to that much of what is allowed: they are measured in float32."""
_SCALE_SLACK = 1 + 2**-7
"""How much larger than needed a scale is, at most: rounded up to bfloat16."""
_LEAST_SCALE = 2.0**-126
"""The smallest normal number, of bfloat16 too: the reciprocal of one below it may be infinite."""


@dataclass(frozen=True, slots=True)
class KVFormat:
    """The cached numbers of one layer. Raises LayoutError for what cannot be stored."""

    kv_heads: int
    head_dim: int
    """Even."""
    bits: int
    """Of a digit: 8 or 4."""
    pairs: int | None = None
    """Where keys are made of values: how many of the head_dim / 2 pairs (i, i + head_dim / 2)
    RoPE turns, the first ones. None where keys are stored too."""

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.head_dim % 2 or self.kv_heads < 1:
            raise LayoutError(
                f"{self.kv_heads} heads of {self.head_dim} numbers in digits of {self.bits} bits "
                "cannot be stored: digits have 8 or 4 bits, heads an even number of numbers"
            )
        if self.pairs is not None and not 0 <= self.pairs <= self.head_dim // 2:
            raise LayoutError(f"{self.pairs} pairs of {self.head_dim} numbers cannot turn")

    @property
    def sides(self) -> int:
        """Keys and values, or values alone."""
        return 2 if self.pairs is None else 1

    @property
    def limit(self) -> int:
        """The largest magnitude of a digit."""
        return (1 << (self.bits - 1)) - 1

    @property
    def block(self) -> int:
        """Numbers that one Hadamard matrix turns: what turns under RoPE stays by itself."""
        parts = math.gcd(self.head_dim, 2 * self.pairs) if self.pairs else self.head_dim
        return parts & -parts

    @property
    def width(self) -> int:
        """Bytes of a head's digit."""
        return self.head_dim * self.bits // 8

    @property
    def row_bytes(self) -> int:
        """Of one digit of a token's head, with scales."""
        return self.sides * (self.width + 2)

    @property
    def token_bytes(self) -> int:
        """Of a token without second digits."""
        return self.kv_heads * (self.row_bytes + 4)

    @property
    def worst(self) -> float:
        """Most that two digits of any vector can be off, relative to its 2-norm."""
        return _SCALE_SLACK**2 * math.sqrt(self.head_dim) / (4 * self.limit**2)

    def order(self) -> Tensor | None:
        """int64 [head_dim]: in which order columns are stored; None for their own.

        First the `pairs` that RoPE turns (all their first numbers, then all their second ones).
        """
        if not self.pairs:
            return None
        half = self.head_dim // 2
        return torch.cat(
            [
                torch.arange(self.pairs),
                torch.arange(half, half + self.pairs),
                torch.arange(self.pairs, half),
                torch.arange(half + self.pairs, self.head_dim),
            ]
        )


@dataclass(frozen=True, slots=True)
class Overflow:
    """The pool of second digits that the layers of a cache group share.

    `free[: count]` are the rows that nobody has. A row is taken and given back on the device alone.
    """

    codes: Tensor
    """uint8 [rows, sides, width]"""
    scales: Tensor
    """bfloat16 [rows, sides]"""
    free: Tensor
    """int32 [rows]"""
    count: Tensor
    """int32 [1]"""

    @classmethod
    def empty(cls, format: KVFormat, rows: int, device: torch.device) -> "Overflow":
        """A pool of which nothing is taken."""
        shape = (rows, format.sides)
        return cls(
            torch.zeros(*shape, format.width, dtype=torch.uint8, device=device),
            torch.zeros(shape, dtype=torch.bfloat16, device=device),
            torch.arange(rows, dtype=torch.int32, device=device),
            torch.full((1,), rows, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class NarrowCache:
    """The pages of one layer."""

    format: KVFormat
    codes: Tensor
    """uint8 [pages, sides, kv_heads, page_size, width]"""
    scales: Tensor
    """bfloat16 [pages, sides, kv_heads, page_size]"""
    second: Tensor
    """int32 [pages, kv_heads, page_size]"""
    overflow: Overflow
    tally: Tensor
    """int64 [2]: heads of tokens stored so far, and those of them that got a second digit."""
    largest: Tensor
    """float32 [1]: the largest relative error of a head's key or value so far."""

    @classmethod
    def empty(
        cls, format: KVFormat, pages: int, page_size: int, overflow: Overflow
    ) -> "NarrowCache":
        """Pages of zeros, on the device of the pool."""
        device = overflow.codes.device
        shape = (pages, format.sides, format.kv_heads, page_size)
        return cls(
            format,
            torch.zeros(*shape, format.width, dtype=torch.uint8, device=device),
            torch.zeros(shape, dtype=torch.bfloat16, device=device),
            torch.full((pages, format.kv_heads, page_size), NONE, dtype=torch.int32, device=device),
            overflow,
            torch.zeros(2, dtype=torch.int64, device=device),
            torch.zeros(1, device=device),
        )

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return int(self.second.shape[2])


@dataclass(frozen=True, slots=True)
class KeyRule:
    """How the keys of a layer that stores values alone are made of them."""

    weight: Tensor
    """float32 [head_dim]: k_norm's."""
    cosines: Tensor
    """float32 [positions, pairs]"""
    sines: Tensor
    """float32 [positions, pairs]: key[i] = w[i] v[i] cos - w[j] v[j] sin and key[j] = w[j] v[j] cos
    + w[i] v[i] sin, for the pair j = i + head_dim / 2."""


@lru_cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """float32 [size, size], symmetric and its own inverse; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).to(device)


def turned(vectors: Tensor, format: KVFormat) -> Tensor:
    """[..., head_dim] as they are stored: in order, then Hadamard matrices; float32."""
    order = format.order()
    if order is not None:
        vectors = vectors[..., order.to(vectors.device)]
    matrix = hadamard(format.block, vectors.device)
    parts: Tensor = vectors.float().unflatten(-1, (-1, format.block)) @ matrix
    return parts.flatten(-2)


def turned_back(vectors: Tensor, format: KVFormat) -> Tensor:
    """The inverse of `turned`, float32."""
    matrix = hadamard(format.block, vectors.device)
    turned_parts: Tensor = vectors.float().unflatten(-1, (-1, format.block)) @ matrix
    parts = turned_parts.flatten(-2)
    order = format.order()
    if order is None:
        return parts
    back = torch.empty_like(parts)
    back[..., order.to(parts.device)] = parts
    return back


def misfit(device: torch.device, *wanted: tuple[str, Tensor, torch.dtype, Sequence[int]]) -> str:
    """What is wrong with the first tensor that is not contiguous, of this dtype and shape there."""
    for name, own, dtype, shape in wanted:
        if own.dtype != dtype or own.shape != shape:
            return f"{name} is {own.dtype} {tuple(own.shape)}; it must be {dtype} {tuple(shape)}"
        if own.device != device or not own.is_contiguous():
            return f"{name} is not contiguous on {device}"
    return ""


def cache_fault(cache: NarrowCache, rule: KeyRule | None) -> str:
    """What is wrong with the tensors of a cache, or with how its keys are made of values."""
    format, pool, second = cache.format, cache.overflow, cache.second
    if (rule is None) != (format.pairs is None):
        return "keys need a rule where they are made of values, and only there"
    if second.dim() != 3 or format.head_dim > MOST:
        return f"second has {second.dim()} dimensions, not 3; or heads are longer than {MOST}"
    pages, _, page_size = second.shape
    rows, sides, heads = len(pool.free), format.sides, format.kv_heads
    made: list[tuple[str, Tensor, torch.dtype, Sequence[int]]] = []
    if rule is not None and format.pairs is not None:
        table = (len(rule.cosines), format.pairs)
        made = [
            ("weight", rule.weight, torch.float32, (format.head_dim,)),
            ("cosines", rule.cosines, torch.float32, table),
            ("sines", rule.sines, torch.float32, table),
        ]
    return misfit(
        cache.codes.device,
        ("codes", cache.codes, torch.uint8, (pages, sides, heads, page_size, format.width)),
        ("scales", cache.scales, torch.bfloat16, (pages, sides, heads, page_size)),
        ("second", second, torch.int32, (pages, heads, page_size)),
        ("tally", cache.tally, torch.int64, (2,)),
        ("largest", cache.largest, torch.float32, (1,)),
        ("the pool's codes", pool.codes, torch.uint8, (rows, sides, format.width)),
        ("the pool's scales", pool.scales, torch.bfloat16, (rows, sides)),
        ("the pool's free", pool.free, torch.int32, (rows,)),
        ("the pool's count", pool.count, torch.int32, (1,)),
        *made,
    )
