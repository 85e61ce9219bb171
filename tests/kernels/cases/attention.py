"""Parity cases of attention: lengths around the blocks' edges, padded head dims, views, grouped queries, dropout, lse.

The blocks of the interpreter's launches are 64 x 32 and 32 x 64 (queries x keys): 65 queries have a tail of one, 127
one less than two whole blocks, and every causal case from 63 on has blocks above, on and below the diagonal.
"""

import torch

from tests.kernels.parity import Case, Mutation


def _tensors(generator, dtype, shapes, grads="qkv"):
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {name: tensor.requires_grad_(name in grads) for name, tensor in tensors.items()}


def _separate(B, H, Hkv, T, S, D, grads="qkv", **options):
    """q, k, v of their own, contiguous."""

    def inputs(generator, dtype):
        shapes = {"q": (B, H, T, D), "k": (B, Hkv, S, D), "v": (B, Hkv, S, D)}
        return _tensors(generator, dtype, shapes, grads) | options

    return inputs


def _fused(B, H, T, D, **options):
    """q, k, v as views of a fused projection (B, T, 3 H D)."""

    def inputs(generator, dtype):
        projection = torch.randn(B, T, 3, H, D, generator=generator).to(dtype)
        views = projection.permute(2, 0, 3, 1, 4)
        return {name: view.requires_grad_() for name, view in zip("qkv", views, strict=True)} | options

    return inputs


def _odd_strides(generator, dtype):
    """q with the head dim outermost in memory; one k and v for the whole batch, of k every second row."""
    q = torch.randn(40, 2, 66, 2, generator=generator).to(dtype).permute(1, 3, 2, 0)
    k = torch.randn(1, 2, 80, 40, generator=generator).to(dtype)[:, :, ::2].expand(2, -1, -1, -1)
    v = torch.randn(1, 2, 40, 40, generator=generator).to(dtype).expand(2, -1, -1, -1)
    return {name: t.requires_grad_() for name, t in (("q", q), ("k", k), ("v", v))} | {"causal": False}


def _growing_keys(generator, dtype):
    """Later keys have larger scores: the running maximum moves in every block."""
    tensors = _tensors(generator, torch.float32, {"q": (1, 2, 65, 32), "k": (1, 2, 130, 32), "v": (1, 2, 130, 32)}, "")
    tensors["q"] = tensors["q"].abs()
    tensors["k"] = tensors["k"].abs() * torch.linspace(0.1, 2.0, 130)[:, None]
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}


def _huge_scores(generator, dtype):
    """Scores of some hundreds, of both signs: 2**s overflows unless the maximum is taken off first."""
    inputs = _separate(1, 1, 1, 40, 70, 16)(generator, dtype)
    return inputs | {"q": (inputs["q"].detach() * 30).requires_grad_(), "scale": 1.0, "causal": False}


def _low_scores(generator, dtype):
    """Every score far below zero: beside them, the score 0 of a key that is not there would be all."""
    inputs = _separate(1, 1, 1, 40, 70, 16)(generator, dtype)
    q, k = (inputs[name].detach().abs() for name in "qk")
    return inputs | {"q": (q * -30).requires_grad_(), "k": k.requires_grad_(), "scale": 1.0, "causal": False}


def _one_hot(generator, dtype):
    """Scores of 1e4: one key takes each row."""
    inputs = _separate(1, 1, 1, 20, 20, 16)(generator, dtype)
    return inputs | {"q": (inputs["q"].detach() * 1e4).requires_grad_()}


F32, BF16 = (torch.float32,), (torch.bfloat16,)
DROPOUT = dict(dropout_p=0.3, seed=2**40 + 7, offsets=(3, 5))

CASES = [
    Case("attention", "1 query", "one query, one key: the softmax is 1", _fused(1, 1, 1, 16)),
    Case("attention", "63 queries", "a block less one; head dim 40 is padded to 64", _fused(2, 2, 63, 40)),
    Case("attention", "65 queries", "a block and one; the layout of a model", _fused(1, 2, 65, 64)),
    Case("attention", "head dim 128", "a head dim of large models", _fused(1, 1, 70, 128), BF16),
    Case("attention", "head dim 256", "the largest head dim", _fused(1, 1, 66, 256), (torch.float32, torch.bfloat16)),
    Case("attention", "1000 queries", "many whole blocks and a tail", _fused(1, 1, 1000, 16), F32),
    Case("attention", "no queries", "empty: T = 0", _separate(1, 1, 1, 0, 5, 16), F32),
    Case(
        "attention", "dropout", "the mask of a shard: offsets, a seed beyond 32 bits", _fused(2, 2, 66, 16, **DROPOUT)
    ),
    Case(
        "attention",
        "tiny dropout",
        "drops below a number beyond 31 bits",
        _fused(1, 1, 20, 16, **DROPOUT | {"dropout_p": 0.6}),
        F32 + BF16,
        emulate=True,
    ),
    Case(
        "attention_lse",
        "127 keys, all seen",
        "no mask but the tail; head dim 80",
        _separate(1, 2, 2, 65, 127, 80, causal=False),
    ),
    Case("attention_lse", "20 of each", "tiny, causal, forward and backward", _fused(1, 1, 20, 16), emulate=True),
    Case(
        "attention_lse",
        "tiny groups",
        "grouped queries, no mask but the tail",
        _separate(1, 2, 1, 7, 19, 24, causal=False),
        F32 + BF16,
        emulate=True,
    ),
    Case(
        "attention_lse",
        "400 of each",
        "D 64: several tiles in a row before and on the diagonal, so that loads run ahead of the products",
        _fused(1, 1, 400, 64),
        BF16,
        emulate=True,
    ),
    Case("attention_lse", "grouped queries", "4 query heads on 2 key heads", _separate(2, 4, 2, 65, 65, 16)),
    Case(
        "attention_lse", "one key head", "multi-query, dropout", _separate(2, 3, 1, 40, 50, 16, **DROPOUT), F32 + BF16
    ),
    Case("attention_lse", "more keys", "the last query sees every key", _separate(1, 2, 2, 33, 100, 32)),
    Case(
        "attention_lse", "one query", "decoding: 147 keys, an odd head dim", _separate(2, 4, 2, 1, 147, 59), F32 + BF16
    ),
    Case("attention_lse", "head dim 192", "padded to 256", _separate(1, 2, 1, 33, 40, 192), BF16),
    Case("attention_lse", "more queries", "the first 67 queries see nothing", _separate(1, 2, 2, 100, 33, 32)),
    Case(
        "attention_lse",
        "more queries, dropout",
        "queries that see nothing, and a mask",
        _separate(1, 4, 2, 90, 30, 16, **DROPOUT),
        F32,
    ),
    Case("attention_lse", "no keys", "empty: S = 0 gives 0 and -inf", _separate(1, 1, 1, 5, 0, 16), F32),
    Case("attention_lse", "odd strides", "expanded k and v, rows apart, head dim outermost", _odd_strides),
    Case("attention_lse", "growing keys", "a running maximum that moves in every block", _growing_keys),
    Case("attention_lse", "huge scores", "2**s would overflow", _huge_scores, (torch.float32, torch.bfloat16)),
    Case(
        "attention_lse",
        "low scores",
        "2**-lse would overflow beside a padded key",
        _low_scores,
        (torch.float32, torch.bfloat16),
    ),
    Case("attention", "one key takes all", "ds is 0, and noise in it is large in dk", _one_hot, F32, emulate=True),
    Case("attention_lse", "own scale", "scale is not 1/sqrt(D)", _separate(1, 1, 1, 65, 65, 16, scale=0.6)),
    Case("attention_lse", "only q", "dq alone is wanted", _separate(1, 1, 1, 65, 40, 16, grads="q"), F32),
    Case("attention_lse", "only k", "dk alone is wanted", _separate(1, 1, 1, 65, 40, 16, grads="k"), F32),
    Case("attention", "only v", "dv alone is wanted", _separate(1, 1, 1, 65, 40, 16, grads="v"), F32),
    Case(
        "attention_lse",
        "lse alone",
        "only lse has a gradient",
        _separate(1, 2, 1, 65, 40, 16),
        F32 + BF16,
        backward=("lse",),
    ),
    Case(
        "attention_lse", "out alone", "only out has a gradient", _separate(1, 2, 1, 65, 40, 16), F32, backward=("out",)
    ),
]

_FORWARD, _BACKWARD, _TILES = "attention_forward.py", "attention_backward.py", "attention_tiles.py"
_CAUSAL = "visible &= cols[None, :] <= rows[:, None] + shift"

MUTATIONS = [
    Mutation("mask off by one", _CAUSAL, _CAUSAL.replace("<=", "<"), "65 queries", _FORWARD),
    Mutation("mask off by one, dq", _CAUSAL, _CAUSAL.replace("<=", "<"), "65 queries", _BACKWARD),
    Mutation(
        "mask off by one, dk and dv",
        "keys[:, None] <= rows[None, :] + shift",
        "keys[:, None] < rows[None, :] + shift",
        "65 queries",
        _BACKWARD,
    ),
    Mutation("mask at the top left", "shift = S - T  # query", "shift = 0  # query", "more keys", _FORWARD),
    Mutation("accumulator not rescaled", "acc = acc * rescale[:, None]", "acc = acc * 1.0", "growing keys", _FORWARD),
    Mutation("row sum not rescaled", "row_sum = row_sum * rescale +", "row_sum = row_sum +", "growing keys", _FORWARD),
    Mutation(
        "running maximum forgotten",
        "tl.maximum(row_max, scaled(tl.max(s, 1), SCALE, WIDE))",
        "tl.zeros_like(row_max)",
        "huge scores",
        _FORWARD,
    ),
    Mutation("scale dropped before the mask", "scaled(s, SCALE, WIDE), -float", "s, -float", "65 queries", _FORWARD),
    Mutation(
        "scale dropped, full blocks",
        "exponential(scaled(s, SCALE, WIDE) - new_max[:, None], WIDE)",
        "exponential(s - new_max[:, None], WIDE)",
        "127 keys, all seen",
        _FORWARD,
    ),
    Mutation(
        "natural base",
        "tl.log2(row_sum) * LN_2 if WIDE",
        "tl.log2(row_sum) if WIDE",
        "own scale",
        _FORWARD,
    ),
    Mutation(
        "queries that see nothing",
        'tl.where(new_max == -float("inf"), 0.0, new_max)',
        "new_max",
        "more queries",
        _FORWARD,
    ),
    Mutation(
        "key tail not masked",
        "visible = (cols < S)[None, :]",
        "visible = (cols < S + 1)[None, :]",
        "127 keys, all seen",
        _FORWARD,
    ),
    Mutation(
        "strides of k swapped",
        "k_ptr, n, S, stride_ks, stride_kd",
        "k_ptr, n, S, stride_kd, stride_ks",
        "65 queries",
        _FORWARD,
    ),
    Mutation(
        "v read with k's strides",
        "v_ptr, n, S, stride_vs, stride_vd",
        "v_ptr, n, S, stride_ks, stride_vd",
        "odd strides",
        _FORWARD,
    ),
    Mutation(
        "diagonal block skipped",
        "end = tl.minimum(S, first_row + BLOCK_M + shift)",
        "end = tl.minimum(S, first_row + shift)",
        "65 queries",
        _FORWARD,
    ),
    Mutation(
        "key head of another group",
        "k_ptr += batch * stride_kb + head // GROUP",
        "k_ptr += batch * stride_kb + head % (H // GROUP)",
        "grouped queries",
        _FORWARD,
    ),
    Mutation("v without the batch", "v_ptr += batch * stride_vb +", "v_ptr +=", "grouped queries", _FORWARD),
    Mutation(
        "key head of another group, dq",
        "k_ptr += batch * stride_kb + head // GROUP",
        "k_ptr += batch * stride_kb + head % (H // GROUP)",
        "grouped queries",
        _BACKWARD,
    ),
    Mutation("out not scaled up", "KEEP_SCALE / row_sum", "1.0 / row_sum", "dropout", _FORWARD),
    Mutation(
        "another head's dropout",
        "h + head_offset, b + batch_offset, False",
        "h, b + batch_offset, False",
        "dropout",
        _FORWARD,
    ),
    Mutation(
        "dropout coordinates swapped",
        "seed, keys, queries, head, batch",
        "seed, queries, keys, head, batch",
        "dropout",
        _TILES,
    ),
    Mutation(
        "dropout heads and samples swapped",
        "seed, keys, queries, head, batch",
        "seed, keys, queries, batch, head",
        "dropout",
        _TILES,
    ),
    Mutation(
        "dp not dropped", "tl.where(keep, dp * KEEP_SCALE, 0.0)", "dp * KEEP_SCALE", "dropout", _BACKWARD, count=2
    ),
    Mutation("dv not scaled up", "dv * KEEP_SCALE", "dv", "dropout", _BACKWARD),
    Mutation("dropped p in ds", "ds = (p * (dp", "ds = (dropped * (dp", "dropout", _BACKWARD),
    Mutation("dq without the scale", "dq * SCALE, first", "dq, first", "own scale", _BACKWARD),
    Mutation("dk without the scale", "dk * SCALE, first_key", "dk, first_key", "own scale", _BACKWARD),
    Mutation("delta dropped, dq", "dp - delta[:, None]", "dp", "65 queries", _BACKWARD),
    Mutation("delta dropped, dk", "dp - delta[None, :]", "dp", "65 queries", _BACKWARD),
    Mutation("gradient of lse with the wrong sign", "delta -= tl.load(", "delta += tl.load(", "lse alone", _BACKWARD),
    Mutation("lse of the wrong base", "lse if WIDE else lse * LOG2_E", "lse * LOG2_E", "65 queries", _BACKWARD),
    Mutation(
        "delta in another order",
        "row_dots(dout, out) if WIDE else",
        "tl.sum(out * dout, 1) if WIDE else",
        "one key takes all",
        _BACKWARD,
    ),
    Mutation(
        "diagonal blocks skipped, dk and dv",
        "num_diagonal = tl.maximum(unmasked - first_block, 0)",
        "num_diagonal = 0",
        "65 queries",
        _BACKWARD,
    ),
    Mutation("query tail skipped, dk and dv", "(T % BLOCK_M != 0).to(tl.int32)", "0", "65 queries", _BACKWARD),
    Mutation(
        "a whole block too few, dk and dv",
        "unmasked, whole, num_diagonal",
        "unmasked + 1, whole, num_diagonal",
        "127 keys, all seen",
        _BACKWARD,
    ),
    Mutation(
        "key tail not masked, dq",
        "visible = (cols < S)[None, :]",
        "visible = (cols < S + 1)[None, :]",
        "low scores",
        _BACKWARD,
    ),
    Mutation(
        "one head of the group in dk", "range(GROUP * num_blocks)", "range(num_blocks)", "grouped queries", _BACKWARD
    ),
    Mutation("the group's first queries in dk", "q_ptr + skip * stride_qh", "q_ptr", "grouped queries", _BACKWARD),
    Mutation("the group's first lse in dk", "at = skip * T + rows", "at = rows", "grouped queries", _BACKWARD),
    Mutation("one dropout mask for the group", "head + member, batch", "head, batch", "one key head", _BACKWARD),
    Mutation(
        "load beyond the last row",
        "return tl.load(pointers, mask=mask, other=0.0)",
        "return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)",
        "65 queries",
        _TILES,
    ),
    Mutation(
        "store into the next head",
        "to(pointer.dtype.element_ty), mask=mask)",
        "to(pointer.dtype.element_ty), mask=(rows < limit - start)[:, None])",
        "63 queries",
        _TILES,
    ),
    Mutation(
        "offset of the block dropped",
        "pointers = pointer + tl.cast(start, tl.int64) * stride_row",
        "pointers = pointer",
        "65 queries",
        _TILES,
    ),
]
