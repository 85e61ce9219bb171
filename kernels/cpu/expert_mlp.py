"""Mixture of experts on CPU tensors: the meaning of `plain.expert_mlp`, in the fastest form that ATen allows.

Three things make `plain.expert_mlp` slow beside its GEMMs. Autograd gives `w1[e]` a zero-filled gradient the size of
all experts and adds E of them; every expert allocates its activations anew, and on a CPU fresh pages cost as much as
the arithmetic done on them; and GELU and the combine make several passes over memory. Here one custom op owns the loop
over experts: tokens are sorted by expert once, GEMMs write into slices of buffers that all experts share, the bias
rides in the GEMM, GELU and its derivative are taken block by block in the cache, and `embedding_bag` gathers, weights
and sums the K rows of a token in one pass, in order.

Saved for the backward: gelu(h) and gelu'(h) for h = x @ w1 + b1, both (N*K, F), and the experts' outputs (N*K, C), in
x's dtype. Nothing is recomputed but the gather of x and the cast of one expert's weights. Float32 weights beside a
bfloat16 x are cast expert by expert, so no second copy of all weights exists; their gradients pass through x's dtype,
as in `plain`.

N tokens, K experts per token, E experts, C hidden size, F feed-forward size.
"""

from itertools import accumulate

import torch

from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.cpu.gelu import Gelu
from heiretsu.kernels.dtypes import at_least_float32
from heiretsu.kernels.gradients import gradient_buffers


def _sort_by_expert(experts, num_experts):
    """(order, slot, blocks, end, largest): flat slots n * K + k sorted by expert, its inverse (N, K), {expert: slice of
    the sorted rows} for each expert that has rows, where the last of these ends, and the rows of the largest.

    An index outside 0..E-1 sorts behind the last expert: `plain` gives it no expert, and so a zero output.
    """
    flat = experts.reshape(-1)
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = flat.argsort(stable=True)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(order.numel(), device=order.device)
    counts = flat.bincount()[:num_experts].tolist()
    ends = accumulate(counts)
    blocks = {e: slice(end - count, end) for e, (count, end) in enumerate(zip(counts, ends, strict=True)) if count}
    return order, slot.view(experts.shape), blocks, sum(counts), max(counts, default=0)


def _combine(rows, slot, gates=None):
    """sum_k gates[n, k] * rows[slot[n, k]], accumulated in float32 and in the order of k; gates None means ones."""
    if gates is None or gates.dtype == rows.dtype:
        return torch.nn.functional.embedding_bag(slot, rows, per_sample_weights=gates, mode="sum")
    wide = torch.promote_types(rows.dtype, gates.dtype)
    return (rows[slot].to(wide) * gates.to(wide)[..., None]).sum(1).to(rows.dtype)


@torch.library.custom_op("heiretsu::cpu_expert_mlp", mutates_args=())
def _expert_mlp(
    x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None,
    w2: torch.Tensor, b2: torch.Tensor | None, save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, gelu(h), gelu'(h), y), rows sorted by expert; without save, the middle two are empty."""
    E, C, F = w1.shape
    order, slot, blocks, end, largest = _sort_by_expert(experts, E)
    rows = order.numel()
    all_a, slope = (x.new_empty(rows if save else 0, F) for _ in range(2))
    y = x.new_empty(rows, C)
    for buffer in (all_a, slope, y):
        buffer[end:] = 0  # rows of no expert
    if not rows or not C:
        return x.new_zeros(x.shape), all_a, slope, y
    tokens = order // experts.shape[1]
    x_rows, h_rows, a_rows = x.new_empty(largest, C), x.new_empty(largest, F), x.new_empty(0 if save else largest, F)
    gelu, scratch = Gelu(largest, F, at_least_float32(x.dtype)), _scratch(1, x, w1, w2)[0]
    for e, block in blocks.items():
        token = tokens[block]
        size = len(token)
        x_e = torch.index_select(x, 0, token, out=x_rows[:size])
        h = _linear(x_e, _cast(w1[e], scratch), None if b1 is None else b1[e], h_rows[:size])
        a = all_a[block] if save else a_rows[:size]
        gelu(h, None, a, slope[block] if save else None)
        _linear(a, _cast(w2[e], scratch), None if b2 is None else b2[e], y[block])
    return _combine(y, slot, gates), all_a, slope, y


def _scratch(count, x, w1, w2):
    """Memory for `count` weights of one expert in x's dtype; none where they have it already."""
    return x.new_empty(count, 0 if w1.dtype == w2.dtype == x.dtype else w1[:1].numel())


def _cast(weight, scratch):
    """One expert's weight in scratch's dtype: itself, or written over scratch."""
    return weight if weight.dtype == scratch.dtype else scratch.view(weight.shape).copy_(weight)


def _linear(x, weight, bias, out):
    if bias is None:
        return torch.mm(x, weight, out=out)
    return torch.addmm(bias.to(x.dtype), x, weight, out=out)


@_expert_mlp.register_fake
def _(x, experts, gates, w1, b1, w2, b2, save):
    rows, (_, C, F) = experts.numel(), w1.shape
    a, slope = (x.new_empty(rows if save else 0, F) for _ in range(2))
    return x.new_empty(x.shape), a, slope, x.new_empty(rows, C)


@torch.library.custom_op("heiretsu::cpu_expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    dout: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor, w1: torch.Tensor,
    b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None, a: torch.Tensor, slope: torch.Tensor,
    y: torch.Tensor, needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, dgates, dw1, db1, dw2, db2); empty for one that `needs` does not name, in this order."""
    E, C, F = w1.shape
    order, slot, blocks, end, largest = _sort_by_expert(experts, E)
    dx, dgates, dw1, db1, dw2, db2 = gradients = gradient_buffers((x, gates, w1, b1, w2, b2), needs)
    if not order.numel() or not C:
        return tuple(gradient.zero_() for gradient in gradients)
    need_dx, need_dgates, need_dw1, need_db1, need_dw2, need_db2 = needs
    need_dh = need_dx or need_dw1 or need_db1
    without_rows = [e for e in range(E) if e not in blocks]  # whose part nobody else writes
    for gradient, need in zip(gradients[2:], needs[2:], strict=True):
        if need:
            gradient[without_rows] = 0
    tokens, gate = order // experts.shape[1], gates.reshape(-1)[order].to(x.dtype)
    dx_rows = torch.empty_like(y) if need_dx else None  # dx of each row, then summed over k
    if need_dx:
        dx_rows[end:] = 0
    x_rows, dy_rows, dh_rows = x.new_empty(largest, C), x.new_empty(largest, C), x.new_empty(largest, F)
    dgate = gate.new_zeros(gate.shape, dtype=at_least_float32(gates.dtype))
    scratch, product = _scratch(2, x, w1, w2)
    for e, block in blocks.items():
        token = tokens[block]
        size = len(token)
        dy = torch.index_select(dout, 0, token, out=dy_rows[:size])
        if need_dgates:
            dgate[order[block]] = (y[block].to(dgate.dtype) * dy).sum(-1)
        dy *= gate[block, None]
        if need_dw2:
            _weight_gradient(a[block], dy, dw2[e], product)
        if need_db2:
            _bias_gradient(dy, db2[e])
        if need_dh:
            dh = torch.mm(dy, _cast(w2[e], scratch).T, out=dh_rows[:size])
            dh *= slope[block]
        if need_dw1:
            _weight_gradient(torch.index_select(x, 0, token, out=x_rows[:size]), dh, dw1[e], product)
        if need_db1:
            _bias_gradient(dh, db1[e])
        if need_dx:
            torch.mm(dh, _cast(w1[e], scratch).T, out=dx_rows[block])
    dx = _combine(dx_rows, slot) if need_dx else dx
    return dx, dgates.copy_(dgate.view(gates.shape)) if need_dgates else dgates, dw1, db1, dw2, db2


def _weight_gradient(inputs, grads, dweight, product):
    """Write dweight = inputs.T @ grads, in its own dtype. product: scratch."""
    if dweight.dtype == inputs.dtype:
        torch.mm(inputs.T, grads, out=dweight)
    else:
        dweight.copy_(torch.mm(inputs.T, grads, out=product.view(dweight.shape)))


def _bias_gradient(grads, dbias):
    """Write dbias = grads summed over rows, in its own dtype."""
    dbias.copy_(grads.sum(0, dtype=at_least_float32(dbias.dtype)))


@_expert_mlp_backward.register_fake
def _(dout, x, experts, gates, w1, b1, w2, b2, a, slope, y, needs):
    return gradient_buffers((x, gates, w1, b1, w2, b2), needs)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dout, *_):
    needs = [need for i, need in enumerate(ctx.needs_input_grad[:-1]) if i != 1]  # all floats: not experts, not save
    gradients = _expert_mlp_backward(dout.contiguous(), *ctx.saved_tensors, needs)
    dx, *others = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return dx, None, *others, None


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)


@checked
def expert_mlp(x, experts, gates, w1, b1, w2, b2):
    """`plain.expert_mlp` for CPU tensors: (N, C) in x's dtype."""
    reverse_mode_only("expert_mlp", x, gates, w1, b1, w2, b2)
    wants_gradient = any(t is not None and t.requires_grad for t in (x, gates, w1, b1, w2, b2))
    return _expert_mlp(x, experts, gates, w1, b1, w2, b2, torch.is_grad_enabled() and wants_gradient)[0]
