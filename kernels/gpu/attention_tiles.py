"""What the forward and backward attention kernels share: tiles of rows in and out, the dropout mask, the block sizes.

Device functions only, inlined into the kernels. M queries, N keys, D head dim; a tile's D is padded to a power of two.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(pointer, start, limit, stride_row, stride_dim, ROWS: tl.constexpr, MASKED: tl.constexpr,
              D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows start .. start+ROWS-1 of a (limit, D) matrix, (ROWS, BLOCK_D), 0 outside the matrix.

    Without MASKED all rows must lie below limit. Offsets are int64; what a loop over `start` leaves as it is, is
    computed once.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * stride_row + dims.to(tl.int64)[None, :] * stride_dim
    pointers = pointer + tl.cast(start, tl.int64) * stride_row + offsets
    if MASKED:
        mask = (rows < limit - start)[:, None] & (dims < D)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    if BLOCK_D != D:
        return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(pointer, tile, start, limit, stride_row, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the part of a (ROWS, BLOCK_D) tile that lies in a (limit, D) matrix of stride 1, from row `start` on."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    offsets = (tl.cast(start, tl.int64) + rows)[:, None] * stride_row + dims[None, :]
    mask = (rows < limit - start)[:, None] & (dims < D)[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b):
    """a @ b, accumulated in float32 (float64 for float64). "ieee": TF32 would take 13 bits off float32 operands."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def row_dots(a, b):
    """rowsum(a * b), each summed as `dot` sums: what `dot(a, c^T)` has, bit for bit, where a row of c is that of b."""
    rows = tl.arange(0, a.shape[0])
    return tl.sum(tl.where(rows[:, None] == rows[None, :], dot(a, b.T), 0.0), 1)


@triton.jit
def dot_add(acc, a, b):
    """acc + a @ b."""
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def scaled(s, SCALE: tl.constexpr, WIDE: tl.constexpr):
    """Products q k^T as scores: in base 2 for operands of 16 bits, in base e where they are WIDE (float32, float64).

    WIDE scores are rounded before anything is taken off them, so that a row's largest less itself is 0 and its lse, of
    one key, is the score: hence an fma, of which the compiler cannot make another with a subtraction, and the base of
    lse. 16-bit operands round their probabilities far more than an unrounded product moves them.
    """
    return tl.fma(s, tl.full([], SCALE, s.dtype), 0.0) if WIDE else s * (SCALE * LOG2_E)


@triton.jit
def exponential(s, WIDE: tl.constexpr):
    """The base of `scaled`, to the power of s."""
    return tl.exp2(s * LOG2_E) if WIDE else tl.exp2(s)


@triton.jit
def keep_mask(keys, queries, head, batch, seed, THRESHOLD: tl.constexpr):
    """Keep mask at global coordinates: `random.attention_keep_mask`, bit for bit. keys and queries broadcast."""
    bits, _, _, _ = tl.philox(seed, keys, queries, head, batch)
    return bits >= THRESHOLD


def block_d(D: int) -> int:
    """Width of a tile over the head dim: tl.dot takes powers of two from 16 on."""
    return max(16, triton.next_power_of_2(D))
