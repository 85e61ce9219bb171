"""GELU(x + bias), tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415), in one pass forward and one backward:

    out = gelu(x + bias),   dx = dout gelu'(x + bias),   dbias = sum of dx over the rows.

Bytes: 2 values an element forward and 3 backward, which recomputes u; unfused 4 and 7. dbias: each program sums its own
rows into one row of partial sums, and these are added in a fixed order, so that two runs give the same bits.

N rows (all leading dims of x), F columns.
"""

import torch
import triton
import triton.language as tl

from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.dtypes import at_least_float32
from heiretsu.kernels.gpu import launch
from heiretsu.kernels.gpu.gelu import gelu, gelu_and_derivative
from heiretsu.kernels.gpu.launch import Tiles, on_every_gpu
from heiretsu.kernels.gpu.row_tiles import as_rows, contiguous_like, load_tile, store_tile
from heiretsu.kernels.gradients import gradient_buffers

# Headroom over DRAM at bf16, forward / backward: A100 2.23 / 1.98, H100 2.26 / 2.36, B200 1.18 / 1.39, MI300X
# 1.11 / 1.50; 40 / 72 registers on H100. Twice the backward's tile costs 136 registers and gains nothing.
FORWARD = Tiles(
    "bias_gelu_forward",
    on_every_gpu({None: dict(BLOCK_N=8, BLOCK_F=512, num_warps=4, num_stages=1)})
    | {"interpreter": {None: dict(BLOCK_N=8, BLOCK_F=32, num_warps=4, num_stages=1)}},
)
BACKWARD = Tiles(
    "bias_gelu_backward",
    on_every_gpu({None: dict(ROWS=64, BLOCK_N=4, BLOCK_F=512, num_warps=4, num_stages=1)})
    | {"interpreter": {None: dict(ROWS=16, BLOCK_N=8, BLOCK_F=32, num_warps=4, num_stages=1)}},
)


@triton.jit
def _forward_kernel(
    x_ptr,  # (N, F), rows stride_x apart
    bias_ptr,  # (F,)
    out_ptr,  # (N, F)
    N, F, stride_x, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    col_blocks = tl.cdiv(F, BLOCK_F)
    rows = (tl.program_id(0) // col_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (tl.program_id(0) % col_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    WIDE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    bias = tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(WIDE)
    out = gelu(load_tile(x_ptr, rows, stride_x, cols, N, F) + bias[None, :])
    store_tile(out_ptr, out, rows, cols, N, F)


@triton.jit
def _backward_kernel(
    dout_ptr,  # (N, F), rows stride_dout apart
    x_ptr,  # (N, F), rows stride_x apart
    bias_ptr,  # (F,)
    dx_ptr,  # (N, F), or None: not wanted
    partial_ptr,  # (blocks of ROWS rows, F), float32 or float64: sums of dx over the rows of a block; or None
    N, F, stride_dout, stride_x, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    col_blocks = tl.cdiv(F, BLOCK_F)
    row_block = (tl.program_id(0) // col_blocks).to(tl.int64)
    cols = (tl.program_id(0) % col_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    WIDE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    bias = tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(WIDE)
    total = tl.zeros([BLOCK_N, BLOCK_F], WIDE)
    for start in range(0, ROWS, BLOCK_N):
        rows = row_block * ROWS + start + tl.arange(0, BLOCK_N)
        x = load_tile(x_ptr, rows, stride_x, cols, N, F)
        dout = load_tile(dout_ptr, rows, stride_dout, cols, N, F)
        _, slope = gelu_and_derivative(x + bias[None, :])
        dx = dout * slope
        total += dx  # rows beyond N have dout 0
        if dx_ptr is not None:
            store_tile(dx_ptr, dx, rows, cols, N, F)
    if partial_ptr is not None:
        tl.store(partial_ptr + row_block * F + cols, tl.sum(total, 0), mask=cols < F)


@torch.library.custom_op("heiretsu::bias_gelu", mutates_args=())
def _forward(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    out = contiguous_like(x)
    if x.numel() == 0:
        return out
    rows, F = as_rows(x), x.shape[-1]
    chosen = FORWARD.parameters(x.device, itemsize=x.itemsize)
    grid = (triton.cdiv(rows.shape[0], chosen["BLOCK_N"]) * triton.cdiv(F, chosen["BLOCK_F"]),)
    chosen.launch(_forward_kernel, grid, rows, bias, out, rows.shape[0], F, rows.stride(0))
    return out


@_forward.register_fake
def _(x, bias):
    return contiguous_like(x)


@torch.library.custom_op("heiretsu::bias_gelu_backward", mutates_args=())
def _backward(
    dout: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, need_dx: bool, need_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dbias; an empty tensor for one that is not needed."""
    dx, dbias = gradient_buffers((x, bias), (need_dx, need_dbias))
    if x.numel() == 0:
        return dx, dbias.zero_()
    rows, dout_rows, F = as_rows(x), as_rows(dout), x.shape[-1]
    chosen = BACKWARD.parameters(x.device, itemsize=x.itemsize)
    row_blocks = triton.cdiv(rows.shape[0], chosen["ROWS"])
    partial = x.new_empty(row_blocks, F, dtype=at_least_float32(x.dtype)) if need_dbias else None
    chosen.launch(
        _backward_kernel, (row_blocks * triton.cdiv(F, chosen["BLOCK_F"]),),
        dout_rows, rows, bias, dx if need_dx else None, partial, rows.shape[0], F, dout_rows.stride(0), rows.stride(0),
    )  # fmt: skip
    return dx, partial.sum(0).to(bias.dtype) if need_dbias else dbias


@_backward.register_fake
def _(dout, x, bias, need_dx, need_dbias):
    return gradient_buffers((x, bias), (need_dx, need_dbias))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx, dout):
    return _backward(dout, *ctx.saved_tensors, *ctx.needs_input_grad)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@checked
def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU(x + bias), tanh form, in Triton: `plain.bias_gelu`.

    x: (..., F) float, any strides. bias: (F,) float, whose dtype may differ. Returns (..., F) in x's dtype, contiguous.
    """
    launch.require_device("bias_gelu", x)
    reverse_mode_only("bias_gelu", x, bias)
    return _forward(x, bias.contiguous())
