"""Tiles shared evenly among persistent programs, and how the sums of a shared tile meet.

The steps of all tiles, one tile after the other, are cut into as many equal shares as there are
programs ("stream-K"), so that all end at the same time; a tile's steps belong to one program or to
neighbours. The one that has a tile's first steps, its owner, comes to them last of all its own,
when the others have as a rule stored their sums long ago, so that it adds them to what it has in
registers. If one is missing, it stores its own, and whoever counts last adds all. Sums are added in
the order of their columns either way: results depend on no timing, and nobody waits for anybody.

Sums of 128 rows and 64 tokens are a pair of tensors [8, 8, 8, 4, 2], of even rows and of odd ones:
warp (of four: which of its products, and warp), lane's row, eight tokens, lane's tokens, token. So
an address is one of the thread's plus what is the same for all threads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..formats import TILE
from ..workspace import barrier, gated

_TILE = gl.constexpr(TILE)
_THREADS = gl.constexpr(256)
_WARP, _ROW, _EIGHT, _LANE, _TOKEN = (gl.constexpr(axis) for axis in range(5))


@gluon.jit
def share(program, programs, steps):
    """The first of a program's steps, and of the program's after it."""
    return program * steps // programs, (program + 1) * steps // programs


@gluon.jit
def _program_of(step, programs, steps):
    """Whose step it is: the last program that begins at or before it."""
    return ((step + 1) * programs - 1) // steps


@gluon.jit
def pieces(values):
    """Sums [128, tokens], as wgmma leaves them, as pairs of 64 tokens each."""
    WIDTH: gl.constexpr = values.shape[1]
    if WIDTH > 64:
        first, last = gl.split(gl.permute(gl.reshape(values, [_TILE, 2, WIDTH // 2]), [0, 2, 1]))
        return pieces(first) + pieces(last)
    else:
        # Row 16w + 8b + l is an even one of the tile if b is 0, the next odd one if it is 1.
        whole = gl.reshape(values, [8, 2, 8, WIDTH // 8, 4, 2])
        return gl.split(gl.permute(whole, [0, 2, 3, 4, 5, 1]))


@gluon.constexpr_function
def _axis_layout(layout, axis):
    for other in (4, 3, 2, 1, 0):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _along(AXIS: gl.constexpr, sums):
    """The index along an axis, with ones for the sizes of the others."""
    LAYOUT: gl.constexpr = _axis_layout(sums.type.layout, AXIS)
    index = gl.arange(0, sums.shape[AXIS], layout=LAYOUT)
    for other in gl.static_range(5):
        if other != AXIS:
            index = gl.expand_dims(index, other)
    return index


@gluon.jit
def _unknown(values):
    """The same, but to the compiler: it would keep all that follows in registers while products
    are made."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [values], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _areas(partials, sums):
    """Where a thread's even and odd sums lie, from the first of a piece of 64 tokens on."""
    thread = _along(_WARP, sums) * 32 + _along(_ROW, sums) * 4 + _along(_LANE, sums)
    number = _along(_EIGHT, sums) * 2 + _along(_TOKEN, sums)
    even = partials + _unknown(thread) + number * (2 * _THREADS)
    return even, even + _THREADS


@gluon.jit
def _finish(
    y,
    even,
    odd,
    residual,
    epilogue,
    scale,
    stop,
    rows,
    first_row,
    first_token,
    OWN_ROWS: gl.constexpr,
):
    """Stores a piece's results: those of two rows are one word, or one number if they are gated."""
    warp = _along(_WARP, even)
    if OWN_ROWS == 4:
        row = warp % 4 * 32 + warp // 4 * 2 + _along(_ROW, even) * 4
    else:
        row = warp * 16 + _along(_ROW, even) * 2
    row = first_row + _unknown(row)
    token = first_token + _unknown(_along(_LANE, even) * 2)
    number = _along(_EIGHT, even) * 8 + _along(_TOKEN, even)
    pairs = _unknown(rows) // 2
    place = token * pairs + row // 2
    fits = (token + number < stop) & (row < rows)
    if epilogue == 2:
        value = (gated(even, odd) * scale).to(y.dtype.element_ty)
        gl.store(y + place + number * pairs, value, mask=fits)
    else:
        if epilogue == 1:
            words = residual.to(gl.pointer_type(gl.int32), bitcast=True)
            added = gl.load(words + place + number * pairs, mask=fits, other=0)
            even += (added << 16).to(gl.float32, bitcast=True)
            odd += (added & -65536).to(gl.float32, bitcast=True)
        word = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;",
            "=r,f,f",
            [odd * scale, even * scale],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
        words = y.to(gl.pointer_type(gl.int32), bitcast=True)
        gl.store(words + place + number * pairs, word, mask=fits)


@gluon.jit
def meet_neighbours(
    y,
    totals,
    residual,
    epilogue,
    scale,
    partials,
    counter,
    program,
    programs,
    first,
    last,
    steps,
    stop,
    rows,
    first_row,
    first_token,
    TOKENS: gl.constexpr,
    OWN_ROWS: gl.constexpr = 2,
):
    """Adds up and stores a tile of which this program has some steps, all being first to last - 1.

    `totals` are its `pieces`; `stop` ends the tokens there are. `partials` has room for two tiles
    of each program: what it has of a tile that it does not own, and of one that it does. Lanes
    have OWN_ROWS rows of the weight: two, next to each other (`row_pairs`), or four (`decode`).
    """
    SIZE: gl.constexpr = _TILE * TOKENS
    WIDTH: gl.constexpr = min(TOKENS, 64)
    PIECE: gl.constexpr = _TILE * WIDTH
    owner = _program_of(first, programs, steps)
    end = _program_of(last - 1, programs, steps)
    mine = program == owner
    others = end - owner
    stored = False
    complete = True
    if others > 0:
        arrived = 0
        if mine:
            arrived = gl.atomic_add(counter, 0, sem="acq_rel")
        if arrived < others:
            own = partials + (2 * program + mine.to(gl.int32)) * SIZE
            for i in gl.static_range(TOKENS // WIDTH):
                evens, odds = _areas(own + i * PIECE, totals[2 * i])
                gl.store(evens, totals[2 * i])
                gl.store(odds, totals[2 * i + 1])
            barrier()
            stored = True
            complete = gl.atomic_add(counter, 1, sem="acq_rel") == others
    if complete:
        for i in gl.static_range(TOKENS // WIDTH):
            even, odd = totals[2 * i], totals[2 * i + 1]
            if stored:
                evens, odds = _areas(partials + (2 * owner + 1) * SIZE + i * PIECE, even)
                even = gl.load(evens, cache_modifier=".cg")
                odd = gl.load(odds, cache_modifier=".cg")
            for other in range(owner + 1, end + 1):
                evens, odds = _areas(partials + 2 * other * SIZE + i * PIECE, even)
                more_even = gl.load(evens, cache_modifier=".cg")
                more_odd = gl.load(odds, cache_modifier=".cg")
                even += more_even
                odd += more_odd
            _finish(
                *(y, even, odd, residual, epilogue, scale, stop, rows),
                *(first_row, first_token + WIDTH * i, OWN_ROWS),
            )
        if others > 0:
            gl.atomic_xchg(counter, 0, sem="relaxed")
