"""Attention, backward pass (Dao 2023, "FlashAttention-2", arXiv:2307.08691, algorithm 2, in two passes).

Nothing of size (T, S) is stored: both passes recompute the probabilities p = 2^(s - lse log2(e)) from q, k and lse,
with s = q k^T * scale * log2(e). With delta = rowsum(dout * out) - dlse,

    dv = p^T dout,   dp = dout v^T,   ds = p * (dp - delta),   dq = scale * ds k,   dk = scale * ds^T q.

`_dkdv_kernel` owns BLOCK_N keys and walks over the queries of every query head of its group; `_dq_kernel` owns BLOCK_M
queries and walks over the keys. Each gradient element has one writer and one order of summation: deterministic, without
atomics, for 7 matrix products a block where one pass with atomics has 5. Under dropout with keep mask z, p is replaced
by p * z / (1 - p_drop) in dv, and dp by dp * z / (1 - p_drop); delta stays as it is.

Where one key carries all of a row, ds is 0 if dp and delta are the same sum of the same terms. Of operands of 32 bits
delta is therefore the diagonal of a product dout out^T, made as dp is; in another order the two differ by some ulps of
|dout| |v|, which scores of 1e4 carry into dk. p cannot tell such rows: with scores of 200 and 1 - p = 3e-6 it is 1 in
float32, and to set ds to 0 there made dq wrong by three quarters of its size, where it is off by 3 %.

B batch, H heads, Hkv key heads, T queries, S keys, D head dim.
"""

import torch
import triton
import triton.language as tl

from heiretsu.kernels.gpu.attention_tiles import (
    LOG2_E,
    block_d,
    dot,
    dot_add,
    exponential,
    keep_mask,
    load_rows,
    row_dots,
    scaled,
    store_rows,
)
from heiretsu.kernels.gpu.launch import Tiles, on_every_gpu, tile
from heiretsu.kernels.random import Dropout

# By head dim; the figures and reasons as in attention_forward.py.
DELTA = Tiles(
    "attention_delta",
    on_every_gpu({64: dict(BLOCK_M=64, num_warps=4, num_stages=1), 256: dict(BLOCK_M=16, num_warps=4, num_stages=1)})
    | {"interpreter": {None: dict(BLOCK_M=64, num_warps=4, num_stages=1)}},
    fp32=on_every_gpu(  # as dkdv's: no spills, and 2 to 12 programs on an SM
        {
            64: dict(BLOCK_M=32, num_warps=4, num_stages=1),
            128: dict(BLOCK_M=32, num_warps=8, num_stages=1),
            256: dict(BLOCK_M=16, num_warps=4, num_stages=1),
        }
    ),
)
_FP32 = {64: tile(32, 32, 4, 1), 128: tile(32, 32, 8, 1), 256: tile(16, 16, 4, 1)}  # 108 to 255 registers, no spills
_DKDV_FP32 = {D: chosen | {"DV_FIRST": True} for D, chosen in _FP32.items()}
_SMALLER_FP32 = _FP32 | {128: tile(16, 32, 8, 1)}  # dq at 32 x 32 spills 40 bytes on H100 and 104 on B200
DKDV = Tiles(
    "attention_dkdv",
    {
        "ampere": {
            64: tile(64, 128, 8, 2, DV_FIRST=True),  # .76, 252/0/1; 4 warps 504 bytes spilled
            128: tile(32, 128, 8, 2, DV_FIRST=True),  # .72, 255/0/1; ds first 3624 bytes; 64 x 64 .83, but 104 bytes
            256: tile(32, 64, 8, 2, DV_FIRST=False),  # .35, 250/0/1; 64 x 64 .56, but 64 bytes spilled
        },
        "hopper": {
            64: tile(128, 128, 8, 2, DV_FIRST=False),  # .99, 254/0/1; 3 stages 88 bytes in groups; 64 x 128 .88
            128: tile(64, 128, 8, 2, DV_FIRST=False),  # .99, 252/0/1
            256: tile(64, 64, 8, 2, DV_FIRST=False),  # .40, 255/248/1; 32 x 64 spills 48 bytes at .22
        },
        "blackwell": {
            64: tile(64, 128, 8, 2, DV_FIRST=True),  # .44, 172/0/1, 215 with ds first; 128 x 128 .50, but 312 bytes
            128: tile(64, 128, 8, 2, DV_FIRST=True),  # .57, 201/0/1, 243 with ds first
            256: tile(64, 64, 8, 1, DV_FIRST=False),  # .50, 232/0/1
        },
        "cdna3": {
            64: tile(32, 128, 4, 1, DV_FIRST=False),  # .72, 248/0/2; 64 keys compute S twice
            128: tile(32, 128, 4, 1, DV_FIRST=False),  # 1.00, 360/0/1
            256: tile(16, 64, 4, 1, DV_FIRST=False),  # .87, 306/0/1; 128 queries spill 481 registers
        },
        "interpreter": {None: tile(32, 64, 4, 1, DV_FIRST=True)},
    },
    fp32=on_every_gpu(_DKDV_FP32)
    | {"cdna3": {D: _DKDV_FP32[D] for D in (64, 256)}},  # at D = 128, 32 x 32 would spill 550 bytes
    dropout={
        "ampere": {
            64: tile(32, 128, 8, 2, DV_FIRST=True),  # .37, 190/0/1; 64 x 128 takes 255 registers
            128: tile(16, 128, 8, 2, DV_FIRST=True),  # .61, 243/0/1; 32 x 128 .72, but 72 bytes spilled
            256: tile(32, 64, 8, 2, DV_FIRST=False),  # .35, 255/0/1
        },
        "hopper": {
            64: tile(32, 128, 8, 2, DV_FIRST=False),  # .21, 172/0/1; 64 x 128 spills 8 bytes, 128 x 128 160
            128: tile(32, 128, 8, 2, DV_FIRST=False),  # .42, 246/0/1; 64 x 128 spills 32 bytes, in groups 272
            256: tile(32, 64, 8, 2, DV_FIRST=False),  # .22, 255/176/1; 64 x 64 .40, but 408 bytes
        },
        "blackwell": {
            64: tile(64, 128, 8, 2, DV_FIRST=True),  # .10, 255/0/1
            128: tile(32, 128, 8, 2, DV_FIRST=True),  # .19, 182/0/1; 64 x 128 24 bytes
            256: tile(32, 64, 8, 1, DV_FIRST=False),  # .29, 205/0/1; 64 x 64 .37, but 176 bytes
        },
        "cdna3": {
            64: tile(16, 128, 4, 1, DV_FIRST=False),  # .21, 218/0/2; 32 x 128 takes 292 registers
            128: tile(32, 128, 4, 1, DV_FIRST=False),  # .38, 400/0/1
            256: tile(16, 64, 4, 1, DV_FIRST=False),  # .75, 309/0/1
        },
    },
)
DQ = Tiles(
    "attention_dq",
    {
        "ampere": {
            64: tile(128, 64, 8, 3),  # .80, 187/0/1; 4 warps 1.00, but 112 bytes spilled
            128: tile(128, 64, 8, 3),  # .80, 255/0/1
            256: tile(64, 64, 8, 1),  # .50, 248/0/1
        },
        "hopper": {
            64: tile(128, 64, 8, 3),  # 1.00, 128/0/2
            128: tile(128, 64, 8, 3),  # 1.00, 196/0/1
            256: tile(128, 32, 8, 1),  # .60, 255/32/1
        },
        "blackwell": {
            64: tile(128, 64, 8, 2),  # .67, 127/0/2
            128: tile(128, 64, 8, 2),  # .67, 157/0/1; 128 x 128 .86, but 24 bytes spilled
            256: tile(128, 32, 8, 1),  # .46, 209/0/1
        },
        "cdna3": {
            64: tile(128, 32, 4, 1),  # .93, 166/0/3; 64 queries compute S twice
            128: tile(128, 16, 4, 1),  # 1.00, 208/0/2; 64 queries compute S twice
            256: tile(64, 16, 4, 1),  # .84, 240/0/2
        },
        "interpreter": {None: tile(64, 32, 4, 1)},
    },
    fp32={
        "ampere": _FP32,
        "hopper": _SMALLER_FP32,
        "blackwell": _SMALLER_FP32,
        "cdna3": {D: _FP32[D] for D in (64, 256)},
    },
    dropout={  # elsewhere nothing spills with the tiles above
        "hopper": {
            64: tile(128, 64, 8, 3),  # .15, 179/0/1
            128: tile(128, 64, 8, 2),  # .29, 250/0/1; 3 stages 8 bytes
            256: tile(128, 32, 8, 1),  # .55, 255/128/1
        },
    },
)


@triton.jit(do_not_specialize=["H", "T"])
def _delta_kernel(
    out_ptr,  # (B, T, H, D), contiguous
    dout_ptr,  # (B, H, T, D)
    lse_ptr,  # (B, H, T), contiguous
    dlse_ptr,  # (B, H, T), or None
    delta_ptr,  # (B, H, T), contiguous: rowsum(dout * out) - dlse
    row_lse_ptr,  # (B, H, T), contiguous: lse in the base of `scaled`
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_lb, stride_lh, stride_lt,
    H, T,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    first = pid % num_blocks * BLOCK_M
    batch, head = (pid // num_blocks // H).to(tl.int64), (pid // num_blocks % H).to(tl.int64)
    dtype: tl.constexpr = delta_ptr.dtype.element_ty
    out = load_rows(out_ptr + (batch * T * H + head) * D, first, T, H * D, 1, BLOCK_M, True, D, BLOCK_D)
    dout_ptr += batch * stride_ob + head * stride_oh
    dout = load_rows(dout_ptr, first, T, stride_ot, stride_od, BLOCK_M, True, D, BLOCK_D)
    WIDE: tl.constexpr = dout.dtype.primitive_bitwidth > 16
    delta = row_dots(dout, out) if WIDE else tl.sum(out.to(dtype) * dout.to(dtype), 1)
    rows = first + tl.arange(0, BLOCK_M)
    if dlse_ptr is not None:
        dlse_ptr += batch * stride_lb + head * stride_lh
        delta -= tl.load(dlse_ptr + rows.to(tl.int64) * stride_lt, mask=rows < T, other=0.0)
    at = (batch * H + head) * T + rows
    tl.store(delta_ptr + at, delta, mask=rows < T)
    lse = tl.load(lse_ptr + at, mask=rows < T, other=0.0)
    tl.store(row_lse_ptr + at, lse if WIDE else lse * LOG2_E, mask=rows < T)


@triton.jit
def _dkdv_of_queries(
    dk, dv, k, v, q_ptr, dout_ptr, row_lse_ptr, delta_ptr, stride_qh, stride_qt, stride_qd, stride_oh, stride_ot,
    stride_od, start, end, num_diagonal, tail, first_key, T, shift, seed, head, batch, GROUP: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, SCALE: tl.constexpr, DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DV_FIRST: tl.constexpr,
):  # fmt: skip
    """Add what query blocks start .. end-1 of GROUP heads give to dk (still without the scale) and dv (without
    KEEP_SCALE). The pointers, and `head`, are those of the first head.

    Works on transposed tiles (keys, queries), so that p and ds are left operands as they come out of the registers.
    MASKED: the first num_diagonal blocks from start are counted up, every further one is the block `tail`.
    """
    WIDE: tl.constexpr = k.dtype.primitive_bitwidth > 16
    keys = first_key + tl.arange(0, BLOCK_N)
    # One loop over the blocks of all heads: nested in a loop over heads, it spilled 120 to 700 bytes a thread.
    num_blocks = tl.maximum(end - start, 0)
    for step in range(GROUP * num_blocks):
        member = step // tl.maximum(num_blocks, 1) if GROUP > 1 else 0
        block = start + step - member * num_blocks
        skip = tl.cast(member, tl.int64)  # heads, from the first
        if MASKED:
            first = tl.where(block < start + num_diagonal, block, tail) * BLOCK_M
        else:
            first = block * BLOCK_M
        rows = first + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr + skip * stride_qh, first, T, stride_qt, stride_qd, BLOCK_M, MASKED, D, BLOCK_D)
        dout = load_rows(dout_ptr + skip * stride_oh, first, T, stride_ot, stride_od, BLOCK_M, MASKED, D, BLOCK_D)
        s = dot(k, q.T)
        dp = dot(v, dout.T)  # right after s: no spills on H100 at D128, where s, p, dp in order of use spills 72 bytes
        at = skip * T + rows
        if MASKED:
            lse = tl.load(row_lse_ptr + at, mask=rows < T, other=float("inf"))  # makes p = 0 beyond T
            delta = tl.load(delta_ptr + at, mask=rows < T, other=0.0)
        else:
            lse = tl.load(row_lse_ptr + at)
            delta = tl.load(delta_ptr + at)
        p = exponential(scaled(s, SCALE, WIDE) - lse[None, :], WIDE)
        if MASKED and CAUSAL:
            p = tl.where(keys[:, None] <= rows[None, :] + shift, p, 0.0)
        dropped = p
        if DROP_BELOW > 0:
            keep = keep_mask(keys[:, None], rows[None, :], head + member, batch, seed, DROP_BELOW)
            dropped = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * KEEP_SCALE, 0.0)
        if DV_FIRST:
            dv = dot_add(dv, dropped.to(dout.dtype), dout)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        if not DV_FIRST:
            dv = dot_add(dv, dropped.to(dout.dtype), dout)
        dk = dot_add(dk, ds, q)
    return dk, dv


@triton.jit(do_not_specialize=["H", "T", "S", "seed", "batch_offset", "head_offset"])
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr,  # as in the forward kernel; dout (B, H, T, D)
    row_lse_ptr, delta_ptr,  # (B, H, T), contiguous
    dk_ptr, dv_ptr,  # (B, S, Hkv, D), contiguous
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    H, T, S, seed, batch_offset, head_offset,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, SCALE: tl.constexpr, DROP_BELOW: tl.constexpr, KEEP_SCALE: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DV_FIRST: tl.constexpr,  # order of two independent steps: register allocation decides
):  # fmt: skip
    dtype: tl.constexpr = delta_ptr.dtype.element_ty
    num_blocks = tl.cdiv(S, BLOCK_N)
    num_key_heads = H // GROUP
    pid = tl.program_id(0)
    first_key = pid % num_blocks * BLOCK_N  # causal: the first keys are seen by most queries, and start first
    b, key_head = pid // num_blocks // num_key_heads, pid // num_blocks % num_key_heads
    batch, kv = b.to(tl.int64), key_head.to(tl.int64)
    k = load_rows(
        k_ptr + batch * stride_kb + kv * stride_kh, first_key, S, stride_ks, stride_kd, BLOCK_N, True, D, BLOCK_D
    )
    v = load_rows(
        v_ptr + batch * stride_vb + kv * stride_vh, first_key, S, stride_vs, stride_vd, BLOCK_N, True, D, BLOCK_D
    )

    # Query blocks: those on the diagonal (some keys hidden), those that see every key, and a tail cut by T.
    shift = S - T  # query i sees keys 0 .. i + shift
    whole = T // BLOCK_M
    first_block, unmasked = 0, 0
    if CAUSAL:
        first_block = tl.maximum(first_key - shift, 0) // BLOCK_M
        unmasked = tl.minimum(tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - shift, 0), BLOCK_M), whole)
    num_diagonal = tl.maximum(unmasked - first_block, 0)
    masked_end = first_block + num_diagonal + (T % BLOCK_M != 0).to(tl.int32)

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    head = kv * GROUP  # the first of the group
    q_ptr += batch * stride_qb + head * stride_qh
    dout_ptr += batch * stride_ob + head * stride_oh
    row_lse_ptr += (batch * H + head) * T
    delta_ptr += (batch * H + head) * T
    dk, dv = _dkdv_of_queries(
        dk, dv, k, v, q_ptr, dout_ptr, row_lse_ptr, delta_ptr, stride_qh, stride_qt, stride_qd, stride_oh, stride_ot,
        stride_od, first_block, masked_end, num_diagonal, whole, first_key, T, shift, seed,
        key_head * GROUP + head_offset, b + batch_offset, GROUP, True, CAUSAL, SCALE, DROP_BELOW, KEEP_SCALE,
        D, BLOCK_M, BLOCK_N, BLOCK_D, DV_FIRST,
    )  # fmt: skip
    dk, dv = _dkdv_of_queries(
        dk, dv, k, v, q_ptr, dout_ptr, row_lse_ptr, delta_ptr, stride_qh, stride_qt, stride_qd, stride_oh, stride_ot,
        stride_od, unmasked, whole, num_diagonal, whole, first_key, T, shift, seed,
        key_head * GROUP + head_offset, b + batch_offset, GROUP, False, CAUSAL, SCALE, DROP_BELOW, KEEP_SCALE,
        D, BLOCK_M, BLOCK_N, BLOCK_D, DV_FIRST,
    )  # fmt: skip
    at = (batch * S * num_key_heads + kv) * D
    store_rows(dk_ptr + at, dk * SCALE, first_key, S, num_key_heads * D, BLOCK_N, D, BLOCK_D)
    store_rows(dv_ptr + at, dv * KEEP_SCALE, first_key, S, num_key_heads * D, BLOCK_N, D, BLOCK_D)


@triton.jit
def _dq_of_keys(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_kd, stride_vs, stride_vd, start, end, rows, S, shift,
    seed, head, batch, MASKED: tl.constexpr, CAUSAL: tl.constexpr, SCALE: tl.constexpr, DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add what keys start .. end-1 give to dq (still without the scale)."""
    WIDE: tl.constexpr = q.dtype.primitive_bitwidth > 16
    for n in range(start, end, BLOCK_N):
        k = load_rows(k_ptr, n, S, stride_ks, stride_kd, BLOCK_N, MASKED, D, BLOCK_D)
        v = load_rows(v_ptr, n, S, stride_vs, stride_vd, BLOCK_N, MASKED, D, BLOCK_D)
        cols = n + tl.arange(0, BLOCK_N)
        s = dot(q, k.T)
        p = exponential(scaled(s, SCALE, WIDE) - lse[:, None], WIDE)
        if MASKED:
            visible = (cols < S)[None, :]
            if CAUSAL:
                visible &= cols[None, :] <= rows[:, None] + shift
            p = tl.where(visible, p, 0.0)
        dp = dot(dout, v.T)
        if DROP_BELOW > 0:
            keep = keep_mask(cols[None, :], rows[:, None], head, batch, seed, DROP_BELOW)
            dp = tl.where(keep, dp * KEEP_SCALE, 0.0)
        ds = p * (dp - delta[:, None])
        dq = dot_add(dq, ds.to(k.dtype), k)
    return dq


@triton.jit(do_not_specialize=["H", "T", "S", "seed", "batch_offset", "head_offset"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr,  # as in the forward kernel; dout (B, H, T, D)
    row_lse_ptr, delta_ptr,  # (B, H, T), contiguous
    dq_ptr,  # (B, T, H, D), contiguous
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    H, T, S, seed, batch_offset, head_offset,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, SCALE: tl.constexpr, DROP_BELOW: tl.constexpr, KEEP_SCALE: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = delta_ptr.dtype.element_ty
    num_blocks = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    block = num_blocks - 1 - pid % num_blocks  # the longest rows start first
    b, h = pid // num_blocks // H, pid // num_blocks % H
    batch, head = b.to(tl.int64), h.to(tl.int64)
    k_ptr += batch * stride_kb + head // GROUP * stride_kh
    v_ptr += batch * stride_vb + head // GROUP * stride_vh
    first = block * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q = load_rows(
        q_ptr + batch * stride_qb + head * stride_qh, first, T, stride_qt, stride_qd, BLOCK_M, True, D, BLOCK_D
    )
    dout = load_rows(
        dout_ptr + batch * stride_ob + head * stride_oh, first, T, stride_ot, stride_od, BLOCK_M, True, D, BLOCK_D
    )
    at = (batch * H + head) * T + rows
    lse = tl.load(row_lse_ptr + at, mask=rows < T, other=float("inf"))  # makes p = 0 beyond T
    delta = tl.load(delta_ptr + at, mask=rows < T, other=0.0)

    shift = S - T  # query i sees keys 0 .. i + shift
    end, seen_by_all = S, S
    if CAUSAL:
        end = tl.minimum(S, first + BLOCK_M + shift)
        seen_by_all = tl.minimum(S, tl.maximum(0, first + shift + 1))
    whole = seen_by_all // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype)
    dq = _dq_of_keys(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_kd, stride_vs, stride_vd, 0, whole, rows, S,
        shift, seed, h + head_offset, b + batch_offset, False, CAUSAL, SCALE, DROP_BELOW, KEEP_SCALE,
        D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _dq_of_keys(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_kd, stride_vs, stride_vd, whole, end, rows, S,
        shift, seed, h + head_offset, b + batch_offset, True, CAUSAL, SCALE, DROP_BELOW, KEEP_SCALE,
        D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    store_rows(dq_ptr + (batch * T * H + head) * D, dq * SCALE, first, T, H * D, BLOCK_M, D, BLOCK_D)


def backward(
    dout, dlse, q, k, v, out, lse, causal: bool, scale: float, dropout: Dropout, need_dq: bool, need_dkdv: bool
):
    """dq (B, H, T, D) and dk, dv (B, Hkv, S, D), each in memory layout (B, length, heads, D); None where not needed."""
    B, H, T, D = q.shape
    Hkv, S = k.shape[1:3]
    delta, row_lse = torch.empty_like(lse), torch.empty_like(lse)
    dq = q.new_empty(B, T, H, D).transpose(1, 2) if need_dq else None
    dk, dv = (k.new_empty(B, S, Hkv, D).transpose(1, 2) if need_dkdv else None for _ in range(2))
    shared = (q, k, v, dout, row_lse, delta)
    strides = (*q.stride(), *k.stride(), *v.stride(), *dout.stride())
    scalars = (H, T, S, dropout.seed, dropout.batch_offset, dropout.head_offset)
    constants = dict(GROUP=H // Hkv, CAUSAL=causal, SCALE=scale, DROP_BELOW=dropout.drop_below,
                     KEEP_SCALE=dropout.keep_scale, D=D, BLOCK_D=block_d(D))  # fmt: skip
    chosen = DELTA.parameters(q.device, D, q.itemsize)
    chosen.launch(
        _delta_kernel, (triton.cdiv(T, chosen["BLOCK_M"]) * B * H,),
        out, dout, lse, dlse, delta, row_lse, *dout.stride(), *((0, 0, 0) if dlse is None else dlse.stride()),
        H, T, D=D, BLOCK_D=block_d(D),
    )  # fmt: skip
    if need_dkdv:
        chosen = DKDV.parameters(q.device, D, q.itemsize, dropout.drop_below > 0)
        grid = (triton.cdiv(S, chosen["BLOCK_N"]) * B * Hkv,)
        chosen.launch(_dkdv_kernel, grid, *shared, dk, dv, *strides, *scalars, **constants)
    if need_dq:
        chosen = DQ.parameters(q.device, D, q.itemsize, dropout.drop_below > 0)
        grid = (triton.cdiv(T, chosen["BLOCK_M"]) * B * H,)
        chosen.launch(_dq_kernel, grid, *shared, dq, *strides, *scalars, **constants)
    return dq, dk, dv
