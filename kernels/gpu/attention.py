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
from heiretsu.kernels.gpu.attention_tiles import block_d
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
    dq, dk, dv = _attention_backward(dout, dlse, q, k, v, out, lse, *ctx.options, need_q, need_k or need_v)
    grads = (dq if need_q else None, dk if need_k else None, dv if need_v else None)
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


# {kernel: (function, matrix products a block, bf16 pointers, float32 pointers, operands with strides)}; of an operand
# "qt" the batch, heads and length strides are stride_qb, stride_qh and stride_qt, and the head dim's is 1.
_AUDITED = {
    "attention_forward": (attention_forward._forward_kernel, 2, "q k v out", "lse", "qt ks vs"),
    "attention_delta": (attention_backward._delta_kernel, 0, "out dout", "lse delta lse_log2", "ot"),
    "attention_dkdv": (attention_backward._dkdv_kernel, 4, "q k v dout dk dv", "lse_log2 delta", "qt ks vs ot"),
    "attention_dq": (attention_backward._dq_kernel, 3, "q k v dout dq", "lse_log2 delta", "qt ks vs ot"),
}


# What Philox leaves of the tensor cores' peak for one matrix product of D = 64, less a tenth.
_DROPOUT_BOUND = {"ampere": 0.075, "hopper": 0.045, "blackwell": 0.02, "cdna3": 0.045}
# Bytes that a thread spills, where it does; D = 256 is not what the tiles are made for.
_SPILLS = {
    ("hopper", "attention_dkdv D256"): 248,
    ("hopper", "attention_dkdv D256 groups of 4"): 256,
    ("hopper", "attention_dq D256"): 32,
    ("hopper", "attention_dkdv D256 dropout"): 176,
    ("hopper", "attention_dq D256 dropout"): 128,
    ("blackwell", "attention_forward D256 fp32"): 32,
}


def audit_cases(arch) -> list[launch.AuditCase]:
    """The launches of architecture class `arch`: causal, D 64, 128 and 256, on views of a fused projection; in bf16
    without and with dropout, dk and dv also of groups of 4 heads, and in float32.
    """
    cases = [_audit_case(arch, kernel, D) for kernel in _AUDITED for D in (64, 128, 256)]
    with_mask = [kernel for kernel in _AUDITED if kernel != "attention_delta"]
    cases += [_audit_case(arch, kernel, D, dropout=True) for kernel in with_mask for D in (64, 128, 256)]
    cases += [_audit_case(arch, "attention_dkdv", D, group=4) for D in (64, 128, 256)]
    cases += [_audit_case(arch, "attention_dkdv", D, dropout=True, group=4) for D in (64, 128)]
    return cases + [_audit_case(arch, kernel, D, "fp32") for kernel in with_mask for D in (64, 128, 256)]


def _audit_case(arch, kernel, D, dtype="bf16", dropout=False, group=1):
    function, products, operands, floats, strided = _AUDITED[kernel]
    signature = {f"{name}_ptr": f"*{dtype}:16" for name in operands.split()}
    signature |= {f"{name}_ptr": "*fp32:16" for name in floats.split()}
    signature |= {f"stride_{name[0]}{dim}": "i32:16" for name in strided.split() for dim in ("b", "h", name[1])}
    blocks = launch.lookup(kernel, arch, D, itemsize=4 if dtype == "fp32" else 2, dropout=dropout)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    constexprs = {f"stride_{name[0]}d": 1 for name in strided.split()} | {"D": D, "BLOCK_D": block_d(D)} | blocks
    if kernel == "attention_delta":
        signature |= dict.fromkeys(("stride_lb", "stride_lh", "stride_lt", "H", "T"), "i32")
        return launch.AuditCase(f"{kernel} D{D}", function, signature, constexprs | {"dlse_ptr": None}, **options)
    signature |= dict.fromkeys(("H", "T", "S", "batch_offset", "head_offset"), "i32") | {"seed": "i64"}
    constexprs |= dict(GROUP=group, CAUSAL=True, SCALE=D**-0.5, DROP_BELOW=0, KEEP_SCALE=1.0)
    special = [name for name, wanted in (("dropout", dropout), ("groups of 4", group == 4)) if wanted]
    name = f"{kernel} D{D} {dtype if dtype == 'fp32' else ', '.join(special)}".strip()
    bars: dict = dict(max_spill_bytes=_SPILLS.get((arch, name), 0), quick=name == f"{kernel} D{D}")
    if dropout:
        constexprs |= dict(DROP_BELOW=2**32 // 10, KEEP_SCALE=1 / 0.9)
    if D <= 128 and dtype == "bf16":  # beyond, some compute a product twice, which the closed form does not know
        bars["loop_flops"] = 2 * products * blocks["BLOCK_M"] * blocks["BLOCK_N"] * block_d(D)
        bars["min_bound"] = _DROPOUT_BOUND[arch] * products * D / 64 if dropout else 0.0
    return launch.AuditCase(name, function, signature, constexprs, **options, **bars)
