"""Grouped matrix multiplication: one launch multiplies every expert's rows by that expert's matrix.

Rows are sorted by expert (see `routing_plan.RoutingPlan`), so expert e owns rows offsets[e] .. offsets[e + 1] of a
virtual row matrix. Two kernels:

- `grouped_gemm`: out[r] = epilogue(a[row r] @ w[e]), also with w[e] transposed. One program computes BLOCK_M rows of
  one expert by BLOCK_N columns. It finds its expert from the offsets on the device, so the host launches an upper bound
  of tiles, needs no counts, and spare programs return at once. All tiles are of the same size: an uneven load spreads
  over the machine by itself.
- `weight_gradients`: out[e] = sum over rows r of e of a[row r].T @ b[row r]. Work goes with an expert's rows, so the
  programs of the experts with most rows start first.

"row r" is either row r itself or, with GATHER, the row of the token that r works for: the permutation happens in the
load, and no permuted copy of the tokens exists. Epilogues: bias; bias and GELU, keeping the pre-activation; the
backward of GELU, which writes the hidden gradient, the gated activation for the second weight gradient, and partial
bias sums.

All arithmetic accumulates in float32 (float64 for float64), float32 products are not rounded to TF32, sums run in a
fixed order, and there are no atomics.

R rows, N tokens, E experts, K experts per token; depth is the dim that a product sums over, cols the other of a weight.
"""

import torch
import triton
import triton.language as tl

from heiretsu.kernels.dtypes import at_least_float32
from heiretsu.kernels.gpu.gelu import gelu, gelu_and_derivative
from heiretsu.kernels.gpu.launch import Sizes, Tiles, accumulator, on_every_gpu

# 128x256 with 8 warps is bound by the tensor cores on A100, H100 and MI300X (1.00) and by shared memory on B200 (.67);
# 128x128 stops at .8 on H100, 256x128 at .89. Nothing spills; A100 and H100 use 166 to 255 registers. Shared KB: A100
# 80 to 96, H100 and B200 144, MI300X 24 to 32. Sizes or strides that are no multiple of 16 make scalar loads, under
# which such a tile spills up to 4.8 KB a thread: they have a smaller one ("odd"), which does not (50 to 166 registers),
# nor does float32's (58 to 128).
_WIDE = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)
_WIDE_DW = dict(BLOCK_A=128, BLOCK_B=256, BLOCK_R=64, num_warps=8, num_stages=3)
_INTERPRETED: dict[str, Sizes] = {
    "interpreter": {None: dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, GROUP_M=2, num_warps=4, num_stages=1)}
}
_INTERPRETED_DW: dict[str, Sizes] = {
    "interpreter": {None: dict(BLOCK_A=16, BLOCK_B=32, BLOCK_R=32, num_warps=4, num_stages=1)}
}
TILES = Tiles(
    "grouped_gemm",
    on_every_gpu({None: _WIDE}) | {"cdna3": {None: _WIDE | dict(BLOCK_K=32, num_stages=2)}} | _INTERPRETED,
    fp32=on_every_gpu({None: dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, GROUP_M=8, num_warps=4, num_stages=2)}),
)
ODD = Tiles(
    "grouped_gemm_odd",
    on_every_gpu({None: dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=2)})
    | _INTERPRETED,
)
DW = Tiles(
    "grouped_gemm_dw",
    on_every_gpu({None: _WIDE_DW}) | {"cdna3": {None: _WIDE_DW | dict(BLOCK_R=32, num_stages=2)}} | _INTERPRETED_DW,
    fp32=on_every_gpu({None: dict(BLOCK_A=64, BLOCK_B=64, BLOCK_R=16, num_warps=4, num_stages=2)}),
)
DW_ODD = Tiles(
    "grouped_gemm_dw_odd",
    on_every_gpu({None: dict(BLOCK_A=64, BLOCK_B=128, BLOCK_R=32, num_warps=8, num_stages=2)}) | _INTERPRETED_DW,
)


@triton.jit
def find_tile(offsets_ptr, tile, num_experts, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a row tile; expert == num_experts for a spare tile."""
    e = tl.arange(0, E_PAD)
    begin = tl.load(offsets_ptr + e, mask=e < num_experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum(((tl.cumsum(tiles, 0) <= tile) & (e < num_experts)).to(tl.int32), 0)
    first_tile = tl.sum(tl.where(e < expert, tiles, 0), 0)
    first_row = tl.sum(tl.where(e == expert, begin, 0), 0) + (tile - first_tile) * BLOCK_M
    return expert, first_row, tl.sum(tl.where(e == expert, end, 0), 0)


@triton.jit
def _halves(acc):
    """The left and the right half of a tile's columns, both still in registers."""
    parts = tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1))
    left, right = tl.split(parts)
    return left, right


@triton.jit
def _finish(
    acc,  # (BLOCK_M, some columns)
    col,  # its first column
    num_cols, rows, row_mask, gate, bias_ptr, out_ptr, act_ptr, h_ptr, dbias_ptr, EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr, WRITE_OUT: tl.constexpr,
):  # fmt: skip
    """Epilogue of a tile, or of a part of its columns."""
    cols = col + tl.arange(0, acc.shape[1])
    mask = row_mask[:, None] & (cols < num_cols)[None, :]
    offset = rows.to(tl.int64)[:, None] * num_cols + cols[None, :]
    if HAS_BIAS and EPILOGUE != "dgelu":
        acc += tl.load(bias_ptr + cols, mask=cols < num_cols, other=0.0).to(acc.dtype)[None, :]
    if WRITE_OUT and EPILOGUE != "dgelu":
        tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if EPILOGUE == "gelu":
        tl.store(act_ptr + offset, gelu(acc).to(act_ptr.dtype.element_ty), mask=mask)
    if EPILOGUE == "dgelu":  # acc is the gradient of the expert's activation, before its gate is applied
        u = tl.load(h_ptr + offset, mask=mask, other=0.0).to(acc.dtype)
        activation, slope = gelu_and_derivative(u)
        tl.store(act_ptr + offset, (gate[:, None] * activation).to(act_ptr.dtype.element_ty), mask=mask)
        dh = gate[:, None] * acc * slope
        tl.store(out_ptr + offset, dh.to(out_ptr.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            tl.store(dbias_ptr + cols, tl.sum(dh, 0), mask=cols < num_cols)


@triton.jit
def _grouped_gemm_kernel(
    a_ptr,  # (N, depth) with GATHER, else (R, depth)
    w_ptr,  # (E, depth, num_cols)
    bias_ptr,  # (E, num_cols) or unused
    out_ptr,  # (R, num_cols)
    act_ptr,  # (R, num_cols): GELU of out, gated in the backward
    h_ptr,  # (R, num_cols): pre-activations read by the backward
    gates_ptr,  # (N * K,) by slot
    dbias_ptr,  # (row tiles, num_cols) partial sums, accumulator dtype
    order_ptr,  # (N * K,) int32: slot n * K + k of a row
    offsets_ptr,  # (E + 1,) int32
    num_cols, depth, num_experts, row_tiles, stride_am, stride_ak, stride_we, stride_wk, stride_wn, TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    EPILOGUE: tl.constexpr,  # "linear", "gelu" (writes out if WRITE_OUT, and act) or "dgelu"
    HAS_BIAS: tl.constexpr,  # in the backward: whether dbias_ptr is written
    WRITE_OUT: tl.constexpr, EVEN_K: tl.constexpr, ACC: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # GROUP_M row tiles share the columns of a weight while it is in cache.
    pid = tl.program_id(0)
    col_tiles = tl.cdiv(num_cols, BLOCK_N)
    group = pid // (GROUP_M * col_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    tile = group * GROUP_M + (pid % (GROUP_M * col_tiles)) % group_rows
    col_tile = (pid % (GROUP_M * col_tiles)) // group_rows

    expert, first_row, end_row = find_tile(offsets_ptr, tile, num_experts, E_PAD, BLOCK_M)
    if expert >= num_experts:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < end_row
    a_rows = tl.where(row_mask, rows, first_row)  # a tail row repeats the first one: loads need no mask
    if GATHER:
        a_rows = tl.load(order_ptr + a_rows) // TOP_K
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    w_cols = cols % num_cols  # likewise a tail column wraps around
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + a_rows.to(tl.int64)[:, None] * stride_am + ks.to(tl.int64)[None, :] * stride_ak
    w_ptrs = w_ptr + expert.to(tl.int64) * stride_we
    w_ptrs += ks.to(tl.int64)[:, None] * stride_wk + w_cols.to(tl.int64)[None, :] * stride_wn

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in range(0, depth, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
            w = tl.load(w_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k + ks < depth)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k + ks < depth)[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="ieee", out_dtype=ACC)
        a_ptrs += tl.cast(stride_ak, tl.int64) * BLOCK_K
        w_ptrs += tl.cast(stride_wk, tl.int64) * BLOCK_K

    gate = tl.zeros((BLOCK_M,), dtype=ACC)
    if EPILOGUE == "dgelu":
        slot = tl.load(order_ptr + rows, mask=row_mask, other=0)
        gate = tl.load(gates_ptr + slot, mask=row_mask, other=0.0).to(ACC)  # 0 for a row outside
    bias_ptr += expert.to(tl.int64) * num_cols
    dbias_ptr += tile.to(tl.int64) * num_cols
    col = col_tile * BLOCK_N
    # Four parts in turn: beside acc only one part's temporaries are in registers, which is what keeps a 128x256 tile
    # from spilling (dgelu on H100: 2144 bytes a thread in one part, 688 in two, none in four).
    left, right = _halves(acc)
    first, second = _halves(left)
    third, fourth = _halves(right)
    for part in tl.static_range(4):
        acc = first if part == 0 else second if part == 1 else third if part == 2 else fourth
        _finish(
            acc, col + part * (BLOCK_N // 4), num_cols, rows, row_mask, gate, bias_ptr, out_ptr, act_ptr, h_ptr,
            dbias_ptr, EPILOGUE, HAS_BIAS, WRITE_OUT,
        )  # fmt: skip


@triton.jit
def _weight_gradient_kernel(
    a_ptr,  # (N or R, num_a)
    b_ptr,  # (N or R, num_b)
    out_ptr,  # (E, num_a, num_b)
    order_ptr,  # (N * K,) int32: slot n * K + k of a row
    offsets_ptr,  # (E + 1,) int32
    by_size_ptr,  # (E,) int64: experts, most rows first
    num_a, num_b, stride_ar, stride_ac, stride_br, stride_bc, TOP_K: tl.constexpr, GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr, ACC: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    a_tiles, b_tiles = tl.cdiv(num_a, BLOCK_A), tl.cdiv(num_b, BLOCK_B)
    pid = tl.program_id(0)
    expert = tl.load(by_size_ptr + pid // (a_tiles * b_tiles)).to(tl.int64)
    tile = pid % (a_tiles * b_tiles)
    a_cols = tile // b_tiles * BLOCK_A + tl.arange(0, BLOCK_A)
    b_cols = tile % b_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)

    a_base = a_ptr + (a_cols % num_a).to(tl.int64)[None, :] * stride_ac  # a tail column wraps around: no mask
    b_base = b_ptr + (b_cols % num_b).to(tl.int64)[None, :] * stride_bc
    acc = tl.zeros((BLOCK_A, BLOCK_B), dtype=ACC)
    rows = begin + tl.arange(0, BLOCK_R)
    slots = tl.load(order_ptr + rows, mask=rows < end, other=0)
    for _ in range(begin, end, BLOCK_R):
        mask = rows < end
        tokens = slots // TOP_K
        a_rows = (tokens if GATHER_A else rows).to(tl.int64)[:, None]
        b_rows = (tokens if GATHER_B else rows).to(tl.int64)[:, None]
        # Both operands: the rows behind belong to the next expert, or to nobody, and then may hold NaN.
        a = tl.load(a_base + a_rows * stride_ar, mask=mask[:, None], other=0.0)
        b = tl.load(b_base + b_rows * stride_br, mask=mask[:, None], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee", out_dtype=ACC)
        rows += BLOCK_R
        slots = tl.load(order_ptr + rows, mask=rows < end, other=0)  # of the next block, while this one multiplies

    mask = (a_cols < num_a)[:, None] & (b_cols < num_b)[None, :]
    out = out_ptr + expert * num_a * num_b + a_cols.to(tl.int64)[:, None] * num_b + b_cols[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)  # zeros for an expert without rows


def _parameters(tiles, odd_tiles, a, *sizes):
    """Of odd_tiles where a size or stride of 16-bit operands is no multiple of 16."""
    odd = a.itemsize == 2 and any(size % 16 for size in (*sizes, *a.stride()) if size != 1)
    return (odd_tiles if odd else tiles).parameters(a.device, itemsize=a.itemsize)


def row_tile_bound(num_rows: int, num_experts: int, block: int) -> int:
    """The most row tiles that num_rows rows can need, however they fall on the experts."""
    return (num_rows + min(num_experts, num_rows) * (block - 1)) // block


def grouped_gemm(
    a, w, plan, out, *, gather=False, epilogue="linear", bias=None, act=None, h=None, gates=None, want_dbias=False
):
    """Write out[r] = epilogue(a[row r] @ w[expert of r] + bias[expert of r]); nothing for a row of no expert.

    a: (N, depth) with gather, else (R, depth). w: (E, depth, cols) in a's dtype. a and w may have any strides.
    bias: (E, cols) float, contiguous, or None. out, act, h: (R, cols), contiguous. plan: routing_plan.RoutingPlan.
    epilogue: "linear"; "gelu": act = gelu(out), and out may be None; "dgelu": see the header, needs h, gates and act.
    Returns, for "dgelu" with want_dbias, the sums of out's columns over each row tile, (tiles, cols), and the rows of a
    tile; else (None, 0).
    """
    num_rows, (E, depth, cols) = plan.order.numel(), w.shape
    chosen = _parameters(TILES, ODD, a, cols, depth, *w.stride())
    tiles = row_tile_bound(num_rows, E, chosen["BLOCK_M"])
    dbias = torch.empty(tiles, cols, dtype=at_least_float32(a.dtype), device=a.device) if want_dbias else None
    unused = act if out is None else out
    if tiles and cols:
        pointers = (unused if t is None else t for t in (bias, out, act, h, gates, dbias))
        chosen.launch(
            _grouped_gemm_kernel, (tiles * triton.cdiv(cols, chosen["BLOCK_N"]),),
            a, w, *pointers, plan.order, plan.offsets, cols, depth, E, tiles, *a.stride(), *w.stride(),
            TOP_K=plan.top_k, GATHER=gather, EPILOGUE=epilogue, WRITE_OUT=out is not None,
            HAS_BIAS=bias is not None or want_dbias, EVEN_K=depth % chosen["BLOCK_K"] == 0,
            ACC=accumulator(a.dtype), E_PAD=triton.next_power_of_2(E),
        )  # fmt: skip
    return dbias, chosen["BLOCK_M"]


def weight_gradients(a, b, plan, like, *, gather_a=False, gather_b=False):
    """(E, cols of a, cols of b) in the dtype of `like`: a[row r].T @ b[row r], summed over each expert's rows."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    E, num_a, num_b = out.shape
    if out.numel():
        by_size = plan.offsets.diff().argsort(descending=True, stable=True)
        chosen = _parameters(DW, DW_ODD, a, num_a, num_b, *b.stride())
        chosen.launch(
            _weight_gradient_kernel,
            (E * triton.cdiv(num_a, chosen["BLOCK_A"]) * triton.cdiv(num_b, chosen["BLOCK_B"]),),
            a, b, out, plan.order, plan.offsets, by_size, num_a, num_b, *a.stride(), *b.stride(),
            TOP_K=plan.top_k, GATHER_A=gather_a, GATHER_B=gather_b, ACC=accumulator(a.dtype),
        )  # fmt: skip
    return out
