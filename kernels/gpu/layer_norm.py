"""Layer norm over the last dim (Ba et al. 2016, arXiv:1607.06450), with the residual addition before it: one pass.

With xhat = (x - mean) rstd, rstd = 1 / sqrt(var + eps), wdy = weight dy:

    y = xhat weight + bias,    dx = rstd (wdy - mean(wdy) - xhat mean(wdy xhat)),
    dweight = sum of dy xhat over the rows,    dbias = sum of dy over the rows.

A program holds whole rows in registers, so that x is read once and the variance is taken about the mean: x and residual
in, sum and y out (4 values an element; apart, 5 or more). mean and rstd, one float each a row, are saved; the backward
recomputes xhat. In it, each program takes ROWS rows, and writes their dweight and dbias to one row of partial sums,
which are added in a fixed order, so that two runs give the same bits.

N rows, C columns, padded to BLOCK_C.
"""

import torch
import triton
import triton.language as tl

from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.dtypes import at_least_float32
from heiretsu.kernels.gpu import launch
from heiretsu.kernels.gpu.launch import Tiles, on_every_gpu
from heiretsu.kernels.gpu.row_tiles import as_rows, contiguous_like, load_tile, store_tile, widen
from heiretsu.kernels.gradients import gradient_buffers

# By C: a program holds BLOCK_N whole rows of next_power_of_2(C) values in registers. Headroom at C = 768, forward /
# backward: A100 3.95 / 2.48, H100 3.55 / 2.43, B200 1.86 / 1.28, MI300X 2.50 / 1.96; 48 / 64 registers on H100, 126 at
# most at C = 8192, no spills.
FORWARD = Tiles(
    "layer_norm_forward",
    on_every_gpu(
        {
            512: dict(BLOCK_N=4, num_warps=4, num_stages=1),
            1024: dict(BLOCK_N=2, num_warps=4, num_stages=1),
            2048: dict(BLOCK_N=1, num_warps=4, num_stages=1),
            4096: dict(BLOCK_N=1, num_warps=8, num_stages=1),
            16384: dict(BLOCK_N=1, num_warps=16, num_stages=1),
        }
    )
    | {"interpreter": {16384: dict(BLOCK_N=4, num_warps=4, num_stages=1)}},
)
BACKWARD = Tiles(
    "layer_norm_backward",
    on_every_gpu(
        {
            512: dict(ROWS=32, BLOCK_N=2, num_warps=4, num_stages=1),
            1024: dict(ROWS=16, BLOCK_N=1, num_warps=4, num_stages=1),
            2048: dict(ROWS=16, BLOCK_N=1, num_warps=8, num_stages=1),
            16384: dict(ROWS=16, BLOCK_N=1, num_warps=16, num_stages=1),
        }
    )
    | {"interpreter": {16384: dict(ROWS=8, BLOCK_N=4, num_warps=4, num_stages=1)}},
)


@triton.jit
def _forward_kernel(
    x_ptr,  # (N, C), rows stride_x apart
    residual_ptr,  # (N, C), rows stride_residual apart; unused without ADD
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    total_ptr,  # (N, C): x + residual, in the wider dtype of the two; unused without ADD
    y_ptr,  # (N, C)
    mean_ptr,  # (N,) float32 or float64
    rstd_ptr,  # (N,) float32 or float64
    N, C, stride_x, stride_residual, EPS: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    x = load_tile(x_ptr, rows, stride_x, cols, N, C)
    if ADD:
        x += load_tile(residual_ptr, rows, stride_residual, cols, N, C)
        store_tile(total_ptr, x, rows, cols, N, C)
        x = widen(x.to(total_ptr.dtype.element_ty))  # what the next layer sees is what is normalised
    mean = tl.sum(x, 1) / C
    centred = tl.where((cols < C)[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + EPS)
    tl.store(mean_ptr + rows, mean, mask=rows < N)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    weight = widen(tl.load(weight_ptr + cols, mask=cols < C, other=0.0))
    bias = widen(tl.load(bias_ptr + cols, mask=cols < C, other=0.0))
    store_tile(y_ptr, centred * rstd[:, None] * weight[None, :] + bias[None, :], rows, cols, N, C)


@triton.jit
def _backward_kernel(
    dy_ptr,  # (N, C), rows stride_dy apart
    dtotal_ptr,  # (N, C), rows stride_dtotal apart: gradient of the sum itself; unused without ADD
    x_ptr,  # (N, C), rows stride_x apart: what was normalised
    weight_ptr,  # (C,)
    mean_ptr,  # (N,)
    rstd_ptr,  # (N,)
    dx_ptr,  # (N, C), or None: not wanted
    dweight_ptr,  # (programs, C), partial sums, float32 or float64, or None
    dbias_ptr,  # (programs, C), partial sums, float32 or float64, or None
    N, C, stride_dy, stride_dtotal, stride_x, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    weight = widen(tl.load(weight_ptr + cols, mask=cols < C, other=0.0))
    dweight = tl.zeros([BLOCK_N, BLOCK_C], mean_ptr.dtype.element_ty)
    dbias = tl.zeros([BLOCK_N, BLOCK_C], mean_ptr.dtype.element_ty)
    for start in range(0, ROWS, BLOCK_N):
        rows = program * ROWS + start + tl.arange(0, BLOCK_N)
        x = load_tile(x_ptr, rows, stride_x, cols, N, C)
        dy = load_tile(dy_ptr, rows, stride_dy, cols, N, C)
        mean = tl.load(mean_ptr + rows, mask=rows < N, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
        xhat = (x - mean[:, None]) * rstd[:, None]  # beyond C any number: dy is 0 there
        wdy = weight[None, :] * dy
        along = tl.sum(wdy * xhat, 1) / C
        dx = (wdy - tl.sum(wdy, 1)[:, None] / C - xhat * along[:, None]) * rstd[:, None]
        if ADD:
            dx += load_tile(dtotal_ptr, rows, stride_dtotal, cols, N, C)
        if dx_ptr is not None:
            store_tile(dx_ptr, dx, rows, cols, N, C)
        dweight += dy * xhat
        dbias += dy
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * C + cols, tl.sum(dweight, 0), mask=cols < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * C + cols, tl.sum(dbias, 0), mask=cols < C)


def _block_c(C: int) -> int:
    return max(16, triton.next_power_of_2(C))


def _outputs(x, residual):
    """y, total (x + residual, or empty), mean, rstd."""
    N = x.numel() // max(1, x.shape[-1])
    total = x.new_empty(0)
    if residual is not None:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return contiguous_like(x), total, *(x.new_empty(N, dtype=at_least_float32(total.dtype)) for _ in range(2))


@torch.library.custom_op("heiretsu::layer_norm", mutates_args=())
def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, total, mean, rstd = _outputs(x, residual)
    if x.numel() == 0:
        return y, total, mean, rstd
    rows = as_rows(x)
    residual_rows = rows if residual is None else as_rows(residual)
    N, C = rows.shape
    chosen = FORWARD.parameters(x.device, C, x.itemsize)
    chosen.launch(
        _forward_kernel, (triton.cdiv(N, chosen["BLOCK_N"]),),
        rows, residual_rows, weight, bias, total, y, mean, rstd, N, C, rows.stride(0), residual_rows.stride(0),
        EPS=eps, ADD=residual is not None, BLOCK_C=_block_c(C),
    )  # fmt: skip
    return y, total, mean, rstd


@_forward.register_fake
def _(x, residual, weight, bias, eps):
    return _outputs(x, residual)


@torch.library.custom_op("heiretsu::layer_norm_backward", mutates_args=())
def _backward(
    dy: torch.Tensor, dtotal: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    mean: torch.Tensor, rstd: torch.Tensor, needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx (in the dtype of x: what was normalised), dweight, dbias; an empty tensor for one that is not needed."""
    dx, dweight, dbias = gradient_buffers((x, weight, bias), needs)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    rows, dy_rows = as_rows(x), as_rows(dy)
    dtotal_rows = dy_rows if dtotal is None else as_rows(dtotal)
    N, C = rows.shape
    chosen = BACKWARD.parameters(x.device, C, x.itemsize)
    programs = triton.cdiv(N, chosen["ROWS"])
    parts = [mean.new_empty(programs, C) if need else None for need in needs[1:]]
    chosen.launch(
        _backward_kernel, (programs,),
        dy_rows, dtotal_rows, rows, weight, mean, rstd, dx if needs[0] else None, *parts, N, C,
        dy_rows.stride(0), dtotal_rows.stride(0), rows.stride(0), ADD=dtotal is not None, BLOCK_C=_block_c(C),
    )  # fmt: skip
    for gradient, part in zip((dweight, dbias), parts, strict=True):
        if part is not None:
            gradient.copy_(part.sum(0))
    return dx, dweight, dbias


@_backward.register_fake
def _(dy, dtotal, x, weight, bias, mean, rstd, needs):
    return gradient_buffers((x, weight, bias), needs)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.add = residual is not None
    ctx.dtype, ctx.residual_dtype = x.dtype, residual.dtype if ctx.add else None
    ctx.mark_non_differentiable(mean, rstd) if ctx.add else ctx.mark_non_differentiable(total, mean, rstd)
    ctx.save_for_backward(total if ctx.add else x, weight, bias, mean, rstd)


def _autograd_backward(ctx, dy, dtotal, *_):
    need_dx, need_dresidual, *need_parameters, _ = ctx.needs_input_grad
    needs = [need_dx or need_dresidual, *need_parameters]
    dtotal_in, *of_parameters = _backward(dy, dtotal if ctx.add else None, *ctx.saved_tensors, needs)
    dx = dtotal_in.to(ctx.dtype) if need_dx else None
    return dx, dtotal_in.to(ctx.residual_dtype) if need_dresidual else None, *of_parameters, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@checked
def layer_norm(x, weight, bias, eps=1e-5, residual=None):
    """Layer norm over the last dim in Triton: `plain.layer_norm`.

    x: (..., C) float, any strides, C up to 16384. weight, bias: (C,) float, whose dtypes may differ from x's.
    residual: of x's shape, or None. Returns y (..., C) in x's dtype; with residual (y of the sum, x + residual in the
    wider dtype of the two).
    """
    launch.require_device("layer_norm", x)
    reverse_mode_only("layer_norm", x, weight, bias, residual)
    y, total, _, _ = _forward(x, residual, weight.contiguous(), bias.contiguous(), float(eps))
    if residual is None:
        return y
    return y, total if x.requires_grad or residual.requires_grad else total.detach()  # y alone may need a gradient
