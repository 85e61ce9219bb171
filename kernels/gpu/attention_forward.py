"""Attention, forward pass (Dao 2023, "FlashAttention-2", arXiv:2307.08691, algorithm 1).

One program computes BLOCK_M queries of one head. It walks over the keys with a running row maximum m, row sum l and
unnormalised output acc, all in base 2: with s = q k^T * scale * log2(e),

    m' = max(m, max_j s_j),   l' = l 2^(m-m') + sum_j 2^(s_j-m'),   acc' = acc 2^(m-m') + 2^(s-m') v.

Blocks of keys that every query of the program sees come first, in a loop without a mask; the diagonal and the tail
follow in a masked loop. Bytes: q, k, v, out once from and to memory (k and v once per BLOCK_M queries from the L2
cache), against the (T, S) score matrix written and read three times. FLOPs: 4 T S D a head, half of it when causal.

B batch, H heads, T queries, S keys, D head dim.
"""

import triton
import triton.language as tl

from heiretsu.kernels.dtypes import at_least_float32
from heiretsu.kernels.gpu.attention_tiles import (
    LN_2,
    block_d,
    dot,
    dot_add,
    exponential,
    keep_mask,
    load_rows,
    scaled,
    store_rows,
)
from heiretsu.kernels.gpu.launch import Tiles, on_every_gpu, tile
from heiretsu.kernels.random import Dropout

# By head dim. Behind an entry: the bound that the other pipes set to the tensor cores (less what is computed twice),
# registers / spilled bytes / programs on an SM, all at bf16, causal; and what a neighbour would give. On H100 every dot
# has N >= 64, which wgmma needs for its full rate; on A100 and MI300X registers decide.
#
# fp32: its dots are made of FMAs: small tiles, so that neither registers nor the unrolled code explode. No spills but
# 32 bytes on B200 at D = 256.
# dropout: Philox takes 46 instructions an element, which set the bound whatever the tile is, and their temporaries take
# registers, hence fewer elements a thread.
# interpreter: unequal blocks, so that a confusion of M and N shows; small, so that short tests have several.
TILES = Tiles(
    "attention_forward",
    {
        "ampere": {
            64: tile(128, 64, 4, 2),  # 1.00, 255/0/2; 8 warps .80: each reads all of k and v from shared memory
            128: tile(128, 64, 8, 2),  # .80, 245/0/1; 4 warps 1.00, but 264 bytes spilled
            256: tile(64, 64, 8, 2),  # .52, 255/0/1
        },
        "hopper": {
            64: tile(128, 64, 4, 2),  # .94, 213/0/2, bound by exp2
            128: tile(128, 128, 8, 2),  # 1.00, 223/0/1; 128 x 64 with 4 warps spills 104 bytes
            256: tile(128, 64, 8, 2),  # 1.00, 246/0/1
        },
        "blackwell": {
            64: tile(128, 64, 4, 2),  # .49, 216/0/2, bound by exp2
            128: tile(128, 128, 8, 2),  # .79, 228/0/1
            256: tile(128, 64, 8, 2),  # .66, 252/0/1
        },
        "cdna3": {
            64: tile(128, 64, 4, 1),  # .59, 204/0/2
            128: tile(128, 32, 4, 1),  # 1.00, 203/0/2; 128 x 64 takes 303 registers
            256: tile(128, 16, 4, 1),  # 1.00, 305/0/1, all 64 KB of LDS
        },
        "interpreter": {None: tile(64, 32, 4, 1)},
    },
    fp32=on_every_gpu({64: tile(64, 32, 8, 1), 128: tile(32, 32, 8, 1), 256: tile(16, 16, 4, 1)}),
    dropout={
        "ampere": {
            64: tile(64, 64, 4, 2),  # .18, 190/0/2; 128 x 64 spills 40 bytes
            128: tile(128, 32, 8, 2),  # .33, 226/0/1; 128 x 64 spills 8 bytes
            256: tile(64, 64, 8, 2),  # .52, 255/0/1
        },
        "hopper": {
            64: tile(64, 64, 4, 2),  # .10, 148/0/3; 128 x 64 with 4 warps spills 40 bytes
            128: tile(128, 64, 8, 2),  # .19, 179/0/1; 128 x 128 spills 72 bytes
            256: tile(128, 64, 8, 2),  # .38, 255/0/1
        },
        "blackwell": {
            64: tile(64, 32, 4, 2),  # .04, 221/0/2; 128 x 64 with 8 warps 312 bytes, with 4 2464
            128: tile(128, 32, 8, 2),  # .09, 234/0/1; 128 x 64 520 bytes, 128 x 128 2376
            256: tile(64, 32, 8, 2),  # .17, 214/0/1; 128 x 64 1032 bytes
        },
        "cdna3": {
            64: tile(128, 32, 4, 1),  # .10, 180/0/2; 128 x 64 takes 301 registers
            128: tile(128, 32, 4, 1),  # .20, 252/0/2
            256: tile(128, 16, 4, 1),  # .35, 323/0/1
        },
    },
)


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k_ptr, v_ptr, stride_ks, stride_kd, stride_vs, stride_vd, start, end, rows, S, shift,
    seed, head, batch, MASKED: tl.constexpr, CAUSAL: tl.constexpr, SCALE: tl.constexpr, DROP_BELOW: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold keys start .. end-1 into (acc, row_max, row_sum)."""
    WIDE: tl.constexpr = q.dtype.primitive_bitwidth > 16
    for n in range(start, end, BLOCK_N):
        k = load_rows(k_ptr, n, S, stride_ks, stride_kd, BLOCK_N, MASKED, D, BLOCK_D)
        s = dot(q, k.T)
        cols = n + tl.arange(0, BLOCK_N)
        if MASKED:
            visible = (cols < S)[None, :]
            if CAUSAL:
                visible &= cols[None, :] <= rows[:, None] + shift
            s = tl.where(visible, scaled(s, SCALE, WIDE), -float("inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            origin = tl.where(new_max == -float("inf"), 0.0, new_max)  # a row that has seen nothing: 2^(-inf - 0) = 0
            p = exponential(s - origin[:, None], WIDE)
        else:
            new_max = tl.maximum(row_max, scaled(tl.max(s, 1), SCALE, WIDE))
            origin = new_max
            p = exponential(scaled(s, SCALE, WIDE) - new_max[:, None], WIDE)  # 16 bits: one fma and one exp2 an element
        rescale = exponential(row_max - origin, WIDE)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        if DROP_BELOW > 0:
            p = tl.where(keep_mask(cols[None, :], rows[:, None], head, batch, seed, DROP_BELOW), p, 0.0)
        v = load_rows(v_ptr, n, S, stride_vs, stride_vd, BLOCK_N, MASKED, D, BLOCK_D)
        acc = dot_add(acc, p.to(v.dtype), v)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["H", "T", "S", "seed", "batch_offset", "head_offset"])
def _forward_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, Hkv, S, D)
    v_ptr,  # (B, Hkv, S, D)
    out_ptr,  # (B, T, H, D), contiguous
    lse_ptr,  # (B, H, T), contiguous, natural logarithm
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, H, T, S, seed, batch_offset, head_offset,
    GROUP: tl.constexpr,  # query heads per key head
    CAUSAL: tl.constexpr, SCALE: tl.constexpr,
    DROP_BELOW: tl.constexpr,  # drop where the random bits are below it; 0: no dropout
    KEEP_SCALE: tl.constexpr,  # 1 / (1 - dropout_p)
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    # Programs of a head are neighbours, so that they share its keys in the L2 cache; the longest rows start first.
    num_blocks = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    block = num_blocks - 1 - pid % num_blocks
    b, h = pid // num_blocks // H, pid // num_blocks % H
    batch, head = b.to(tl.int64), h.to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // GROUP * stride_kh
    v_ptr += batch * stride_vb + head // GROUP * stride_vh

    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, first_row, T, stride_qt, stride_qd, BLOCK_M, True, D, BLOCK_D)
    shift = S - T  # query i sees keys 0 .. i + shift
    end, seen_by_all = S, S
    if CAUSAL:
        end = tl.minimum(S, first_row + BLOCK_M + shift)
        seen_by_all = tl.minimum(S, tl.maximum(0, first_row + shift + 1))
    whole = seen_by_all // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype)
    row_max = tl.full([BLOCK_M], -float("inf"), dtype)
    row_sum = tl.zeros([BLOCK_M], dtype)
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, stride_ks, stride_kd, stride_vs, stride_vd, 0, whole, rows, S, shift,
        seed, h + head_offset, b + batch_offset, False, CAUSAL, SCALE, DROP_BELOW, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, stride_ks, stride_kd, stride_vs, stride_vd, whole, end, rows, S, shift,
        seed, h + head_offset, b + batch_offset, True, CAUSAL, SCALE, DROP_BELOW, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # a row that sees nothing: out 0 and lse -inf
    WIDE: tl.constexpr = q.dtype.primitive_bitwidth > 16
    lse = row_max + tl.log2(row_sum) * LN_2 if WIDE else (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + (batch * H + head) * T + rows, lse, mask=rows < T)
    acc = acc * (KEEP_SCALE / row_sum)[:, None]
    out_ptr += (batch * T * H + head) * D
    store_rows(out_ptr, acc, first_row, T, H * D, BLOCK_M, D, BLOCK_D)


def forward(q, k, v, causal: bool, scale: float, dropout: Dropout):
    """out (B, H, T, D) in the memory layout (B, T, H, D), and lse (B, H, T). The arguments have been checked."""
    B, H, T, D = q.shape
    out = q.new_empty(B, T, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, T, dtype=at_least_float32(q.dtype))
    chosen = TILES.parameters(q.device, D, q.itemsize, dropout.drop_below > 0)
    chosen.launch(
        _forward_kernel, (triton.cdiv(T, chosen["BLOCK_M"]) * B * H,),
        q, k, v, out, lse, *q.stride(), *k.stride(), *v.stride(), H, T, k.shape[2],
        dropout.seed, dropout.batch_offset, dropout.head_offset,
        GROUP=H // k.shape[1], CAUSAL=causal, SCALE=scale, DROP_BELOW=dropout.drop_below,
        KEEP_SCALE=dropout.keep_scale, D=D, BLOCK_D=block_d(D),
    )  # fmt: skip
    return out, lse
