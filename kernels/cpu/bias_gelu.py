"""bias_gelu on CPU tensors, a block of rows at a time (see row_blocks)."""

import torch

from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.cpu.gelu import GELU_CUBIC, GELU_LINEAR, gelu_block
from heiretsu.kernels.cpu.row_blocks import row_blocks, scratch
from heiretsu.kernels.dtypes import at_least_float32


class _BiasGelu(torch.autograd.Function):
    """Saves the derivative instead of the input: it comes almost free beside the sigmoid that the value needs, takes
    the same memory as x, and leaves the backward one product."""

    @staticmethod
    def forward(x, bias, save_derivative):
        rows, width = x.numel() // max(1, bias.numel()), bias.numel()
        x2, wide = x.reshape(rows, width), at_least_float32(x.dtype)
        out = torch.empty_like(x2, memory_format=torch.contiguous_format)
        derivative = torch.empty_like(out) if save_derivative else None
        blocks = row_blocks(rows, width)
        all_u, all_q, all_s, all_r = scratch(blocks, width, wide, 4)
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
        dout2, wide = dout.reshape(rows, width), at_least_float32(dout.dtype)
        dx = torch.empty_like(derivative) if need_dx else None
        dbias = derivative.new_zeros(width, dtype=wide)
        blocks = row_blocks(rows, width)
        all_d, all_dout = scratch(blocks, width, wide, 2)
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
        u = x.to(at_least_float32(x.dtype)) + bias.to(at_least_float32(x.dtype))
        return (u * torch.sigmoid(u * (GELU_LINEAR + GELU_CUBIC * u * u))).to(x.dtype)
    save_derivative = torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad)
    return _BiasGelu.apply(x, bias, save_derivative)[0]
