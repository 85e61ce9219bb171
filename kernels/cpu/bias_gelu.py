"""bias_gelu on CPU tensors, a block of rows at a time (see row_blocks)."""

import torch

from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.cpu.gelu import GELU_CUBIC, GELU_LINEAR, Gelu
from heiretsu.kernels.cpu.row_blocks import block_rows, slices
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
        Gelu(rows, width, wide)(x2, bias.to(wide), out, derivative)
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
        step = block_rows(width)
        scratch = derivative.new_empty(2, min(rows, step), width, dtype=wide)
        for block in slices(rows, step):
            d, wide_dout = scratch[:, : block.stop - block.start]
            d.copy_(derivative[block]).mul_(wide_dout.copy_(dout2[block]))
            if need_dx:
                dx[block] = d
            if need_dbias:
                dbias += d.sum(0)
        return dx.view(dout.shape) if need_dx else None, dbias.to(ctx.bias_dtype), None


@checked
def bias_gelu(x, bias):
    """`plain.bias_gelu` on CPU tensors: GELU(x + bias), tanh form. x: (..., F). bias: (F,)."""
    reverse_mode_only("bias_gelu", x, bias)
    if torch.compiler.is_compiling():
        u = x.to(at_least_float32(x.dtype)) + bias.to(at_least_float32(x.dtype))
        return (u * torch.sigmoid(u * (GELU_LINEAR + GELU_CUBIC * u * u))).to(x.dtype)
    save_derivative = torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad)
    return _BiasGelu.apply(x, bias, save_derivative)[0]
