"""layer_norm on CPU tensors; its backward takes a block of rows at a time (see row_blocks)."""

import torch
import torch.nn.functional as F

from heiretsu.kernels import plain
from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.cpu.row_blocks import row_blocks
from heiretsu.kernels.dtypes import at_least_float32


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
        for block in row_blocks(x2.shape[0], C):
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
        return dx.view(x.shape), dweight, dbias, None


@checked
def layer_norm(x, weight, bias, eps=1e-5, residual=None):
    """`plain.layer_norm` on CPU tensors. x: (..., C). weight, bias: (C,). With residual: (normalised sum, sum)."""
    reverse_mode_only("layer_norm", x, weight, bias, residual)
    total = x if residual is None else x + residual
    weight, bias = weight.to(at_least_float32(total.dtype)), bias.to(at_least_float32(total.dtype))
    if torch.compiler.is_compiling():
        y = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    elif total.numel() == 0:
        y = plain.layer_norm(total, weight, bias, eps)
    else:
        y = _LayerNorm.apply(total, weight, bias, eps)[0]
    return y if residual is None else (y.to(x.dtype), total)
