"""Attention of one query a sequence over a paged cache, of narrow numbers or plain ones.

out[b, h] = sum over keys j of softmax(query[b, h] keys[j]) values[j], scale 1, for
offsets[b] - window < j <= offsets[b]. Time is that of reading keys and values, each once: all heads
that share a key are rows of one product. A program has a share of a sequence's keys for one of its
key heads (flash decoding); `splits` has what comes before and after.

On NVIDIA's cards 8 bits are multiplied by `decode_mma`, and all else by `decode_tiles`.

Narrow keys stay turned. With q' = f (q1 + q2 / 254) and x' = s c, the score is f s (q1 c + q2 c /
254), sums of whole numbers; out' = sum of p s c, with p s rounded under a running maximum of it, so
that scales never touch codes. A second digit costs the same again, in steps that have one.

Where keys are made of values, the columns that RoPE does not turn are scored as they are (k_norm's
weight is in q'); the 2 P others are turned back by a product with signs, weighted, turned by RoPE
at the key's position, and multiplied by the query's own numbers in float16. Cosines and sines are
read in float16, off by 2^-12: a copy of the rule's tables, made once.

It gave up keys that sequences share, which are read for each of them, and several queries of one
sequence, which `prefill` takes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import KernelInputError
from ..launching.launch import Kernel, Variant
from ..launching.overlap import both_ways, overlap_options, overlaps
from ..launching.targets import KIB, NVIDIA, Target, processors_of, target_of
from ..workspace import PARTIALS, workspace
from .cache import KeyRule, KVFormat, NarrowCache
from .decode_tiles import decode_narrow, decode_plain
from .mma.decode import decode_mma
from .mma.layouts import HEADS, WARPS
from .mma.rows import LISTED, together
from .splits import join_splits, shape_of, splits_of, turn_query
from .store import SHIPPED

PlainCache = tuple[Tensor, Tensor]
"""Keys and values, [pages, page_size, kv_heads, head_dim] each, bfloat16 or float16."""
EVERYTHING = 1 << 30
"""The window of layers without one."""
_LIFTED = 2.0**-14
"""Takes back `decode_tiles.LIFT`."""
_LISTED: int = LISTED.value
_PAGE = 16
"""Tokens of a page, in the bundle."""
_SUMS = ("*fp32", "*fp32")
_QUERIES = (torch.bfloat16, torch.float16, torch.float32)


class Plan(NamedTuple):
    """How programs of decode attention are made."""

    tile: int
    """Keys of a step."""
    chunk: int
    """Columns, of bytes or numbers, of one product."""
    warps: int
    stages: int
    programs: int
    """On a processor at the same time."""
    registers: int | None = None
    """Of a thread at most, so that as many programs fit; None for any number."""


def plan_of(width: int) -> Plan:
    """For heads of `width` bytes of codes, or of so many numbers."""
    chunk = width & -width
    chunk = min(chunk, 128) if chunk >= 32 else max(32, 1 << (width - 1).bit_length())
    return Plan(32, chunk, 4, 2, 2)


def variants() -> Iterator[Variant]:
    """What the bundle holds: bfloat16 queries, pages of 16 tokens, up to 16 heads a key head."""
    for overlap, targets in both_ways():
        yield from _plain_variants(overlap, targets)
        for form in SHIPPED:
            yield from _narrow_variants(form, overlap, targets)


def _plain_variants(overlap: bool, targets: tuple[Target, ...]) -> Iterator[Variant]:
    for dim in (64, 128, 256, 512):
        plan = plan_of(dim)
        types = (*_SUMS, *["*bf16"] * 3, *["*i64"] * 2, *["i32"] * 4)
        constants = _plain(dim, 16, _PAGE, plan, overlap)
        how = plan.warps, plan.stages, targets, _options(overlap)
        yield Variant(decode_plain, types, constants, *how)
        yield _joining(_plain_head(dim, overlap), overlap, targets)


def _narrow_variants(
    form: KVFormat, overlap: bool, targets: tuple[Target, ...]
) -> Iterator[Variant]:
    made = form.pairs is not None
    weight, turns = ("*fp32", "*fp16") if made else ("none", "none")
    query = ("*i8", "*fp16", "*fp32")
    head = _head(form, overlap)
    options = _options(overlap)
    asked = (*query, "*bf16", weight)
    yield Variant(turn_query, asked, head, targets=targets, options=options)
    pages = ("*i8", "*bf16", "*i32", "*i8", "*bf16", *["*i64"] * 2)
    types = (*_SUMS, *query, *pages, weight, turns, *["i32"] * 4)
    kernel, plan, constants = _program(form, 16, _PAGE, overlap)
    yield Variant(kernel, types, constants, plan.warps, plan.stages, targets, options)
    types = (*_SUMS, "*i32", *types[len(_SUMS) :])
    for target in filter(targets.__contains__, NVIDIA if _fits_mma(form, HEADS.value) else ()):
        kernel, plan, constants = _program(form, HEADS.value, _PAGE, overlap, target)
        limited = _options(overlap, plan.registers)
        yield Variant(kernel, types, constants, plan.warps, plan.stages, (target,), limited)
    yield _joining({**head, "TURNED": True}, overlap, targets)


def _joining(head: dict[str, Any], overlap: bool, targets: tuple[Target, ...]) -> Variant:
    types = ("*bf16", *_SUMS, "i32", "fp32")
    constants = {**head, "AT_ONCE": _AT_ONCE}
    return Variant(join_splits, types, constants, targets=targets, options=_options(overlap))


def decode(
    query: Tensor,
    cache: NarrowCache | PlainCache,
    tables: Tensor,
    offsets: Tensor,
    window: int | None,
    rule: KeyRule | None,
    out: Tensor,
) -> None:
    """One query a sequence: `reference.attention`, or `..reference.paged_attention`, with L = 1.

    Args:
        query: [B, heads, head_dim], contiguous; head h reads kv head h // (heads / kv_heads). Over
            a plain cache of its dtype; else bfloat16, float16 or float32.
        cache: a layer's narrow pages, or plain keys and values.
        tables: int64 or int32 [B, n]: pages of the rows, shorter ones filled up with any page.
        offsets: int64 [B]: the last key that a row sees; key j lies in page `tables[b, j //
            page_size]`, and no page beyond the last key's, or before the window's, is read.
        window: how many keys a row sees at most; None for all.
        rule: how keys are made of values, if the cache stores values alone.
        out: like `query`; written.

    Results depend on B and n, as these choose how sums are split, but on nothing else than numbers.
    Raises KernelInputError for what does not fit; nothing was launched then.
    """
    fault = _misfit(query, cache, tables, offsets, window, rule, out)
    if fault:
        raise KernelInputError(f"decode attention: {fault}")
    most = _most_rows(*query.shape[1:])
    for part in range(0, len(query), most):
        own = slice(part, part + most)
        _decode(query[own], cache, tables[own], offsets[own], window, rule, out[own])


def _decode(
    query: Tensor,
    cache: NarrowCache | PlainCache,
    tables: Tensor,
    offsets: Tensor,
    window: int | None,
    rule: KeyRule | None,
    out: Tensor,
) -> None:
    rows, heads, dim = query.shape
    narrow = isinstance(cache, NarrowCache)
    kv_heads, page = _heads_and_page(cache)
    group = heads // kv_heads
    target = target_of(query.get_device()) if query.is_cuda else None
    overlap = target is not None and overlaps(target)
    if isinstance(cache, NarrowCache):
        kernel, plan, constants = _program(cache.format, group, page, overlap, target)
    else:
        kernel, plan = decode_plain, plan_of(dim)
        constants = _plain(dim, group, page, plan, overlap)
    keys = tables.shape[1] * page if window is None else min(tables.shape[1] * page, window)
    space = workspace(query.device)[0]
    # What is cut off is aligned, so a little more than its sizes.
    spare = 64 + (rows * heads * (dim + 2) if narrow else 0)
    listed = kv_heads * _LISTED if kernel is decode_mma else 0
    room = (len(space) - spare) // (rows * (heads * (dim + 2) + listed))
    slots = plan.programs * processors_of(query.device)
    splits = splits_of(slots, rows * kv_heads, keys, room, plan.tile)
    sums, space = _cut(space, rows * heads * splits * dim)
    marks, space = _cut(space, rows * heads * splits * 2)
    numbers = (tables.shape[1], kv_heads, group, window or EVERYTHING)
    grid, options = (rows * kv_heads, splits), _options(overlap)
    own_options = _options(overlap, plan.registers)
    if isinstance(cache, NarrowCache):
        form, pool = cache.format, cache.overflow
        by_mma = kernel is decode_mma
        weight, turns = (None, None) if rule is None else (rule.weight, _turns(rule, by_mma))
        digits, space = _cut(space, rows * heads * dim // 2)
        factors, space = _cut(space, rows * heads * 2)
        own, space = _cut(space, rows * heads * (form.pairs or 0))
        found = (space.view(torch.int32),) if by_mma else ()
        turn_query.launch(
            (rows * heads,),
            *(digits.view(torch.int8), own.view(torch.float16), factors, query, weight),
            constants=_head(form, overlap),
            options=options,
        )
        kernel.launch(
            grid,
            *(sums, marks, *found, digits.view(torch.int8), own.view(torch.float16), factors),
            *(cache.codes.view(torch.int8), cache.scales, cache.second),
            *(pool.codes.view(torch.int8), pool.scales, tables, offsets, weight, turns, *numbers),
            constants=constants,
            warps=plan.warps,
            stages=plan.stages,
            options=own_options,
        )
        ending = {**_head(form, overlap), "TURNED": True}
    else:
        kernel.launch(
            grid,
            *(sums, marks, query, *cache, tables, offsets, *numbers),
            constants=constants,
            warps=plan.warps,
            stages=plan.stages,
            options=own_options,
        )
        ending = _plain_head(dim, overlap)
    join_splits.launch(
        (rows * heads,),
        *(out, sums, marks, splits, _LIFTED if narrow else 1.0),
        constants={**ending, "AT_ONCE": _AT_ONCE},
        options=options,
    )


_AT_ONCE = 16
"""Splits that are loaded together."""
_MMA_SHARED = 75 * KIB
"""Shared memory of a program by `mma` of heads of 512 numbers, or of half as many of two sides."""


def _cut(space: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first numbers, and the rest, which is aligned to 16 bytes."""
    return space[:count], space[-(-count // 4) * 4 :]


def _options(overlap: bool, registers: int | None = None) -> dict[str, int]:
    limit = {} if registers is None else {"maxnreg": registers}
    return overlap_options(overlap) | limit


def _head(form: KVFormat, overlap: bool) -> dict[str, Any]:
    shape = shape_of(form.head_dim, form.block)
    return {"DIM": form.head_dim, "PAIRS": form.pairs or 0, **shape, "OVERLAP": overlap}


def _plain_head(dim: int, overlap: bool) -> dict[str, Any]:
    shape = shape_of(dim, dim & -dim)
    return {"DIM": dim, "PAIRS": 0, **shape, "TURNED": False, "OVERLAP": overlap}


def _rows(group: int) -> int:
    return max(16, 1 << (group - 1).bit_length())


def _program(
    form: KVFormat, group: int, page: int, overlap: bool, target: Target | None = None
) -> tuple[Kernel, Plan, dict[str, Any]]:
    """Which kernel reads narrow pages for `group` heads a key head, and its constants.

    `target` is what it runs on: None for any.
    """
    if target is None or target.vendor != "nvidia" or not _fits_mma(form, group):
        plan = plan_of(form.width)
        return decode_narrow, plan, _narrow(form, group, page, plan, overlap)
    pairs = form.pairs or 0
    programs = max(1, target.shared_memory // _MMA_SHARED)
    registers = 168 if programs == 3 else None
    plan = Plan(64, 2 * pairs or min(form.head_dim, 128), WARPS.value, 1, programs, registers)
    constants = {
        **{"DIM": form.head_dim, "SIDES": form.sides, "PAIRS": pairs, "CHUNK": plan.chunk},
        **{"PAGE": page, "TILE": plan.tile, "OVERLAP": overlap},
    }
    return decode_mma, plan, constants


def _fits_mma(form: KVFormat, group: int) -> bool:
    """Whether `decode_mma` reads such pages: its registers and shared memory have room for them."""
    sizes = form.head_dim in (128, 256, 512) and form.sides * form.head_dim <= 512
    return form.bits == 8 and group <= HEADS.value and sizes and form.pairs in (None, 0, 32, 64)


def _narrow(form: KVFormat, group: int, page: int, plan: Plan, overlap: bool) -> dict[str, Any]:
    pairs = form.pairs or 0
    return {
        **{"DIM": form.head_dim, "BITS": form.bits, "SIDES": form.sides, "PAIRS": pairs},
        **{"COUNT": max(16, 1 << (pairs - 1).bit_length()) if pairs else 16, "BLOCK": form.block},
        **{"PAGE": page, "ROWS": _rows(group), "TILE": plan.tile, "CHUNK": plan.chunk},
        "OVERLAP": overlap,
    }


def _plain(dim: int, group: int, page: int, plan: Plan, overlap: bool) -> dict[str, Any]:
    return {
        **{"DIM": dim, "PAGE": page, "ROWS": _rows(group), "TILE": plan.tile},
        **{"CHUNK": plan.chunk, "OVERLAP": overlap},
    }


_turn_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _turns(rule: KeyRule, by_mma: bool) -> Tensor:
    """Cosines and sines in float16, [positions, 2, pairs], or as `decode_mma` wants them."""
    found: dict[bool, Tensor] = _turn_tables.setdefault(rule.cosines, {})
    if by_mma not in found:
        tables = torch.stack((rule.cosines, rule.sines), 1).half()
        found[by_mma] = together(tables) if by_mma and rule.cosines.numel() else tables
    return found[by_mma]


def _heads_and_page(cache: NarrowCache | PlainCache) -> tuple[int, int]:
    if isinstance(cache, NarrowCache):
        return cache.format.kv_heads, cache.page_size
    return cache[0].shape[2], cache[0].shape[1]


def _most_rows(heads: int, dim: int) -> int:
    """Sequences that the workspace has room for; a power of two, so that slices are aligned."""
    most: int = PARTIALS // (heads * (2 * dim + 4 + _LISTED))
    return 1 << (most.bit_length() - 1)


def _misfit(
    query: Tensor,
    cache: NarrowCache | PlainCache,
    tables: Tensor,
    offsets: Tensor,
    window: int | None,
    rule: KeyRule | None,
    out: Tensor,
) -> str:
    """What is wrong with the arguments, or nothing."""
    if query.dim() != 3 or query.dtype not in _QUERIES:
        return f"query is {query.dtype} {tuple(query.shape)}, not floats [B, heads, head_dim]"
    rows, heads, dim = query.shape
    if isinstance(cache, NarrowCache):
        form, own = cache.format, cache.format.head_dim
        tensors = [cache.codes, cache.scales, cache.second]
        tensors += [cache.overflow.codes, cache.overflow.scales]
        if (rule is None) != (form.pairs is None):
            return "keys are made of values by a rule, if and only if the cache stores values alone"
        if form.pairs is not None and 2 * form.pairs == form.head_dim:
            return "keys that RoPE turns in all columns must be stored"
        if rule is not None:
            tensors += [rule.weight, rule.cosines, rule.sines]
            wanted = (len(rule.cosines), form.pairs)
            if rule.weight.shape != (dim,) or not (
                tuple(rule.cosines.shape) == tuple(rule.sines.shape) == wanted
            ):
                return f"the rule must have [{dim}] weights and tables [positions, {form.pairs}]"
    else:
        tensors, own = list(cache), cache[0].shape[-1]
        if cache[0].dim() != 4 or cache[0].shape != cache[1].shape:
            return "keys and values must be [pages, page_size, kv_heads, head_dim] alike"
        if query.dtype == torch.float32 or any(each.dtype != query.dtype for each in cache):
            return f"query is {query.dtype}, the cache {cache[0].dtype}; both bfloat16 or float16"
        if rule is not None:
            return "a plain cache has keys; it takes no rule"
    kv_heads, _ = _heads_and_page(cache)
    if own != dim or heads % kv_heads:
        return f"query has {heads} heads of {dim}, the cache {kv_heads} of {own}"
    if tables.dim() != 2 or len(tables) != rows or tables.dtype not in (torch.int64, torch.int32):
        return f"tables is {tables.dtype} {tuple(tables.shape)}; it must be int64 [{rows}, n]"
    if offsets.dtype != torch.int64 or offsets.shape != (rows,):
        return f"offsets is {offsets.dtype} {tuple(offsets.shape)}; it must be int64 [{rows}]"
    if window is not None and window < 1:
        return f"the window is {window}"
    if out.shape != query.shape or out.dtype != query.dtype:
        return f"out is {out.dtype} {tuple(out.shape)}; it must be like query"
    for tensor in (query, tables, offsets, out, *tensors):
        if not tensor.is_contiguous() or tensor.device != query.device:
            return f"{tuple(tensor.shape)} on {tensor.device} must be contiguous, on {query.device}"
    return ""
