"""Exponents back into bfloat16 on a card: `exponents.decode` as one kernel.

A warp takes a block of 1024 elements, a lane 32 of them, two to a word. The three bits of a word's
codes are shifted to where its exponents belong and added to the base, for both elements at once.
Where all three bits are set there is an escape; a sum over the lanes tells each where its own ones
are in the list, and a load that only they make brings them. Bytes moved for an element: 1.43 in, 2
out; instructions on sm_90: 23 (counted; how long they take is not measured yet).

What it gave up: a list of places and exponents, written over what a simpler kernel decodes; it
takes half a bit more of each element.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ..launching.launch import Kernel, Variant
from .exponents import BLOCK, LANES, ExponentCode

_BLOCKS, _WARPS = 4, 4
"""Of a program."""
_BLOCK, _LANES = tl.constexpr(BLOCK), tl.constexpr(LANES)


@triton.jit
def _taken(decoded, listed, place, escaped, HIGH: tl.constexpr):
    """Words with their lower or higher exponents from the list, where they are `escaped`."""
    SHIFT: tl.constexpr = 7 + 16 * HIGH
    exponent = tl.load(listed + place, mask=escaped, other=0).to(tl.int32)
    return tl.where(escaped, (decoded & ~(255 << SHIFT)) | (exponent << SHIFT), decoded)


@triton.jit
def _word(rests, bit0, bit1, bit2, base, place, listed, WORD: tl.constexpr):
    """Word WORD of each lane's 16, and the place in the list behind its escapes."""
    own = rests >> 8 * (WORD % 2)
    # A bit of a code belongs to 7, 8 or 9, of two elements that are 16 apart.
    steps = _at(bit0, WORD, 7) | _at(bit1, WORD, 8) | _at(bit2, WORD, 9)
    decoded = (own & 0x007F007F) | ((own & 0x00800080) << 8)
    decoded += base + steps
    escapes = bit0 & bit1 & bit2
    low = (escapes >> WORD) & 1
    high = (escapes >> (WORD + 16)) & 1
    decoded = _taken(decoded, listed, place, low != 0, 0)
    place += low
    decoded = _taken(decoded, listed, place, high != 0, 1)
    return decoded, place + high


@triton.jit
def _at(bits, FROM: tl.constexpr, TO: tl.constexpr):
    """Bits FROM and FROM + 16 at TO and TO + 16."""
    if FROM < TO:
        moved = bits << (TO - FROM)
    else:
        moved = bits >> (FROM - TO)
    return moved & (0x00010001 << TO)


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
def _restore(out, coded, elements, blocks, BLOCKS: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCKS
    lane = tl.arange(0, BLOCKS * _LANES)
    block = lane // _LANES
    inside = block < blocks - begin
    count = blocks.to(tl.int64)
    planes = coded + count * _BLOCK
    starts = planes + count * (3 * _BLOCK // 8)
    bases = starts + (count + 3) // 4 * 16
    listed = bases + (count + 15) // 16 * 16
    planes = planes.to(tl.pointer_type(tl.int32), bitcast=True) + begin * (3 * _LANES)
    planes += block * (3 * _LANES) + lane % _LANES
    bit0 = tl.load(planes, mask=inside, other=0)
    bit1 = tl.load(planes + _LANES, mask=inside, other=0)
    bit2 = tl.load(planes + 2 * _LANES, mask=inside, other=0)
    base = tl.load(bases + begin + block, mask=inside, other=0).to(tl.int32)
    base = (base << 7) | (base << 23)
    # How many bits are set, by sums of neighbours. Escapes of all lanes follow each other.
    pairs = bit0 & bit1 & bit2
    pairs -= (pairs >> 1) & 0x55555555
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    each = (((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
    place = tl.load(starts.to(tl.pointer_type(tl.int32), bitcast=True) + begin)
    place += tl.cumsum(each, 0) - each
    quad = tl.arange(0, BLOCKS * 4 * _LANES)
    block = quad // (4 * _LANES)
    inside = block < blocks - begin
    rests = coded.to(tl.pointer_type(tl.int32), bitcast=True) + begin * (_BLOCK // 4)
    rests += block * (_BLOCK // 4) + quad % (4 * _LANES)
    word = block * (_BLOCK // 2) + quad % (4 * _LANES)
    words = out.to(tl.pointer_type(tl.int32), bitcast=True) + begin * (_BLOCK // 2) + word
    halves = out.to(tl.pointer_type(tl.int16), bitcast=True) + begin * _BLOCK + 2 * word
    left = elements - begin * _BLOCK - 2 * word
    whole = (begin + BLOCKS) * _BLOCK <= elements
    for chunk in tl.static_range(4):
        if chunk % 2 == 0:
            parts = _quarters(tl.load(rests + chunk * (2 * _LANES), mask=inside, other=0))
        even, odd = parts[chunk % 2 * 2], parts[chunk % 2 * 2 + 1]
        word0, place = _word(even, bit0, bit1, bit2, base, place, listed, 4 * chunk)
        word1, place = _word(even, bit0, bit1, bit2, base, place, listed, 4 * chunk + 1)
        word2, place = _word(odd, bit0, bit1, bit2, base, place, listed, 4 * chunk + 2)
        word3, place = _word(odd, bit0, bit1, bit2, base, place, listed, 4 * chunk + 3)
        decoded = tl.join(tl.join(word0, word2), tl.join(word1, word3))
        decoded = tl.reshape(decoded, [BLOCKS * 4 * _LANES])
        if whole:
            tl.store(words + chunk * (4 * _LANES), decoded)
        else:
            _store_some(halves + chunk * (8 * _LANES), decoded, left - chunk * (8 * _LANES))


_kernel = Kernel(_restore, grid="cdiv(blocks, BLOCKS)")


def variants() -> Iterator[Variant]:
    """What the bundle holds."""
    types = ("*u8", "*u8", "i32", "i32")
    yield Variant(_kernel, types, {"BLOCKS": _BLOCKS}, _WARPS, 1)


def restore(code: ExponentCode, coded: Tensor, out: Tensor) -> None:
    """As `exponents.decode`; both tensors on a card, at multiples of 16 bytes."""
    _kernel.launch(
        (-(-code.blocks // _BLOCKS),),
        *(out, coded, code.elements, code.blocks),
        constants={"BLOCKS": _BLOCKS},
        warps=_WARPS,
        stages=1,
    )
