"""Exponents back into bfloat16 on a card: `exponents.decode` as one kernel.

A program takes a run of 4096 elements, a lane 32 of them. The two words of a lane's codes in level
0 tell which of its elements are in level 1, and a sum over the lanes where the codes of those
begin; as they lie without gaps, each is moved to its element's bit. The same brings level 2's, and
tells where in the list escapes are. Then how far 32 exponents are above their bases is computed at
once, bit by bit: four words. Their bits are shifted to where the exponents of two elements belong
and added to the base; escapes are loaded by those lanes alone that have any.

Bytes moved for an element: 1.38 in, 2 out; instructions on sm_90: 34. An H100 takes as long as for
copying 1.3 times as many bytes.

What it gave up: moving codes one by one, in 32 steps for each plane instead of five.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ..launching.launch import Kernel, Variant
from .exponents import BLOCK, BLOCKS, LANES, ExponentCode
from .levels import WORD

_WARPS = 4
_BLOCK, _LANES, _BLOCKS = tl.constexpr(BLOCK), tl.constexpr(LANES), tl.constexpr(BLOCKS)
_WORD = tl.constexpr(WORD)


@triton.jit
def _ones(bits):
    """How many bits are set, by sums of neighbours."""
    pairs = bits - ((bits >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _ranks(start, far):
    """Of each lane's first element that is `far`, in the order of lanes, from `start` on."""
    each = _ones(far)
    return start + tl.cumsum(each, 0) - each


@triton.jit
def _from_rank(plane, rank, wanted):
    """The 32 bits of a plane from a rank on, for lanes that are `wanted`."""
    low = tl.load(plane + rank // _WORD, mask=wanted, other=0)
    high = tl.load(plane + rank // _WORD + 1, mask=wanted, other=0)
    shift = rank % _WORD
    return (low >> shift) | ((high << 1) << (31 - shift))


@triton.jit
def _move(far, zeros, BY: tl.constexpr):
    """Which bits of `far` move by BY, for an odd number of `zeros` up to them; both after that."""
    odd = zeros ^ (zeros << 1)
    odd ^= odd << 2
    odd ^= odd << 4
    odd ^= odd << 8
    odd ^= odd << 16
    move = odd & far
    return move, (far ^ move) | (move >> BY), zeros & (odd ^ 0xFFFFFFFF)


@triton.jit
def _moves(far):
    """Which bits move by 1, 2, 4, 8 and 16 when those that are `far` are pushed to the lowest.

    They move by as many bits as there are zeros below (Warren, Hacker's Delight, 7-4).
    """
    zeros = (far ^ 0xFFFFFFFF) << 1
    by1, far, zeros = _move(far, zeros, 1)
    by2, far, zeros = _move(far, zeros, 2)
    by4, far, zeros = _move(far, zeros, 4)
    by8, far, zeros = _move(far, zeros, 8)
    by16, far, zeros = _move(far, zeros, 16)
    return by1, by2, by4, by8, by16


@triton.jit
def _spread(bits, far, moves):
    """The lowest bits, in their order, at the places that are `far`: moved back (ibid., 7-5)."""
    for step in tl.static_range(5):
        move = moves[4 - step]
        bits = (bits & (move ^ 0xFFFFFFFF)) | ((bits << (16 >> step)) & move)
    return bits & far


@triton.jit
def _level(planes, words, start, far):
    """Both bits of the codes of elements that are `far`, each at its element's bit, else 0."""
    rank = _ranks(start, far)
    moves = _moves(far)
    bit0 = _spread(_from_rank(planes, rank, far != 0), far, moves)
    bit1 = _spread(_from_rank(planes + words, rank, far != 0), far, moves)
    return bit0, bit1


@triton.jit
def _steps(a0, a1, starts, ends, room):
    """How far exponents are above base - 8, as four bits of all 32; and which are escapes.

    And the rank of each lane's first escape, and where the list is. `a0` and `a1` are level 0's
    bits; `starts` and `ends` point at the run's row and the last one. An escape has the step of
    base + 2, with which it stays in its byte.
    """
    words1 = tl.load(ends).to(tl.int64) // _WORD + 2
    words2 = tl.load(ends + 1).to(tl.int64) // _WORD + 2
    level2 = room + 2 * words1
    listed = (level2 + 2 * words2).to(tl.pointer_type(tl.uint8), bitcast=True)
    far0 = a0 & a1
    b0, b1 = _level(room, words1, tl.load(starts), far0)
    far1 = b0 & b1
    c0, c1 = _level(level2, words2, tl.load(starts + 1), far1)
    far2 = c0 & c1
    # From base - 8 on level 0's steps are 8 and its code. A level's bits are set only where `far`
    # is, so that exclusive or takes away what there is, and adds what there is not.
    step0 = a0 ^ b0 ^ far1 ^ c0
    step1 = a1 ^ far1 ^ c1
    step2 = far0 ^ b1 ^ far1 ^ c1
    step3 = far0 ^ 0xFFFFFFFF ^ b1 ^ far1 ^ far2
    return (step0, step1, step2, step3), far2, _ranks(tl.load(starts + 2), far2), listed


@triton.jit
def _at(bits, FROM: tl.constexpr, TO: tl.constexpr):
    """Bits FROM and FROM + 16 at TO and TO + 16."""
    if FROM < TO:
        moved = bits << (TO - FROM)
    else:
        moved = bits >> (FROM - TO)
    return moved & (0x00010001 << TO)


@triton.jit
def _taken(decoded, listed, rank, escaped, HIGH: tl.constexpr):
    """Words with their lower or higher exponents from the list, where they are `escaped`."""
    SHIFT: tl.constexpr = 7 + 16 * HIGH
    exponent = tl.load(listed + rank, mask=escaped, other=0).to(tl.uint32)
    own = (decoded & (0xFFFFFFFF ^ (255 << SHIFT))) | (exponent << SHIFT)
    return tl.where(escaped, own, decoded)


@triton.jit
def _word(rests, steps, base, escaped, low, high, listed, WORD: tl.constexpr):
    """Word WORD of each lane's 16, and the ranks of the next lower and higher escapes."""
    own = rests >> 8 * (WORD % 2)
    decoded = (own & 0x007F007F) | ((own & 0x00800080) << 8)
    # A bit of a step belongs to 7, 8, 9 or 10, of two elements that are 16 apart.
    decoded += base + (_at(steps[0], WORD, 7) | _at(steps[1], WORD, 8))
    decoded += _at(steps[2], WORD, 9) | _at(steps[3], WORD, 10)
    is_low = (escaped >> WORD) & 1
    is_high = (escaped >> (WORD + 16)) & 1
    decoded = _taken(decoded, listed, low, is_low != 0, 0)
    decoded = _taken(decoded, listed, high, is_high != 0, 1)
    return decoded, low + is_low, high + is_high


@triton.jit
def _quarters(words):
    """Words 0, 1, 2 and 3 of each four neighbours."""
    even, odd = tl.split(tl.reshape(words, [words.numel // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _store_some(halves, words, left):
    """Both elements of each word, or as many as are `left` there."""
    tl.store(halves, words.to(tl.int16), mask=left > 0)
    tl.store(halves + 1, (words >> 16).to(tl.int16), mask=left > 1)


@triton.jit
def _restore(out, coded, elements, runs):
    RUN: tl.constexpr = _BLOCK * _BLOCKS
    run = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, _BLOCKS * _LANES)
    count = runs.to(tl.int64)
    rests = coded.to(tl.pointer_type(tl.uint32), bitcast=True)
    planes = rests + count * (RUN // 4)
    starts = planes + count * (RUN // 16)
    bases = starts + (3 * count + 6) // 4 * 4
    room = bases + (count + 3) // 4 * 4
    planes += run * (RUN // 32) + lane
    bit0, bit1 = tl.load(planes), tl.load(planes + count * (RUN // 32))
    steps, escaped, low, listed = _steps(bit0, bit1, starts + 3 * run, starts + 3 * count, room)
    high = low + _ones(escaped & 0xFFFF)
    bases = bases.to(tl.pointer_type(tl.uint8), bitcast=True) + run * _BLOCKS
    # For both elements of a word, from base - 8 on, as steps are.
    base = tl.load(bases + lane // _LANES).to(tl.uint32) * 0x00800080 - 0x04000400
    quad = tl.arange(0, RUN // 8)
    block, own = quad // (_BLOCK // 8), quad % (_BLOCK // 8)
    word = block * (_BLOCK // 2) + own
    rests += run * (RUN // 4) + block * (_BLOCK // 4) + own
    words = out.to(tl.pointer_type(tl.uint32), bitcast=True) + run * (RUN // 2) + word
    halves = out.to(tl.pointer_type(tl.int16), bitcast=True) + run * RUN + 2 * word
    left = elements - run * RUN - 2 * word
    whole = (run + 1) * RUN <= elements
    for chunk in tl.static_range(4):
        if chunk % 2 == 0:
            parts = _quarters(tl.load(rests + chunk * (2 * _LANES)))
        even, odd = parts[chunk % 2 * 2], parts[chunk % 2 * 2 + 1]
        word0, low, high = _word(even, steps, base, escaped, low, high, listed, 4 * chunk)
        word1, low, high = _word(even, steps, base, escaped, low, high, listed, 4 * chunk + 1)
        word2, low, high = _word(odd, steps, base, escaped, low, high, listed, 4 * chunk + 2)
        word3, low, high = _word(odd, steps, base, escaped, low, high, listed, 4 * chunk + 3)
        decoded = tl.join(tl.join(word0, word2), tl.join(word1, word3))
        decoded = tl.reshape(decoded, [RUN // 8])
        if whole:
            tl.store(words + chunk * (4 * _LANES), decoded)
        else:
            _store_some(halves + chunk * (8 * _LANES), decoded, left - chunk * (8 * _LANES))


_kernel = Kernel(_restore, grid="runs")


def variants() -> Iterator[Variant]:
    """What the bundle holds."""
    yield Variant(_kernel, ("*u8", "*u8", "i32", "i32"), {}, _WARPS, 1)


def restore(code: ExponentCode, coded: Tensor, out: Tensor) -> None:
    """As `exponents.decode`; both tensors on a card, at multiples of 16 bytes."""
    _kernel.launch((code.runs,), out, coded, code.elements, code.runs, warps=_WARPS, stages=1)
