"""Linear cross entropy in Triton: lse and target logit of x @ weight.T, without the (N, V) logits in memory.

Forward. A program takes BLOCK_N tokens and SPLIT_V words, computes their logits tile by tile, and keeps a running
maximum m and sum l of each token (online softmax; Milakov and Gimelshein 2018, arXiv:1805.02867), in base 2:

    m' = max(m, max_v z_v),   l' = l 2^(m - m') + sum_v 2^(z_v - m'),   z = logit log2(e).

A second kernel folds the V / SPLIT_V partial results of a token in order. A tile that holds the token's target stores
its logit. Backward, for any incoming dlse and dtarget: a block of the vocabulary at a time, one kernel recomputes the
logits and writes

    dlogits = dlse exp(logit - lse) + dtarget onehot(target)

into a (N, block) buffer in x's dtype, and two GEMMs turn that into the block's rows of dweight and its share of dx.

FLOPs: 2 N V C forward and 6 backward, 8 in all against 6 unfused: the price of not keeping the logits. Memory beyond
inputs and gradients: 8 bytes for each token and SPLIT_V words, BUFFER_ELEMENTS of dlogits (bounded whatever N and V),
dx in float32, and weight in x's dtype if it has another. No atomics: two runs give the same bits.

N tokens, C hidden, V rows of weight.
"""

import math

import torch
import triton
import triton.language as tl

from heiretsu.kernels import plain
from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.dtypes import at_least_float32
from heiretsu.kernels.gpu import launch
from heiretsu.kernels.gpu.launch import Tiles, on_every_gpu
from heiretsu.kernels.gpu.row_tiles import as_rows

# At bf16, C = 768. Bound on tensor-core use (bytes spilled by a thread, all behind the hot loop): lse, dlogits, dx,
# dweight. A100 1.0 (24), 1.0 (16), 1.0 (64), 1.0; H100 1.0, 1.0 (8), 1.0, 1.0; B200 .50, .50, .67 (264), .67 (160);
# MI300X 1.0 each. 128 x 256 tiles, for 128 x 128 are held back by shared memory on H100 (.80); on B200 the two kernels
# with a long epilogue spill 288 and 104 bytes at 256. float32 has no tensor cores without TF32.
_BLOCKS = dict(BLOCK_N=128, BLOCK_V=256, BLOCK_C=64, num_warps=8, num_stages=3)
_SMALL = dict(BLOCK_N=64, BLOCK_V=64, BLOCK_C=16, num_warps=4, num_stages=2)
_SPLIT = dict(SPLIT_V=2048)
# dlogits of a block of the vocabulary: 128 MiB in bf16, 8192 words of 8192 tokens
_BUFFER = dict(BUFFER_ELEMENTS=1 << 26)
_GEMM = dict(BLOCK_M=128, BLOCK_C=256, BLOCK_K=64, num_warps=8, num_stages=3)
LSE = Tiles(
    "linear_cross_entropy_lse",
    {
        "ampere": {None: _SPLIT | _BLOCKS},
        "hopper": {None: _SPLIT | _BLOCKS},
        "blackwell": {None: _SPLIT | _BLOCKS | dict(BLOCK_V=128, num_warps=4)},
        "cdna3": {None: _SPLIT | _BLOCKS | dict(BLOCK_V=128, num_stages=2)},
        "interpreter": {None: dict(SPLIT_V=64, BLOCK_N=32, BLOCK_V=32, BLOCK_C=16, num_warps=4, num_stages=1)},
    },
    fp32=on_every_gpu({None: _SPLIT | _SMALL}),
)
COMBINE = Tiles(
    "linear_cross_entropy_combine",
    on_every_gpu({None: dict(BLOCK_N=128, num_warps=4, num_stages=1)})
    | {"interpreter": {None: dict(BLOCK_N=32, num_warps=4, num_stages=1)}},
)
DLOGITS = Tiles(
    "linear_cross_entropy_dlogits",
    {
        "ampere": {None: _BUFFER | _BLOCKS},
        "hopper": {None: _BUFFER | _BLOCKS},
        "blackwell": {None: _BUFFER | _BLOCKS | dict(BLOCK_V=128)},
        "cdna3": {None: _BUFFER | _BLOCKS | dict(BLOCK_V=128, num_stages=2)},
        "interpreter": {
            None: dict(BUFFER_ELEMENTS=4096, BLOCK_N=32, BLOCK_V=64, BLOCK_C=16, num_warps=4, num_stages=1)
        },
    },
    fp32=on_every_gpu({None: _BUFFER | _SMALL}),
)
GEMM = Tiles(
    "linear_cross_entropy_gemm",
    on_every_gpu({None: _GEMM})
    | {"cdna3": {None: _GEMM | dict(BLOCK_C=128, num_stages=2)}}
    | {"interpreter": {None: dict(BLOCK_M=32, BLOCK_C=64, BLOCK_K=16, num_warps=4, num_stages=1)}},
    fp32=on_every_gpu({None: dict(BLOCK_M=64, BLOCK_C=64, BLOCK_K=16, num_warps=4, num_stages=2)}),
)

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _logits_tile(x_ptr, weight_ptr, rows, words, N, V, C, stride_x, stride_w, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """x[rows] @ weight[words].T, (BLOCK_N, BLOCK_V). rows, words: int64; those beyond the end repeat the last one."""
    acc = tl.zeros([BLOCK_N, BLOCK_V], WIDE)
    channels = tl.arange(0, BLOCK_C)
    # Rows beyond the end read the last row: cheaper in the loop than a mask, and whoever uses the tile masks it anyway.
    x_ptr += tl.minimum(rows, N - 1)[:, None] * stride_x + channels[None, :]
    weight_ptr += tl.minimum(words, V - 1)[:, None] * stride_w + channels[None, :]
    for c in range(0, C, BLOCK_C):
        x = tl.load(x_ptr + c, mask=(channels < C - c)[None, :], other=0.0)
        w = tl.load(weight_ptr + c, mask=(channels < C - c)[None, :], other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee", out_dtype=WIDE)
    return acc


@triton.jit
def _column_of(local, first, BLOCK_V: tl.constexpr):
    """Column of each target in a tile that begins at word `first`, or -1: int32, cheaper to compare with than int64."""
    column = local - first
    return tl.where((column >= 0) & (column < BLOCK_V), column, -1).to(tl.int32)


@triton.jit
def _lse_kernel(
    x_ptr,  # (N, C), rows stride_x apart
    weight_ptr,  # (V, C), rows stride_w apart, x's dtype
    local_ptr,  # (N,) int64: row of the target in weight, or outside 0..V-1
    max_ptr,  # (splits, N), float32 or float64: running maximum, base 2
    sum_ptr,  # (splits, N)
    target_logit_ptr,  # (N,): written where the target is one of weight's rows
    N, V, C, stride_x, stride_w, SPLIT_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = max_ptr.dtype.element_ty
    token_blocks = tl.cdiv(N, BLOCK_N)  # programs that run together read the same words
    split = (tl.program_id(0) // token_blocks).to(tl.int64)
    rows = (tl.program_id(0) % token_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.load(local_ptr + rows, mask=rows < N, other=-1)
    running_max = tl.full([BLOCK_N], -float("inf"), WIDE)
    running_sum = tl.zeros([BLOCK_N], WIDE)
    columns = tl.arange(0, BLOCK_V)
    for start in range(0, SPLIT_V, BLOCK_V):
        first = split * SPLIT_V + start
        logits = _logits_tile(
            x_ptr, weight_ptr, rows, first + columns, N, V, C, stride_x, stride_w, WIDE, BLOCK_N, BLOCK_V, BLOCK_C
        )
        column = _column_of(local, first, BLOCK_V)
        picked = tl.sum(tl.where(columns[None, :] == column[:, None], logits, 0.0), 1)
        tl.store(target_logit_ptr + rows, picked, mask=(rows < N) & (column >= 0) & (local < V))
        z = tl.where((columns < V - first)[None, :], logits * _LOG2_E, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(z, 1))
        origin = tl.where(new_max == -float("inf"), 0.0, new_max)  # a tile beyond V in front of nothing
        running_sum = running_sum * tl.exp2(running_max - origin) + tl.sum(tl.exp2(z - origin[:, None]), 1)
        running_max = new_max
    tl.store(max_ptr + split * N + rows, running_max, mask=rows < N)
    tl.store(sum_ptr + split * N + rows, running_sum, mask=rows < N)


@triton.jit
def _combine_kernel(
    max_ptr,  # (splits, N)
    sum_ptr,  # (splits, N)
    lse_ptr,  # (N,)
    N, splits, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total_max = tl.load(max_ptr + rows, mask=rows < N, other=0.0)
    total = tl.load(sum_ptr + rows, mask=rows < N, other=1.0)
    for split in range(1, splits):
        at = tl.cast(split, tl.int64) * N + rows
        split_max = tl.load(max_ptr + at, mask=rows < N, other=0.0)
        split_sum = tl.load(sum_ptr + at, mask=rows < N, other=1.0)
        new_max = tl.maximum(total_max, split_max)
        total = total * tl.exp2(total_max - new_max) + split_sum * tl.exp2(split_max - new_max)
        total_max = new_max
    tl.store(lse_ptr + rows, (total_max + tl.log2(total)) * _LN_2, mask=rows < N)


@triton.jit
def _dlogits_kernel(
    x_ptr,  # (N, C), rows stride_x apart
    weight_ptr,  # (V, C), rows stride_w apart, x's dtype: one block of the vocabulary
    local_ptr,  # (N,) int64: row of the target in the block, or outside 0..V-1
    lse_ptr,  # (N,)
    dlse_ptr,  # (N,)
    dtarget_ptr,  # (N,)
    out_ptr,  # (N, width), rows stride_out apart, x's dtype; columns from V on become 0
    N, V, C, width, stride_x, stride_w, stride_out, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = lse_ptr.dtype.element_ty
    token_blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) % token_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (tl.program_id(0) // token_blocks).to(tl.int64) * BLOCK_V
    columns = tl.arange(0, BLOCK_V)
    logits = _logits_tile(
        x_ptr, weight_ptr, rows, first + columns, N, V, C, stride_x, stride_w, WIDE, BLOCK_N, BLOCK_V, BLOCK_C
    )
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0) * _LOG2_E
    dlse = tl.load(dlse_ptr + rows, mask=rows < N, other=0.0)
    dlogits = dlse[:, None] * tl.exp2(logits * _LOG2_E - lse[:, None])
    column = _column_of(tl.load(local_ptr + rows, mask=rows < N, other=-1), first, BLOCK_V)
    dtarget = tl.load(dtarget_ptr + rows, mask=rows < N, other=0.0)
    dlogits += tl.where(columns[None, :] == column[:, None], dtarget[:, None], 0.0)
    dlogits = tl.where((columns < V - first)[None, :], dlogits, 0.0)
    out_ptr += rows[:, None] * stride_out + first + columns[None, :]
    mask = (rows < N)[:, None] & (columns < width - first)[None, :]  # not V: a multiple of 16 lets the stores be wide
    tl.store(out_ptr, dlogits.to(out_ptr.dtype.element_ty), mask=mask)


# What 16 divides says nothing of the tiles here, but costs registers: dx with 2048 tokens spilled 56 bytes on H100.
@triton.jit(do_not_specialize=["b_rows", "out_rows"])
def _gemm_kernel(
    a_ptr,  # (M, K), strides stride_am, stride_ak; 0 in rows and columns that out and b do not have
    b_ptr,  # (b_rows, C), rows stride_b apart, a's dtype
    out_ptr,  # (out_rows, C): float32 or float64, or if not ADD any float
    M, K, C, b_rows, out_rows, stride_am, stride_ak, stride_b, ADD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = a @ b, or out += a @ b if ADD."""
    WIDE: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    col_blocks = tl.cdiv(C, BLOCK_C)  # programs that run together read the same rows of a, the large operand
    rows = (tl.program_id(0) // col_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % col_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inner = tl.arange(0, BLOCK_K)
    a_ptr += rows[:, None] * stride_am + inner.to(tl.int64)[None, :] * stride_ak
    b_ptr += inner.to(tl.int64)[:, None] * stride_b + cols[None, :]
    mask = (rows < out_rows)[:, None] & (cols < C)[None, :]
    out_ptr += rows[:, None] * C + cols[None, :]
    if ADD:  # first and not last: beside a full accumulator, it would spill
        acc = tl.load(out_ptr, mask=mask, other=0.0)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_C], WIDE)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr, mask=(rows < M)[:, None] & (inner < K - k)[None, :], other=0.0)
        b = tl.load(b_ptr, mask=(inner < b_rows - k)[:, None] & (cols < C)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=WIDE)
        a_ptr += tl.cast(stride_ak, tl.int64) * BLOCK_K
        b_ptr += tl.cast(stride_b, tl.int64) * BLOCK_K
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _gemm(a, b, out, add):
    """out (M, C) = a (M, K) @ b (K, C), or += if add. a: any strides. b: contiguous rows.

    a may have more rows than out, and more columns than b has rows, if they are 0: sizes that are multiples of 16 make
    for wide loads.
    """
    (M, K), C = a.shape, b.shape[1]
    chosen = GEMM.parameters(a.device, itemsize=a.itemsize)
    grid = (triton.cdiv(M, chosen["BLOCK_M"]) * triton.cdiv(C, chosen["BLOCK_C"]),)
    chosen.launch(
        _gemm_kernel, grid, a, b, out, M, K, C, b.shape[0], out.shape[0], *a.stride(), b.stride(0), ADD=add
    )  # fmt: skip


@torch.library.custom_op("heiretsu::linear_cross_entropy", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, local = as_rows(x), as_rows(weight.to(x.dtype)), targets - vocab_start
    (N, C), V = x.shape, weight.shape[0]
    chosen = LSE.parameters(x.device, itemsize=x.itemsize)
    splits = triton.cdiv(V, chosen["SPLIT_V"])
    lse, maxima, sums = (x.new_empty(shape, dtype=at_least_float32(x.dtype)) for shape in (N, (splits, N), (splits, N)))
    target_logit = torch.zeros_like(lse)
    chosen.launch(
        _lse_kernel, (triton.cdiv(N, chosen["BLOCK_N"]) * splits,),
        x, weight, local, maxima, sums, target_logit, N, V, C, x.stride(0), weight.stride(0),
    )  # fmt: skip
    chosen = COMBINE.parameters(x.device)
    chosen.launch(_combine_kernel, (triton.cdiv(N, chosen["BLOCK_N"]),), maxima, sums, lse, N, splits)
    return lse, target_logit


@_forward.register_fake
def _(x, weight, targets, vocab_start):
    return tuple(x.new_empty(x.shape[0], dtype=at_least_float32(x.dtype)) for _ in range(2))


@torch.library.custom_op("heiretsu::linear_cross_entropy_backward", mutates_args=())
def _backward(
    dlse: torch.Tensor, dtarget: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
    lse: torch.Tensor, vocab_start: int, need_dx: bool, need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx (N, C) if need_dx and dweight (V, C) if need_dweight, else empty."""
    (N, C), V = x.shape, weight.shape[0]
    rows, dlse, dtarget = as_rows(x), dlse.contiguous(), dtarget.contiguous()
    dx = x.new_empty(N if need_dx else 0, C, dtype=at_least_float32(x.dtype))
    dweight = weight.new_empty(V if need_dweight else 0, C)
    chosen = DLOGITS.parameters(x.device, itemsize=x.itemsize)
    # Words of a block: as many tiles as the buffer holds, and one at least.
    block = max(1, chosen.pop("BUFFER_ELEMENTS") // (N * chosen["BLOCK_V"])) * chosen["BLOCK_V"]
    buffer = x.new_empty(N, min(block, triton.cdiv(V, 16) * 16))
    for start in range(0, V, block):
        words = min(block, V - start)
        width = triton.cdiv(words, 16) * 16
        narrow, dlogits = as_rows(weight[start : start + words].to(x.dtype)), buffer[:, :width]
        chosen.launch(
            _dlogits_kernel, (triton.cdiv(N, chosen["BLOCK_N"]) * triton.cdiv(width, chosen["BLOCK_V"]),),
            rows, narrow, targets - (vocab_start + start), lse, dlse, dtarget, dlogits, N, words, C, width,
            rows.stride(0), narrow.stride(0), dlogits.stride(0),
        )  # fmt: skip
        if need_dx:
            _gemm(dlogits, narrow, dx, add=start > 0)
        if need_dweight:
            _gemm(dlogits.T, rows, dweight[start : start + words], add=False)
    return dx.to(x.dtype, copy=True), dweight


@_backward.register_fake
def _(dlse, dtarget, x, weight, targets, lse, vocab_start, need_dx, need_dweight):
    (N, C), V = x.shape, weight.shape[0]
    return x.new_empty(N if need_dx else 0, C), weight.new_empty(V if need_dweight else 0, C)


def _setup_context(ctx, inputs, output):
    x, weight, targets, ctx.vocab_start = inputs
    ctx.save_for_backward(x, weight, targets, output[0])


def _autograd_backward(ctx, dlse, dtarget):
    needs = ctx.needs_input_grad[:2]
    return *_backward(dlse, dtarget, *ctx.saved_tensors, ctx.vocab_start, *needs), None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@checked
def linear_cross_entropy(x, weight, targets, vocab_start=0):
    """Log-sum-exp of x @ weight.T and the target's logit, in Triton: `plain.linear_cross_entropy`.

    x: (N, C) float. weight: (V, C) float, whose dtype may differ: rows vocab_start .. vocab_start + V - 1 of the whole
    vocabulary. targets: (N,) int64, whole-vocabulary indices; one outside the shard gives target_logit 0.
    Returns lse (N,), target_logit (N,), float32 (float64 for float64); the loss is lse - target_logit.
    """
    launch.require_device("linear_cross_entropy", x)
    reverse_mode_only("linear_cross_entropy", x, weight)
    if x.numel() == 0 or weight.numel() == 0:
        return plain.linear_cross_entropy(x, weight, targets, vocab_start)
    return _forward(x, weight, targets, vocab_start)
