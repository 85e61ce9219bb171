"""Parity cases and planted bugs of linear_cross_entropy.

In the interpreter a forward program takes 32 tokens and 64 words, 32 at a time, 16 channels deep; the backward's buffer
holds 4096 logits, so that 32 tokens meet blocks of 128 words and 33 to 64 tokens blocks of 64; its GEMMs have tiles of
32 by 64, 16 deep.
"""

import torch

from tests.kernels.parity import Case, Mutation


def _inputs(N, C, V, weights=None, targets=lambda t: t, vocab=None, vocab_start=0, spread=1.0, grad=("x", "weight")):
    """weights: dtype of weight, x's by default. vocab: size of the whole vocabulary that targets are drawn from, V by
    default. targets: edits them."""

    def inputs(generator, dtype):
        x = (torch.randn(N, C, generator=generator) * spread).to(dtype)
        weight = torch.randn(V, C, generator=generator).to(weights or dtype)
        target = targets(torch.randint(0, vocab or V, (N,), generator=generator))
        return {
            "x": x.requires_grad_("x" in grad),
            "weight": weight.requires_grad_("weight" in grad),
            "targets": target,
            "vocab_start": vocab_start,
        }

    return inputs


def _some_ignored(targets):
    return torch.where(torch.arange(len(targets)) % 3 == 1, -100, targets)


def _edges(targets):
    """First and last word of the vocabulary of 130, and of the blocks and tiles in it."""
    words = torch.tensor([0, 129, 128, 127, 63, 64, 31, 32, 95, 96])
    return words.repeat(len(targets) // len(words) + 1)[: len(targets)]


def _views(generator, dtype):
    x = torch.randn(37, 2, 24, generator=generator).to(dtype)[:, 1]  # rows 48 apart
    weight = torch.randn(24, 90, generator=generator).to(dtype).T[::2]  # (45, 24), columns first
    targets = torch.randint(0, 45, (74,), generator=generator)[::2]
    return {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "targets": targets}


def _peaked(generator, dtype):
    """Every token predicts its target, or another word, with probability near 1."""
    weight = torch.eye(40, 48) * 12.0
    words = torch.randint(0, 40, (35,), generator=generator)
    targets = torch.where(torch.arange(35) % 4 == 0, (words + 1) % 40, words)
    x = weight[words] + 0.1 * torch.randn(35, 48, generator=generator)
    return {"x": x.to(dtype).requires_grad_(), "weight": weight.to(dtype).requires_grad_(), "targets": targets}


CASES = [
    Case("linear_cross_entropy", "one of each", "N = C = V = 1: nothing to choose, lse is the logit", _inputs(1, 1, 1)),
    Case("linear_cross_entropy", "whole tiles", "no tail: 32 tokens, 128 words", _inputs(32, 16, 128), emulate=True),
    Case(
        "linear_cross_entropy",
        "tails",
        "33 tokens, 17 channels, 65 words: one behind",
        _inputs(33, 17, 65),
        emulate=True,
    ),
    Case("linear_cross_entropy", "short tails", "63 tokens, 15 channels, 127 words: one before", _inputs(63, 15, 127)),
    Case("linear_cross_entropy", "many blocks", "several splits, and blocks in the backward", _inputs(70, 40, 300)),
    Case(
        "linear_cross_entropy", "edges", "targets at the ends of tiles and blocks", _inputs(40, 20, 130, targets=_edges)
    ),
    Case("linear_cross_entropy", "one token", "a single row", _inputs(1, 64, 200)),
    Case("linear_cross_entropy", "one word", "the softmax is 1", _inputs(35, 20, 1)),
    Case("linear_cross_entropy", "float32 weight", "mixed precision", _inputs(40, 32, 150, weights=torch.float32)),
    Case(
        "linear_cross_entropy",
        "wide logits",
        "exp would overflow without the maximum",
        _inputs(40, 64, 150, spread=8.0),
    ),
    Case("linear_cross_entropy", "peaked", "tokens predicted with probability near 1", _peaked),
    Case("linear_cross_entropy", "ignored", "targets of -100", _inputs(40, 20, 100, targets=_some_ignored)),
    Case(
        "linear_cross_entropy", "all ignored", "no target at all", _inputs(33, 20, 100, targets=lambda t: t * 0 - 100)
    ),
    Case("linear_cross_entropy", "first shard", "targets beyond it", _inputs(40, 20, 70, vocab=200)),
    Case("linear_cross_entropy", "middle shard", "on both sides", _inputs(40, 20, 70, vocab=200, vocab_start=70)),
    Case(
        "linear_cross_entropy",
        "far shard",
        "a vocabulary beyond 32 bits",
        _inputs(40, 20, 70, targets=lambda t: t + 2**33 + 3, vocab_start=2**33),
    ),
    Case("linear_cross_entropy", "views", "rows apart, a transposed and strided weight, strided targets", _views),
    Case("linear_cross_entropy", "only x", "the head is frozen", _inputs(40, 20, 70, grad=("x",))),
    Case("linear_cross_entropy", "only weight", "the body is frozen", _inputs(40, 20, 70, grad=("weight",))),
    Case("linear_cross_entropy", "no grad", "evaluation", _inputs(40, 20, 70, grad=())),
    Case(
        "linear_cross_entropy",
        "only lse used",
        "no gradient into the target's logit",
        _inputs(40, 20, 70),
        backward=("lse",),
    ),
    Case(
        "linear_cross_entropy",
        "only the logit used",
        "no gradient into lse",
        _inputs(40, 20, 70),
        backward=("target_logit",),
    ),
    Case("linear_cross_entropy", "no tokens", "an empty batch", _inputs(0, 20, 70)),
    Case("linear_cross_entropy", "no words", "an empty shard: lse -inf", _inputs(9, 20, 0, vocab=70)),
]

_FILE = "linear_cross_entropy.py"

MUTATIONS = [
    Mutation(
        "rescale of the running sum missing",
        "running_sum * tl.exp2(running_max - origin)",
        "running_sum",
        "many blocks",
        _FILE,
    ),
    Mutation(
        "rescale missing where splits meet", "total * tl.exp2(total_max - new_max)", "total", "many blocks", _FILE
    ),
    Mutation(
        "last split dropped", "for split in range(1, splits)", "for split in range(1, splits - 1)", "many blocks", _FILE
    ),
    Mutation(
        "words beyond V counted",
        'tl.where((columns < V - first)[None, :], logits * _LOG2_E, -float("inf"))',
        "logits * _LOG2_E",
        "tails",
        _FILE,
    ),
    Mutation(
        "maximum not subtracted",
        "tl.maximum(running_max, tl.max(z, 1))",
        "tl.maximum(running_max, 0.0 * tl.max(z, 1))",
        "wide logits",
        _FILE,
    ),
    Mutation("target off by one", "column = local - first", "column = local - first + 1", "edges", _FILE),
    Mutation(
        "target offset of the shard dropped",
        "as_rows(weight.to(x.dtype)), targets - vocab_start\n",
        "as_rows(weight.to(x.dtype)), targets\n",
        "middle shard",
        _FILE,
    ),
    Mutation(
        "target offset of a block dropped",
        "targets - (vocab_start + start)",
        "targets - vocab_start",
        "many blocks",
        _FILE,
    ),
    Mutation("target beyond the shard picked", "(column >= 0) & (local < V)", "(column >= 0)", "first shard", _FILE),
    Mutation(
        "channels beyond C counted",
        "mask=(channels < C - c)[None, :], other=0.0)\n        w",
        "mask=(channels <= C - c)[None, :], other=0.0)\n        w",
        "tails",
        _FILE,
    ),
    Mutation("dlse dropped", "dlse[:, None] * tl.exp2", "tl.exp2", "only the logit used", _FILE),
    Mutation(
        "dtarget dropped",
        "dlogits += tl.where(columns[None, :] == column[:, None], dtarget[:, None], 0.0)",
        "pass",
        "only the logit used",
        _FILE,
    ),
    Mutation(
        "lse in the wrong base",
        "mask=rows < N, other=0.0) * _LOG2_E",
        "mask=rows < N, other=0.0)",
        "whole tiles",
        _FILE,
    ),
    Mutation(
        "dx of the last block alone",
        "_gemm(dlogits, narrow, dx, add=start > 0)",
        "_gemm(dlogits, narrow, dx, add=False)",
        "many blocks",
        _FILE,
    ),
    Mutation(
        "dweight of the first block only",
        "dweight[start : start + words], add=False)",
        "dweight[:words], add=False)",
        "many blocks",
        _FILE,
    ),
    Mutation(
        "padding of the buffer read as logits",
        "tl.where((columns < V - first)[None, :], dlogits, 0.0)",
        "dlogits + 1.0",
        "tails",
        _FILE,
    ),
    Mutation(
        "inner tail of the GEMM dropped",
        "for k in range(0, K, BLOCK_K)",
        "for k in range(0, K - BLOCK_K + 1, BLOCK_K)",
        "tails",
        _FILE,
    ),
]
