"""Mixture-of-experts feed-forward on Triton kernels: dropless, with no permuted, expanded or padded copy of the tokens.

For token n with experts e_k and gates g_k (Gale et al. 2022, arXiv:2211.15841; Tan et al. 2024, arXiv:2403.08245):
    out[n] = sum_k g_k (gelu(x[n] W1[e_k] + b1[e_k]) W2[e_k] + b2[e_k])

Forward, for R = N * K rows sorted by expert (`routing_plan.make_plan`):
    h, a = x[token] W1 + b1, gelu(h)      grouped GEMM; gathers x in its loads, bias and GELU in its epilogue
    y    = a W2 + b2                      grouped GEMM
    out  = sum_k g_k y[row of (n, k)]     one pass, k in order, in float32
Backward:
    dg, db2 parts                         one pass over y and dout[token]
    dh, g a, db1 parts                    grouped GEMM dout[token] W2^T; GELU's backward and the gate in its epilogue
    dW2  = (g a)^T dout[token]            grouped over experts; gathers dout
    dW1  = x[token]^T dh                  grouped over experts; gathers x
    dx   = sum_k (dh W1^T)[row]           grouped GEMM and one pass
Saved: h (R, F), y (R, C) and the plan. gelu(h) is recomputed, in an epilogue that has h in registers anyway: it costs
one write, and halves what the op keeps between forward and backward. The gate multiplies after the product, so that no
gated copy of dout exists. When no gradient is wanted, h is not written at all.

FLOPs are those of the six GEMMs, 12 R C F. Bytes, against the unfused form: no (R, C) gather of x or dout, no pass over
(R, F) for bias, GELU or its backward. Weights of another dtype than x (float32 masters) are cast once per pass, 2 E C F
elements; their gradients leave the float32 accumulators in the weights' own dtype, unrounded.

Deterministic: every sum has a fixed order. No host sync: grids are upper bounds from shapes.

N tokens, K experts per token, E experts, C hidden size, F feed-forward size.
"""

import torch
import triton
import triton.language as tl

from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.dtypes import at_least_float32
from heiretsu.kernels.gpu import grouped_gemm, launch
from heiretsu.kernels.gpu.grouped_gemm import find_tile
from heiretsu.kernels.gpu.launch import Tiles, accumulator, on_every_gpu
from heiretsu.kernels.gpu.routing_plan import RoutingPlan, make_plan
from heiretsu.kernels.gradients import gradient_buffers

# The passes over rows beside the GEMMs, whose tiles are in grouped_gemm.py.
COMBINE = Tiles(
    "moe_combine",
    on_every_gpu({None: dict(BLOCK_N=16, BLOCK_C=256, num_warps=4, num_stages=1)})
    | {"interpreter": {None: dict(BLOCK_N=16, BLOCK_C=32, num_warps=4, num_stages=1)}},
)
COMBINE_BACKWARD = Tiles(
    "moe_combine_backward",
    on_every_gpu({None: dict(BLOCK_M=16, BLOCK_C=256, num_warps=4, num_stages=1)})
    | {"interpreter": {None: dict(BLOCK_M=16, BLOCK_C=32, num_warps=4, num_stages=1)}},
)
SUM_TILES = Tiles(
    "moe_sum_tiles",
    on_every_gpu({None: dict(BLOCK_T=16, BLOCK_C=64, num_warps=4, num_stages=1)})
    | {"interpreter": {None: dict(BLOCK_T=2, BLOCK_C=32, num_warps=4, num_stages=1)}},
)


@triton.jit
def _combine_kernel(
    rows_ptr,  # (R, C)
    gates_ptr,  # (N, K) or unused
    slot_rows_ptr,  # (N, K) int32
    out_ptr,  # (N, C)
    num_tokens, num_cols, TOP_K: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (n < num_tokens)[:, None] & (c < num_cols)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    for k in tl.static_range(TOP_K):
        row = tl.load(slot_rows_ptr + n * TOP_K + k, mask=n < num_tokens, other=-1).to(tl.int64)
        values = tl.load(
            rows_ptr + row[:, None] * num_cols + c[None, :], mask=mask & (row >= 0)[:, None], other=0.0
        ).to(ACC)
        if GATED:
            values *= tl.load(gates_ptr + n * TOP_K + k, mask=n < num_tokens, other=0.0).to(ACC)[:, None]
        acc += values
    tl.store(out_ptr + n[:, None] * num_cols + c[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_backward_kernel(
    dout_ptr,  # (N, C)
    y_ptr,  # (R, C)
    gates_ptr,  # (N * K,)
    dgates_ptr,  # (N * K,)
    partial_ptr,  # (row tiles, C): this tile's part of db2, accumulator dtype
    order_ptr,  # (N * K,) int32
    offsets_ptr,  # (E + 1,) int32
    num_cols, num_experts, TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert, first_row, end_row = find_tile(offsets_ptr, tile, num_experts, E_PAD, BLOCK_M)
    if expert >= num_experts:
        return
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    row_mask = rows < end_row
    slots = tl.load(order_ptr + rows, mask=row_mask, other=0)
    gates = tl.load(gates_ptr + slots, mask=row_mask, other=0.0).to(ACC)
    tokens = (slots // TOP_K).to(tl.int64)
    dgates = tl.zeros((BLOCK_M,), dtype=ACC)
    for first_col in range(0, num_cols, BLOCK_C):
        c = first_col + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (c < num_cols)[None, :]
        dout = tl.load(dout_ptr + tokens[:, None] * num_cols + c[None, :], mask=mask, other=0.0).to(ACC)
        y = tl.load(y_ptr + rows[:, None] * num_cols + c[None, :], mask=mask, other=0.0).to(ACC)
        dgates += tl.sum(dout * y, 1)
        if HAS_BIAS:
            part = tl.sum(gates[:, None] * dout, 0)
            tl.store(partial_ptr + tile.to(tl.int64) * num_cols + c, part, mask=c < num_cols)
    tl.store(dgates_ptr + slots, dgates.to(dgates_ptr.dtype.element_ty), mask=row_mask)


@triton.jit
def _sum_tiles_kernel(
    partial_ptr,  # (row tiles, num_cols)
    out_ptr,  # (E, num_cols)
    offsets_ptr,  # (E + 1,) int32
    num_cols, num_experts, E_PAD: tl.constexpr,
    TILE_ROWS: tl.constexpr,  # BLOCK_M of the kernel that wrote the parts
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    e = tl.arange(0, E_PAD)
    begin = tl.load(offsets_ptr + e, mask=e < num_experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0)
    tiles = (end - begin + TILE_ROWS - 1) // TILE_ROWS
    first = tl.sum(tl.where(e < expert, tiles, 0), 0)
    last = first + tl.sum(tl.where(e == expert, tiles, 0), 0)
    acc = tl.zeros((BLOCK_T, BLOCK_C), dtype=partial_ptr.dtype.element_ty)
    for tile in range(first, last, BLOCK_T):
        t = tile + tl.arange(0, BLOCK_T)
        mask = (t < last)[:, None] & (c < num_cols)[None, :]
        acc += tl.load(partial_ptr + t.to(tl.int64)[:, None] * num_cols + c[None, :], mask=mask, other=0.0)
    out = out_ptr + expert.to(tl.int64) * num_cols + c
    tl.store(out, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=c < num_cols)


def _combine(rows, plan, gates=None):
    """(N, C): each token's rows summed over k, weighted by its gates if given."""
    num_tokens, C = plan.slot_rows.shape[0], rows.shape[1]
    out = rows.new_empty(num_tokens, C)
    chosen = COMBINE.parameters(rows.device)
    chosen.launch(
        _combine_kernel, (triton.cdiv(num_tokens, chosen["BLOCK_N"]), triton.cdiv(C, chosen["BLOCK_C"])),
        rows, rows if gates is None else gates, plan.slot_rows, out, num_tokens, C,
        TOP_K=plan.top_k, GATED=gates is not None, ACC=accumulator(rows.dtype),
    )  # fmt: skip
    return out


def _combine_backward(dout, y, gates, plan, want_dbias):
    """(dgates, sums of gate * dout over each row tile or None, rows of a tile)."""
    num_experts, C = plan.offsets.numel() - 1, y.shape[1]
    dgates = torch.zeros_like(gates, memory_format=torch.contiguous_format)  # a slot of no expert is in no tile
    chosen = COMBINE_BACKWARD.parameters(y.device)
    tiles = grouped_gemm.row_tile_bound(plan.order.numel(), num_experts, chosen["BLOCK_M"])
    partial = torch.empty(tiles, C, dtype=at_least_float32(y.dtype), device=y.device)
    chosen.launch(
        _combine_backward_kernel, (tiles,),
        dout, y, gates, dgates, partial, plan.order, plan.offsets, C, num_experts,
        TOP_K=plan.top_k, HAS_BIAS=want_dbias, ACC=accumulator(y.dtype), E_PAD=triton.next_power_of_2(num_experts),
    )  # fmt: skip
    return dgates, partial if want_dbias else None, chosen["BLOCK_M"]


def _sum_tiles(partial, tile_rows, bias, plan):
    """The gradient of bias (E, cols), from sums over row tiles."""
    out = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    E, cols = out.shape
    chosen = SUM_TILES.parameters(out.device)
    chosen.launch(
        _sum_tiles_kernel, (E, triton.cdiv(cols, chosen["BLOCK_C"])), partial, out, plan.offsets, cols, E,
        TILE_ROWS=tile_rows, E_PAD=triton.next_power_of_2(E),
    )  # fmt: skip
    return out


@torch.library.custom_op("heiretsu::expert_mlp", mutates_args=())
def _expert_mlp(
    x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None,
    w2: torch.Tensor, b2: torch.Tensor | None, save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, h, y, order, slot_rows, offsets); without save, h is empty."""
    (E, C, F), num_rows = w1.shape, experts.numel()
    h, y = x.new_empty(num_rows if save else 0, F), x.new_empty(num_rows, C)
    if not (num_rows and C and E):
        shapes = (num_rows, experts.shape, E + 1)
        plan = RoutingPlan(*(torch.zeros(shape, dtype=torch.int32, device=x.device) for shape in shapes))
        return x.new_zeros(x.shape), h, y, *plan
    plan = make_plan(experts, E)
    a = x.new_empty(num_rows, F)
    grouped_gemm.grouped_gemm(
        x, w1.to(x.dtype), plan, h if save else None,
        gather=True, epilogue="gelu", bias=b1, act=a,
    )  # fmt: skip
    grouped_gemm.grouped_gemm(a, w2.to(x.dtype), plan, y, bias=b2)
    return _combine(y, plan, gates), h, y, *plan


@_expert_mlp.register_fake
def _(x, experts, gates, w1, b1, w2, b2, save):
    num_rows = experts.numel()
    plan = (experts.new_empty(s, dtype=torch.int32) for s in ((num_rows,), experts.shape, (w1.shape[0] + 1,)))
    h = x.new_empty(num_rows if save else 0, w1.shape[2])
    return x.new_empty(x.shape), h, x.new_empty(num_rows, x.shape[1]), *plan


@torch.library.custom_op("heiretsu::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    dout: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None,
    w2: torch.Tensor, b2: torch.Tensor | None, h: torch.Tensor, y: torch.Tensor, order: torch.Tensor,
    slot_rows: torch.Tensor, offsets: torch.Tensor, needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, dgates, dw1, db1, dw2, db2); empty for one that `needs` does not name, in this order."""
    (E, C, _), plan = w1.shape, RoutingPlan(order, slot_rows, offsets)
    need_dx, need_dgates, need_dw1, need_db1, need_dw2, need_db2 = needs
    if not (order.numel() and C and E):
        return tuple(gradient.zero_() for gradient in gradient_buffers((x, gates, w1, b1, w2, b2), needs))
    dx, dgates, dw1, db1, dw2, db2 = (x.new_empty(0) for _ in needs)
    dout = dout.contiguous()
    if need_dgates or need_db2:
        all_dgates, db2_parts, tile_rows = _combine_backward(dout, y, gates, plan, need_db2)
        dgates = all_dgates if need_dgates else dgates
        db2 = _sum_tiles(db2_parts, tile_rows, b2, plan) if need_db2 else db2
    if need_dx or need_dw1 or need_db1 or need_dw2:
        dh, gated = torch.empty_like(h), torch.empty_like(h)
        db1_parts, tile_rows = grouped_gemm.grouped_gemm(
            dout, w2.to(x.dtype).transpose(1, 2), plan, dh,
            gather=True, epilogue="dgelu", act=gated, h=h, gates=gates, want_dbias=need_db1,
        )  # fmt: skip
        db1 = _sum_tiles(db1_parts, tile_rows, b1, plan) if need_db1 else db1
        dw2 = grouped_gemm.weight_gradients(gated, dout, plan, w2, gather_b=True) if need_dw2 else dw2
        del gated
        dw1 = grouped_gemm.weight_gradients(x, dh, plan, w1, gather_a=True) if need_dw1 else dw1
    if need_dx:
        dx_rows = torch.empty_like(y)
        grouped_gemm.grouped_gemm(dh, w1.to(x.dtype).transpose(1, 2), plan, dx_rows)
        dx = _combine(dx_rows, plan)
    return dx, dgates, dw1, db1, dw2, db2


@_expert_mlp_backward.register_fake
def _(dout, x, gates, w1, b1, w2, b2, h, y, order, slot_rows, offsets, needs):
    return gradient_buffers((x, gates, w1, b1, w2, b2), needs)


def _setup_context(ctx, inputs, output):
    x, _, gates, w1, b1, w2, b2, _ = inputs
    ctx.save_for_backward(x, gates, w1, b1, w2, b2, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dout, *_):
    needs = [need for i, need in enumerate(ctx.needs_input_grad[:-1]) if i != 1]  # all floats: not experts, not save
    gradients = _expert_mlp_backward(dout, *ctx.saved_tensors, needs)
    dx, *others = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return dx, None, *others, None


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)


@checked
def expert_mlp(x, experts, gates, w1, b1, w2, b2):
    """Mixture of two-layer GELU experts, dropless: `plain.expert_mlp` (Gale et al. 2022, arXiv:2211.15841).

    x: (N, C) float, any strides. experts: (N, K) int; an index outside 0..E-1 adds nothing. gates: (N, K) float.
    w1: (E, C, F). w2: (E, F, C). b1: (E, F) or None. b2: (E, C) or None. Weights and biases may be of a wider dtype
    than x: products are taken in x's dtype, gradients come in each input's own. Returns (N, C) in x's dtype.
    """
    launch.require_device("expert_mlp", x)
    reverse_mode_only("expert_mlp", x, gates, w1, b1, w2, b2)
    wants_gradient = any(t is not None and t.requires_grad for t in (x, gates, w1, b1, w2, b2))
    gates, b1, b2 = (t if t is None else t.contiguous() for t in (gates, b1, b2))
    return _expert_mlp(x, experts, gates, w1, b1, w2, b2, torch.is_grad_enabled() and wants_gradient)[0]
