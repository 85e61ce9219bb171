"""CPU forms of bias_gelu, dropout and layer_norm: ATen passes over blocks of rows that stay in the cache.

A bf16 activation costs ATen either slow mixed-dtype loops or float32 copies of the whole tensor; here a block of rows
is widened to float32, worked on in place and narrowed again, so the only traffic is reading the input and writing the
output.

While torch.compile traces (torch.compiler.is_compiling()), each op is its formula instead: Inductor fuses that into one
pass itself, and better than anything opaque to it.
"""

import math

import torch
import torch.nn.functional as F

from heiretsu.kernels import plain
from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.cpu.random import BlockPhilox
from heiretsu.kernels.random import drop_threshold, signed

# Elements of a block. Four float32 blocks of 2**17 are 2 MiB, the L2 caches of two cores; smaller ones pay more for
# calling ATen than they save (measured 2**14 to 2**20: 2**17 and 2**18 best with 1 and with 2 threads).
_BLOCK_ELEMENTS = 1 << 17

# GELU's tanh form without a tanh: 0.5 (1 + tanh(s)) = sigmoid(2 s), with 2 s = u (GELU_LINEAR + GELU_CUBIC u**2).
GELU_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715 * GELU_LINEAR


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(rows, row_elements):
    """Slices over 0..rows of about _BLOCK_ELEMENTS elements each."""
    step = max(1, _BLOCK_ELEMENTS // max(1, row_elements))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _scratch(blocks, row_elements, dtype, count):
    rows = blocks[0].stop if blocks else 0
    return [torch.empty(rows, row_elements, dtype=dtype, device="cpu") for _ in range(count)]


def gelu_block(u, out, derivative, q, s, r, linear):
    """out = GELU(u) and, unless it is None, derivative = GELU'(u), in their dtypes; u and scratch q, s, r are lost.

    u, q, s, r, linear: of one shape, float32 or float64, small enough for the cache. linear: filled with GELU_LINEAR.
    """
    torch.addcmul(linear, u, u, value=GELU_CUBIC, out=q)
    torch.mul(u, q, out=s)
    exact = out.dtype == u.dtype  # 1 - s loses to cancellation what bf16 and fp16 cannot show
    if derivative is not None and exact:
        torch.neg(s, out=r).sigmoid_()
    s.sigmoid_()
    out.copy_(u.mul_(s))  # u sigmoid(u q)
    if derivative is not None:  # s + u s (1 - s) d(u q)/du, and d(u q)/du = 3 q - 2 GELU_LINEAR
        u.mul_(r) if exact else u.addcmul_(u, s, value=-1.0)
        derivative.copy_(s.addcmul_(u, q, value=3.0).add_(u, alpha=-2.0 * GELU_LINEAR))


class _BiasGelu(torch.autograd.Function):
    """Saves the derivative instead of the input: it comes almost free beside the sigmoid that the value needs, takes
    the same memory as x, and leaves the backward one product."""

    @staticmethod
    def forward(x, bias, save_derivative):
        rows, width = x.numel() // max(1, bias.numel()), bias.numel()
        x2, wide = x.reshape(rows, width), _wide(x.dtype)
        out = torch.empty_like(x2, memory_format=torch.contiguous_format)
        derivative = torch.empty_like(out) if save_derivative else None
        blocks = _blocks(rows, width)
        all_u, all_q, all_s, all_r = _scratch(blocks, width, wide, 4)
        linear, bias = torch.full_like(all_u, GELU_LINEAR), bias.to(wide)
        for block in blocks:
            n = block.stop - block.start
            u, q, s, r = all_u[:n], all_q[:n], all_s[:n], all_r[:n]
            u.copy_(x2[block]).add_(bias)
            gelu_block(u, out[block], derivative[block] if save_derivative else None, q, s, r, linear[:n])
        return out.view(x.shape), derivative

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, bias, save_derivative = inputs
        ctx.bias_dtype = bias.dtype
        if save_derivative:
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, _):
        (derivative,) = ctx.saved_tensors
        rows, width = derivative.shape
        need_dx, need_dbias = ctx.needs_input_grad[:2]
        dout2, wide = dout.reshape(rows, width), _wide(dout.dtype)
        dx = torch.empty_like(derivative) if need_dx else None
        dbias = derivative.new_zeros(width, dtype=wide)
        blocks = _blocks(rows, width)
        all_d, all_dout = _scratch(blocks, width, wide, 2)
        for block in blocks:
            n = block.stop - block.start
            d = all_d[:n].copy_(derivative[block]).mul_(all_dout[:n].copy_(dout2[block]))
            if need_dx:
                dx[block] = d
            if need_dbias:
                dbias += d.sum(0)
        return dx.view(dout.shape) if need_dx else None, dbias.to(ctx.bias_dtype) if need_dbias else None, None


@checked
def bias_gelu(x, bias):
    """`plain.bias_gelu` on CPU tensors: GELU(x + bias), tanh form. x: (..., F). bias: (F,)."""
    reverse_mode_only("bias_gelu", x, bias)
    if torch.compiler.is_compiling():
        u = x.to(_wide(x.dtype)) + bias.to(_wide(x.dtype))
        return (u * torch.sigmoid(u * (GELU_LINEAR + GELU_CUBIC * u * u))).to(x.dtype)
    save_derivative = torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad)
    return _BiasGelu.apply(x, bias, save_derivative)[0]


class _LayerNorm(torch.autograd.Function):
    """ATen's layer norm takes bf16 rows with float32 parameters; its backward in that mix sums dweight and dbias in
    bf16 (off by 13 in 2048 rows), so the backward widens blocks of rows to float32 and adds up their sums."""

    @staticmethod
    def forward(x, weight, bias, eps):
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _ = inputs
        ctx.save_for_backward(x, weight, bias, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, *_):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        C = x.shape[-1]
        x2, dout2, mean, rstd = x.reshape(-1, C), dout.reshape(-1, C), mean.view(-1, 1), rstd.view(-1, 1)
        dx = torch.empty_like(x2, memory_format=torch.contiguous_format)
        dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
        need_dx, need_dweight, need_dbias, _ = ctx.needs_input_grad
        for block in _blocks(x2.shape[0], C):
            wide_dout, wide_x = dout2[block].to(weight.dtype), x2[block].to(weight.dtype)
            block_dx, block_dweight, block_dbias = torch.ops.aten.native_layer_norm_backward(
                wide_dout, wide_x, [C], mean[block], rstd[block], weight, bias, [need_dx, need_dweight, need_dbias]
            )
            if need_dx:
                dx[block] = block_dx
            if need_dweight:
                dweight += block_dweight
            if need_dbias:
                dbias += block_dbias
        dx = dx.view(x.shape) if need_dx else None
        return dx, dweight if need_dweight else None, dbias if need_dbias else None, None


@checked
def layer_norm(x, weight, bias, eps=1e-5, residual=None):
    """`plain.layer_norm` on CPU tensors. x: (..., C). weight, bias: (C,). With residual: (normalised sum, sum)."""
    reverse_mode_only("layer_norm", x, weight, bias, residual)
    total = x if residual is None else x + residual
    weight, bias = weight.to(_wide(total.dtype)), bias.to(_wide(total.dtype))
    if torch.compiler.is_compiling():
        y = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    elif total.numel() == 0:
        y = plain.layer_norm(total, weight, bias, eps)
    else:
        y = _LayerNorm.apply(total, weight, bias, eps)[0]
    return y if residual is None else (y.to(x.dtype), total)


def keep_mask(shape, p, seed, offset=0):
    """`random.dropout_keep_mask` bit for bit, (B, T, C) bool, in blocks of a sample that the cache holds."""
    B, T, C = shape
    keep, threshold = torch.empty(shape, dtype=torch.bool, device="cpu"), drop_threshold(p)
    positions, channels = torch.arange(T, device="cpu"), torch.arange(C, device="cpu")
    blocks = _blocks(T, C)
    random = BlockPhilox(blocks[0].stop * C)
    for b in range(B):
        for block in blocks:
            bits = random.draw(seed, positions[block], channels, head=0, batch=(b + offset) & 0xFFFFFFFF)
            torch.ge(bits, threshold, out=keep[b, block])
    return keep


@torch.library.custom_op("heiretsu::cpu_dropout", mutates_args=())
def _dropout(x: torch.Tensor, p: float, seed: int, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator and not its formula, so that one compiled graph serves every seed. Returns out and the mask."""
    keep = keep_mask(x.shape, p, seed, offset)
    return torch.where(keep, x / (1.0 - p), 0.0).contiguous(), keep


@_dropout.register_fake
def _(x, p, seed, offset):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out, dtype=torch.bool)


def _setup_dropout(ctx, inputs, output):
    ctx.keep_probability = 1.0 - inputs[1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _dropout_backward(ctx, dout, _):
    return torch.where(ctx.saved_tensors[0], dout / ctx.keep_probability, 0.0), None, None, None


_dropout.register_autograd(_dropout_backward, setup_context=_setup_dropout)


@checked
def dropout(x, p, seed, offset=0):
    """`plain.dropout` on CPU tensors; saves the mask, one byte an element. x: (B, T, C)."""
    if p == 0.0 or x.numel() == 0:
        return plain.dropout(x, p, seed, offset)
    reverse_mode_only("dropout", x)
    return _dropout(x, float(p), signed(seed), offset)[0]
