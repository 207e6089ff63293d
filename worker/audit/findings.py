"""What an audit finds: of each layer, of each cache group, of a whole model at one error allowed.

All of it are plain numbers. Bytes are counted as if every token that was read lay in the cache; of
the pool of second digits, the rows that were needed. What it gave up: windows, past which an engine
forgets the tokens of sliding layers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...kernels.attention.cache import KVFormat
from ..compress.quality.evaluation import Summary
from ..model.config import CacheGroup
from ..narrow import second_share
from .counting import ErrorCount, Errors, errors_of, relative_errors
from .storing import Reading, TokenBytes

SIDES = ("key", "value")
PLAIN = 2
"""Bytes of a number in bfloat16."""


@dataclass(frozen=True, slots=True)
class LayerFinding:
    """One layer that owns keys and values."""

    layer: int
    stored: str
    """`both`, keys and values; or `values`, of which keys are made."""
    key: Errors
    value: Errors
    widths: dict[str, int]
    """Heads of tokens by the bits of a number: of one digit, and of two."""
    second: float
    """The share of them with two."""
    failed: int
    """Tokens of which the store itself says that they are not near enough."""
    claimed: float
    """The largest error by the store's own account; NaN is not in it."""


@dataclass(frozen=True, slots=True)
class GroupFinding:
    """The layers that share a pool. Bytes are those of a token in all of them."""

    window: int | None
    layers: tuple[int, ...]
    format: str
    codes: float
    scales: float
    indices: float
    pool: float
    """Of the rows that were needed, with their places in the list of free ones."""
    bytes: float
    plain_bytes: float
    """Keys and values in bfloat16."""
    saving: float
    rows: int
    """Of the pool, that were needed."""
    share: float
    """Those to all heads of tokens."""
    most: float
    """That share in the document where it was largest."""
    allotted: float
    """The share for which an engine makes room."""
    short: int
    """Rows that an engine would have lacked, had its cache been full of these documents."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A whole model at one error allowed."""

    max_error: float
    held: bool
    """Nothing is above it, nothing failed, and no pool was short."""
    errors: Errors
    """Of every key and value of every token, layer and head."""
    widths: dict[str, int]
    second: float
    failed: int
    short: int
    bytes: float
    plain_bytes: float
    saving: float
    groups: tuple[GroupFinding, ...]
    layers: tuple[LayerFinding, ...]
    languages: tuple[Summary, ...]
    """What it does to predictions: all documents, then each language. None where none were made."""


class LayerCount:
    """Counts what one layer stores, document after document."""

    def __init__(self, layer: int, format: KVFormat, max_error: float) -> None:
        self.layer = layer
        self.format = format
        self.max_error = max_error
        self.sides = [ErrorCount(max_error, layer, side) for side in SIDES]
        self.heads: list[int] = []
        """Of tokens, of each document."""
        self.wide: list[int] = []
        """Those with a second digit."""
        self.failed = 0
        self.claimed = 0.0
        self.bytes = TokenBytes(0, 0, 0, 0)

    def add(self, reading: Reading, document: int) -> None:
        """One document's tokens."""
        for count, exact, read in zip(self.sides, reading.exact, reading.read, strict=True):
            count.add(relative_errors(exact, read), document)
        self.heads.append(reading.wide.numel())
        self.wide.append(int(reading.wide.sum()))
        self.failed += int(reading.failed.sum())
        self.claimed = max(self.claimed, reading.claimed)
        self.bytes = reading.bytes

    @property
    def found(self) -> LayerFinding:
        """Of all documents."""
        widths, second = _widths([self])
        return LayerFinding(
            layer=self.layer,
            stored="both" if self.format.pairs is None else "values",
            key=errors_of(self.sides[:1]),
            value=errors_of(self.sides[1:]),
            widths=widths,
            second=second,
            failed=self.failed,
            claimed=self.claimed,
        )


def finding(
    groups: Sequence[CacheGroup], counts: Mapping[int, LayerCount], languages: Iterable[Summary]
) -> Finding:
    """All that was counted of the layers of these groups, with one error allowed."""
    layers = [counts[index] for group in groups for index in group.layers]
    of_groups = tuple(
        _group(group.window, [counts[index] for index in group.layers]) for group in groups
    )
    errors = errors_of([side for layer in layers for side in layer.sides])
    failed, short = sum(each.failed for each in layers), sum(each.short for each in of_groups)
    size, plain = sum(e.bytes for e in of_groups), sum(e.plain_bytes for e in of_groups)
    widths, second = _widths(layers)
    return Finding(
        max_error=layers[0].max_error,
        held=not (errors.above or failed or short),
        errors=errors,
        widths=widths,
        second=second,
        failed=failed,
        short=short,
        bytes=size,
        plain_bytes=plain,
        saving=1 - size / plain,
        groups=of_groups,
        layers=tuple(each.found for each in sorted(layers, key=lambda each: each.layer)),
        languages=tuple(languages),
    )


def _group(window: int | None, layers: Sequence[LayerCount]) -> GroupFinding:
    format, max_error = layers[0].format, layers[0].max_error
    heads, rows = (_sums(layers, name) for name in ("heads", "wide"))
    tokens = sum(layers[0].heads) / format.kv_heads
    codes = sum(layer.bytes.codes for layer in layers)
    scales = sum(layer.bytes.scales for layer in layers)
    indices = sum(layer.bytes.indices for layer in layers)
    pool = sum(rows) * layers[0].bytes.row / tokens
    plain = len(layers) * 2 * format.kv_heads * format.head_dim * PLAIN
    size, share = codes + scales + indices + pool, second_share(format, max_error)
    return GroupFinding(
        window=window,
        layers=tuple(layer.layer for layer in layers),
        format=_named(format),
        codes=codes,
        scales=scales,
        indices=indices,
        pool=pool,
        bytes=size,
        plain_bytes=plain,
        saving=1 - size / plain,
        rows=sum(rows),
        share=sum(rows) / sum(heads),
        most=max(own / all_of_it for own, all_of_it in zip(rows, heads, strict=True)),
        allotted=share,
        short=max(0, sum(rows) - math.ceil(share * sum(heads))),
    )


def _sums(layers: Sequence[LayerCount], name: str) -> list[int]:
    """Of each document, over the layers."""
    return [sum(own) for own in zip(*(getattr(layer, name) for layer in layers), strict=True)]


def _widths(layers: Sequence[LayerCount]) -> tuple[dict[str, int], float]:
    """Heads of tokens by bits, and the share of those with two digits."""
    widths: dict[str, int] = {}
    for layer in layers:
        bits, wide = layer.format.bits, sum(layer.wide)
        for width, count in ((bits, sum(layer.heads) - wide), (2 * bits, wide)):
            widths[str(width)] = widths.get(str(width), 0) + count
    wide = sum(sum(layer.wide) for layer in layers)
    return widths, wide / sum(sum(layer.heads) for layer in layers)


def _named(format: KVFormat) -> str:
    sides = "keys and values" if format.pairs is None else "values"
    return f"{sides}, int{format.bits}, {format.kv_heads} x {format.head_dim}"
