"""What the kernels over rows (bias_gelu, layer_norm, dropout) share: tiles of a (N, C) matrix, widened for arithmetic.

Kernels widen what they load to float32 (float64 stays) and narrow what they store; nothing is computed in 16 bits.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def widen(tile):
    """In float32, or float64 if it is."""
    return tile if tile.dtype == tl.float64 else tile.to(tl.float32)


@triton.jit
def load_tile(pointer, rows, stride, cols, N, C):
    """(rows, cols) of a (N, C) matrix whose rows are `stride` apart, widened; 0 outside. rows: int64."""
    mask = (rows < N)[:, None] & (cols < C)[None, :]
    return widen(tl.load(pointer + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0))


@triton.jit
def store_tile(pointer, tile, rows, cols, N, C):
    """Narrow a tile and store the part of it that lies in a contiguous (N, C) matrix."""
    mask = (rows < N)[:, None] & (cols < C)[None, :]
    tl.store(pointer + rows[:, None] * C + cols[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as (N, C), each row contiguous: a view where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def contiguous_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
