"""Where the threads of decode attention by `mma` have what they work on; see `decode`.

Four warps. The left operand of every product is a step's rows or the columns of its values, of
which a warp has every fourth sixteen; the right one is all query heads.
"""

from triton.experimental.gluon import language as gl

HEADS = gl.constexpr(8)
"""Query heads of a key head, at most."""
WARPS = gl.constexpr(4)
COLUMNS = gl.constexpr(128)
"""Of rows, in one buffer of shared memory."""
COUPLES = gl.constexpr(64)
"""Of neighbouring columns, in one buffer."""
PART = gl.constexpr(32)
"""Rows of the Hadamard matrix that is held in registers, and columns of one turned product."""

MMA = gl.constexpr(
    gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS.value, 1], instr_shape=[16, 8])
)
ROW = gl.constexpr(gl.SliceLayout(1, MMA.value))
HEAD = gl.constexpr(gl.SliceLayout(0, MMA.value))
BYTES_LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 4))
BYTES_RIGHT = gl.constexpr(gl.DotOperandLayout(1, MMA.value, 4))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, MMA.value, 2))
COPY = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [WARPS.value, 1], [1, 0]))
"""Of codes on their way into shared memory: 16 bytes a thread, a row's 128 for eight threads."""
COPIED = gl.constexpr(gl.SliceLayout(1, COPY.value))

PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PLAIN_ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
BYTES = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))
BYTE_PAIRS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
"""`BYTES` as pairs of neighbours."""
BYTES_ON_SIDE = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 4, [0, 1]))
ON_SIDE = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [0, 1]))
