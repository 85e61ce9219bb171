"""Linear cross entropy on the CPU: three GEMMs over chunks of tokens, and never the (N, V) logits.

With P = softmax(x @ weight.T) and Q = P - onehot(target), the gradients for any incoming dlse and dtarget are

    dx      = dlse Q @ weight     + (dlse + dtarget) weight[target]
    dweight = (dlse Q).T @ x      + (dlse + dtarget) x, added to the target's row

so the forward, while it holds a chunk of logits, can take from it what both need: Q @ weight, which gives dx whatever
dlse turns out to be, and Q.T @ x, which gives dweight if dlse is one number for the tokens that have a target and 0 for
the others: the mean (or sum) of lse - target_logit, the loss that everybody takes. Any other dlse is recognised in the
backward, which then recomputes the logits, a block of the vocabulary at a time: a fourth GEMM, not a wrong answer. A
shard of the vocabulary never gets such a dlse (it is weighted by the shards' softmax), so where a target belongs to
another shard nothing is computed for dweight in advance.

Q instead of P, because the gradient of a well predicted token (Q near 0) would otherwise be the rounded difference of
two large numbers.

Memory beyond inputs and gradients: a chunk of logits in x's dtype (_CHUNK_ELEMENTS of them), one (N, C) tensor, and
from forward to backward one (V, C) in float32, the gradient in waiting. Plain holds (N, V) in float32, several times:
at N = 2048, C = 384, V = 50257 in bf16 the peak is 315 MiB, dweight included, against 1546 of plain.
"""

import torch

from heiretsu.kernels import plain
from heiretsu.kernels.arguments import checked, own_dtypes, reverse_mode_only
from heiretsu.kernels.cpu.row_blocks import slices
from heiretsu.kernels.dtypes import at_least_float32

# 512 tokens of 50257 words, 50 MB in bf16: fewer rows make more passes over the (V, C) sum.
_CHUNK_ELEMENTS = 26_000_000
_ROW_BLOCK_ELEMENTS = 1 << 19  # widened to float32 for the softmax: 2 MB, the L2 caches of two cores
_VOCAB_BLOCK = 2048


def _chunk_rows(elements, columns):
    """Rows of `columns` that make about `elements`; of more than 128, a multiple: a GEMM of 517 is a quarter slower."""
    rows = max(1, elements // columns)
    return rows - rows % 128 if rows > 128 else rows


def _local_targets(targets, vocab_start, V):
    """Each target's row in the shard (0 if outside), whether it is inside, and whether any belongs to another shard."""
    local = targets - vocab_start
    inside = (local >= 0) & (local < V)
    return torch.where(inside, local, 0), inside, bool(((targets >= 0) & ~inside).any())


def _softmax_rows(logits, local, inside, lse, target_logit, need_q):
    """Fill lse and target_logit, (n,), from logits, (n, V), which become Q = softmax - onehot(local) if need_q."""
    row = torch.arange(logits.shape[0], device=logits.device)
    target_logit.copy_(torch.where(inside, logits[row, local], 0.0))
    blocks = slices(len(row), max(1, _ROW_BLOCK_ELEMENTS // logits.shape[1]))
    wide = lse.new_empty(blocks[0].stop, logits.shape[1])
    for rows in blocks:
        block = wide[: rows.stop - rows.start].copy_(logits[rows])
        largest = block.amax(-1)
        torch.softmax(block, -1, out=block)
        torch.sub(largest, block.amax(-1).log_(), out=lse[rows])  # the largest probability is 1 / sum exp(l - largest)
        if need_q:
            logits[rows] = block
    if need_q:
        logits[row[inside], local[inside]] = torch.expm1(target_logit - lse).to(logits.dtype)[inside]


def _accumulate_product(total, q, x, first):
    """total (V, C) = q.T @ x if first, else += it, in blocks of the vocabulary that are widened while still cached."""
    if x.dtype == total.dtype:
        total.addmm_(q.T, x, beta=0.0 if first else 1.0)
        return
    blocks = slices(len(total), _VOCAB_BLOCK)
    narrow, wide = (tensor.new_empty(blocks[0].stop, x.shape[1]) for tensor in (x, total))
    for block in blocks:
        n = block.stop - block.start
        product = torch.mm(q[:, block].T, x, out=narrow[:n])
        if first:
            total[block] = product
        else:
            total[block] += wide[:n].copy_(product)


def _empty_outputs(x, weight, need_dx, need_dweight):
    (N, C), V = x.shape, weight.shape[0]
    lse, target_logit = (x.new_empty(N, dtype=at_least_float32(x.dtype)) for _ in range(2))
    return lse, target_logit, x.new_empty(N if need_dx else 0, C), lse.new_empty(V if need_dweight else 0, C)


@torch.library.custom_op("heiretsu::cpu_linear_cross_entropy", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_start: int, need_dx: bool, need_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """lse (N,), target_logit (N,), Q @ weight (N, C) if need_dx, and if need_dweight Q.T @ x (V, C), or zeros where a
    target belongs to another shard."""
    lse, target_logit, q_weight, q_x = _empty_outputs(x, weight, need_dx, need_dweight)
    N, V = len(x), len(weight)
    local, inside, another_shard = _local_targets(targets, vocab_start, V)
    need_q_x = need_dweight and not another_shard
    narrow = weight.to(x.dtype)
    chunks = slices(N, _chunk_rows(_CHUNK_ELEMENTS, V))
    logits = x.new_empty(chunks[0].stop, V)
    if not need_q_x:
        q_x.zero_()
    for chunk in chunks:
        q = torch.mm(x[chunk], narrow.T, out=logits[: chunk.stop - chunk.start])
        _softmax_rows(q, local[chunk], inside[chunk], lse[chunk], target_logit[chunk], need_dx or need_q_x)
        if need_dx:
            torch.mm(q, narrow, out=q_weight[chunk])
        if need_q_x:
            _accumulate_product(q_x, q, torch.where(inside[chunk, None], x[chunk], 0.0), first=chunk.start == 0)
    return lse, target_logit, q_weight, q_x


@_forward.register_fake
def _(x, weight, targets, vocab_start, need_dx, need_dweight):
    return _empty_outputs(x, weight, need_dx, need_dweight)


@torch.library.custom_op("heiretsu::cpu_linear_cross_entropy_backward", mutates_args=())
@own_dtypes
def _backward(
    dlse: torch.Tensor, dtarget: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
    lse: torch.Tensor, q_weight: torch.Tensor, q_x: torch.Tensor, vocab_start: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx where there is a q_weight, dweight where there is a q_x; else empty."""
    local, inside, another_shard = _local_targets(targets, vocab_start, weight.shape[0])
    beyond = torch.where(inside, dlse + dtarget, 0.0)  # what onehot gets over -dlse, which Q has
    dx, dweight = torch.empty_like(q_weight), torch.empty_like(q_x, dtype=weight.dtype)
    if len(dx):
        dx.copy_(torch.addcmul(beyond[:, None] * weight[local], dlse[:, None], q_weight))
    if len(dweight):
        has_target = inside.nonzero()[:, 0]
        level = dlse[has_target[0]] if len(has_target) else dlse.new_zeros(())
        if not another_shard and torch.equal(dlse, torch.where(inside, level, 0.0)):
            torch.mul(q_x, level, out=dweight)
            if beyond.any():
                rows = beyond[has_target, None] * x[has_target]
                dweight.index_add_(0, local[has_target], rows.to(dweight.dtype))
        else:
            _recompute_dweight(dweight, dlse, dtarget, x, weight, lse, torch.where(inside, local, -1))
    return dx, dweight


def _recompute_dweight(dweight, dlse, dtarget, x, weight, lse, local):
    """dweight = (dlse P + dtarget onehot).T @ x, whatever dlse and dtarget are. local: -1 where there is no target."""
    for block in slices(len(weight), _chunk_rows(_CHUNK_ELEMENTS // 2, len(x))):  # half: this one is widened
        dlogits = (x @ weight[block].to(x.dtype).T).to(lse.dtype)
        dlogits.sub_(lse[:, None]).exp_().mul_(dlse[:, None])
        here = ((local >= block.start) & (local < block.stop)).nonzero()[:, 0]
        dlogits[here, local[here] - block.start] += dtarget[here]
        dweight[block] = dlogits.to(x.dtype).T @ x


@_backward.register_fake
def _(dlse, dtarget, x, weight, targets, lse, q_weight, q_x, vocab_start):
    return torch.empty_like(q_weight), torch.empty_like(q_x, dtype=weight.dtype)


def _setup_context(ctx, inputs, output):
    x, weight, targets, ctx.vocab_start, *_ = inputs
    lse, _, q_weight, q_x = output
    ctx.mark_non_differentiable(q_weight, q_x)
    ctx.save_for_backward(x, weight, targets, lse, q_weight, q_x)


def _autograd_backward(ctx, dlse, dtarget, *_):
    return *_backward(dlse, dtarget, *ctx.saved_tensors, ctx.vocab_start), None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@checked
def linear_cross_entropy(x, weight, targets, vocab_start=0):
    """`plain.linear_cross_entropy` on CPU tensors: lse (N,) and target_logit (N,) in float32 (float64 for float64).

    x: (N, C). weight: (V, C), any float dtype. targets: (N,) int64.
    """
    reverse_mode_only("linear_cross_entropy", x, weight)
    if x.shape[0] == 0 or weight.shape[0] == 0:
        return plain.linear_cross_entropy(x, weight, targets, vocab_start)
    needs = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    return _forward(x, weight, targets, vocab_start, *needs)[:2]
