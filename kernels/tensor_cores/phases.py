"""Shared memory of `staged`: what it holds, how it is filled ahead, how lanes read it.

A phase is some groups of columns of one tile: activations, words of survivors and scales of four
rows, and the sums of activations that take the bias of tiny numbers away. Phases take turns on some
sides: while one is multiplied, the others are under way. All is copied 16 bytes a thread and past
the L1 cache. Of a phase each thing is one copy (each slot of words has a piece of memory of its
own), as Triton has threads wait between copies into the same piece. Each phase costs two or three
waits of all threads in all; a ring of steps with an mbarrier each was not tried.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .wgmma import FOURS

_LINE = gl.constexpr(16)
"""Columns whose survivors of one slot are a line of 32 words."""


@gluon.jit
def unknown(value):
    """The same, but to the compiler: it would keep all that follows from it in registers."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _lines(layout: gl.constexpr, COUNT: gl.constexpr):
    return gl.arange(0, COUNT, layout=gl.SliceLayout(1, layout))[:, None]


@gluon.jit
def _along(layout: gl.constexpr, COUNT: gl.constexpr):
    return gl.arange(0, COUNT, layout=gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def copy_phase(
    place,
    side,
    codes,
    scales,
    x,
    sums,
    lines,
    begin,
    first,
    chunks,
    last,
    KEPT: gl.constexpr,
    GROUP: gl.constexpr,
    WHAT: gl.constexpr = 3,
):
    """Starts to copy a phase's groups: `begin`, which is number `first` of its tile, and so on.

    Of weights and scales (WHAT 1), activations and their sums (2), or both; the second ends what is
    waited for together.
    """
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    STEPS: gl.constexpr = GROUP // 64
    LINES: gl.constexpr = GROUP // _LINE
    tiles, words, factors = place[0], place[1], place[2]
    PHASE: gl.constexpr = factors.shape[0] // words[0].shape[0]
    SIDES: gl.constexpr = words[0].shape[0]
    TOKENS: gl.constexpr = tiles.shape[1]
    left = gl.minimum(chunks - first, last - begin)
    none, lines = unknown(0), unknown(lines)
    if WHAT % 2 == 1:
        line = none + _lines(WORDS, PHASE * LINES)
        source = codes + begin.to(gl.int64) * (LINES * KEPT * 32)
        source += line * (KEPT * 32) + _along(WORDS, 32)
        for slot in gl.static_range(KEPT):
            async_copy.async_copy_global_to_shared(
                words[slot].index(side),
                source + slot * 32,
                mask=line < left * LINES,
                eviction_policy="evict_first",
            )
        chunk = none + _lines(PAIRS, PHASE)
        async_copy.async_copy_global_to_shared(
            _sides(factors, SIDES).index(side),
            scales + begin.to(gl.int64) * 32 + chunk * 32 + _along(PAIRS, 32),
            mask=chunk < left,
        )
    if WHAT >= 2:
        line = _lines(WIDE, PHASE * STEPS * TOKENS)
        step = line // TOKENS
        async_copy.async_copy_global_to_shared(
            _sides(tiles, SIDES).index(side),
            x + ((first * STEPS + step) * lines + line % TOKENS) * 64 + _along(WIDE, 64),
            mask=step < left * STEPS,
        )
        line = _lines(NARROW, PHASE * TOKENS)
        chunk = line // TOKENS
        async_copy.async_copy_global_to_shared(
            _sides(place[3], SIDES).index(side),
            sums + ((first + chunk) * lines + line % TOKENS) * 16 + _along(NARROW, 16),
            mask=chunk < left,
        )
        async_copy.commit_group()


@gluon.jit
def after(begin, first, chunks, last, PHASE: gl.constexpr):
    """Where the phase after this one begins, and in its tile."""
    count = gl.minimum(gl.minimum(PHASE, chunks - first), last - begin)
    first += count
    return begin + count, gl.where(first == chunks, 0, first)


@gluon.jit
def _sides(memory, SIDES: gl.constexpr):
    """Memory of [sides * pieces, lines, ...] as [sides, pieces * lines, ...]."""
    LINES: gl.constexpr = memory.shape[1] if len(memory.shape) == 3 else 1
    SHAPE: gl.constexpr = [SIDES, memory.shape[0] // SIDES * LINES, memory.shape[-1]]
    return memory._reinterpret(memory.dtype, SHAPE, memory.layout)


@gluon.jit
def place_of(
    KEPT: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    PHASE: gl.constexpr,
    SIDES: gl.constexpr,
):
    """Shared memory of SIDES phases: activations, words, scales of four rows, sums."""
    STEPS: gl.constexpr = GROUP // 64
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    SUMS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    # A warp reads eight words of four lines: each line's are in other banks.
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tiles = gl.allocate_shared_memory(gl.bfloat16, [SIDES * PHASE * STEPS, TOKENS, 64], SHARED)
    words = ()
    # Each slot's are a piece of memory of their own: else Triton has threads wait between them.
    for _ in gl.static_range(KEPT):
        words = words + (
            gl.allocate_shared_memory(gl.int32, [SIDES, PHASE * STEPS * 4, 32], WORDS),
        )
    factors = gl.allocate_shared_memory(gl.int64, [SIDES * PHASE, 32], PLAIN)
    sums = gl.allocate_shared_memory(gl.bfloat16, [SIDES * PHASE, TOKENS, 16], SUMS)
    return tiles, words, factors, sums


@gluon.jit
def words_at_step(words, step, KEPT: gl.constexpr, LAYOUT: gl.constexpr):
    """As `decode.words_of`, of a step of those in shared memory."""
    STEPS: gl.constexpr = words[0].shape[0] * words[0].shape[1] // 4
    found = ()
    for slot in gl.static_range(KEPT):
        steps = words[slot]._reinterpret(gl.int32, [STEPS, 4, 32], words[slot].layout)
        found = found + (steps.index(step).permute((1, 0)).load(LAYOUT),)
    return found


@gluon.jit
def scales_of(factors, chunk):
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return factors._reinterpret(gl.int64, factors.shape, PLAIN).index(chunk).load(FOURS)
