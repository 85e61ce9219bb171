"""Attention as Triton kernels: the operator, its gradient and its public functions.

The kernels are in attention_forward.py and attention_backward.py, which say what they compute and cost;
`plain.attention_lse` is the specification. Memory beyond the inputs: out, lse, and in the backward the gradients and
two floats a row.
float32, float16 and bfloat16 on a GPU; float64 in the interpreter as well.
"""

import torch

from heiretsu.kernels.arguments import attention_options, checked, reverse_mode_only
from heiretsu.kernels.dtypes import at_least_float32
from heiretsu.kernels.gpu import attention_backward, attention_forward, launch
from heiretsu.kernels.random import Dropout


@torch.library.custom_op("heiretsu::attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, dropout_p: float, seed: int,
    batch_offset: int, head_offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if q.numel() == 0 or k.numel() == 0:
        out, lse = _attention_fake(q, k, v, causal, scale, dropout_p, seed, batch_offset, head_offset)
        return out.zero_(), lse.fill_(-torch.inf)
    return attention_forward.forward(q, k, v, causal, scale, Dropout.of(dropout_p, seed, batch_offset, head_offset))


@_attention.register_fake
def _attention_fake(q, k, v, causal, scale, dropout_p, seed, batch_offset, head_offset):
    B, H, T, D = q.shape
    lse = q.new_empty(B, H, T, dtype=at_least_float32(q.dtype))
    return q.new_empty(B, T, H, D).transpose(1, 2), lse


@torch.library.custom_op("heiretsu::attention_backward", mutates_args=())
def _attention_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float, dropout_p: float, seed: int,
    batch_offset: int, head_offset: int, need_dq: bool, need_dkdv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv; an empty tensor for one that is not needed."""
    if q.numel() == 0 or k.numel() == 0:
        fakes = _attention_backward_fake(dout, dlse, q, k, v, out, lse, causal, scale, dropout_p, seed, batch_offset,
                                         head_offset, need_dq, need_dkdv)  # fmt: skip
        return tuple(grad.zero_() for grad in fakes)
    dropout = Dropout.of(dropout_p, seed, batch_offset, head_offset)
    grads = attention_backward.backward(dout, dlse, q, k, v, out, lse, causal, scale, dropout, need_dq, need_dkdv)
    dq, dk, dv = (q.new_empty(0) if grad is None else grad for grad in grads)
    return dq, dk, dv


@_attention_backward.register_fake
def _attention_backward_fake(dout, dlse, q, k, v, out, lse, causal, scale, dropout_p, seed, batch_offset, head_offset,
                             need_dq, need_dkdv):  # fmt: skip
    def gradient(t, needed):
        B, H, length, D = t.shape
        return t.new_empty(B, length, H, D).transpose(1, 2) if needed else t.new_empty(0)

    return gradient(q, need_dq), gradient(k, need_dkdv), gradient(v, need_dkdv)


def _setup_context(ctx, inputs, output):
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # an lse that nobody uses costs nothing in the backward


def _differentiate(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None:
        dout = q.new_zeros(()).expand_as(q)
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    grads = _attention_backward(dout, dlse, q, k, v, out, lse, *ctx.options, need_q, need_k or need_v)
    return (*grads, *(None for _ in ctx.options))


_attention.register_autograd(_differentiate, setup_context=_setup_context)


@checked
def attention_lse(q, k, v, causal=True, scale=None, dropout_p=0.0, seed=0, offsets=(0, 0)):
    """`plain.attention_lse` as a Triton kernel: out (B, H, T, D) and lse (B, H, T), both differentiable.

    q (B, H, T, D); k, v (B, Hkv, S, D): any strides, one dtype, Hkv divides H, D at most 256.
    out lies in memory as (B, T, H, D): out.transpose(1, 2).reshape(B, T, H * D) copies nothing.
    """
    return _launch(q, k, v, causal, scale, dropout_p, seed, offsets)


@checked
def attention(q, k, v, causal=True, scale=None, dropout_p=0.0, seed=0, offsets=(0, 0)):
    """`attention_lse` without the lse: (B, H, T, D) in q's dtype."""
    return _launch(q, k, v, causal, scale, dropout_p, seed, offsets)[0]


def _launch(q, k, v, *options):
    launch.require_device("attention", q)
    if q.dtype == torch.float64 and q.device.type != "cpu":
        raise ValueError("attention: the Triton kernel takes float64 in the interpreter only; use float32 on a GPU")
    reverse_mode_only("attention", q, k, v)
    return _attention(q, k, v, *attention_options(q, *options))
