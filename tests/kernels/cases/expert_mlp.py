"""Parity cases and planted bugs of expert_mlp.

In the interpreter a tile of the grouped GEMM is 32 rows by 64 columns, depth 16, and one of the weight gradient 16 by
32 columns, 32 rows at a time: the sizes below end inside, at and behind those. Cases about routing have experts or
tokens whose results are exactly zero. Those crowd the peers of the small elements in the parity rule, so that a 16-bit
rounding error has nothing to compare with: such cases run in float32 alone.
"""

import torch

from tests.kernels.parity import Case, Mutation


def _mlp(N, C, F, E, K, experts=None, biases=True, weights=None, gates=True, grad=None):
    """Inputs of expert_mlp. experts: (N, K, E, generator) -> indices, by default random distinct ones. weights: dtype
    of the parameters, by default the activations'. grad: names that require a gradient, by default all."""

    def inputs(generator, dtype):
        index = (experts or _distinct)(N, K, E, generator)
        parameters = weights or dtype
        values = {
            "x": torch.randn(N, C, generator=generator).to(dtype),
            "experts": index,
            "gates": torch.rand(N, K, generator=generator).to(dtype) if gates else torch.ones(N, K, dtype=dtype),
            "w1": (torch.randn(E, C, F, generator=generator) * C**-0.5).to(parameters),
            "b1": torch.randn(E, F, generator=generator).to(parameters) if biases else None,
            "w2": (torch.randn(E, F, C, generator=generator) * F**-0.5).to(parameters),
            "b2": torch.randn(E, C, generator=generator).to(parameters) if biases else None,
        }
        wanted = grad or ("x", "gates", "w1", "b1", "w2", "b2")
        for name, value in values.items():
            if value is not None:
                values[name] = value.detach().requires_grad_(name in wanted)
        return values

    return inputs


def _distinct(N, K, E, generator):
    return torch.rand(N, E, generator=generator).argsort(1)[:, :K]


def _never_first_or_last(N, K, E, generator):
    return 1 + torch.rand(N, E - 2, generator=generator).argsort(1)[:, :K]


def _only(expert):
    return lambda N, K, E, generator: torch.full((N, K), expert)


def _skewed(N, K, E, generator):
    """Nearly all rows to expert 2, one row each to some others."""
    index = torch.full((N, K), 2)
    index[1, 0], index[-1, -1] = 0, E - 1
    return index


def _with_strangers(N, K, E, generator):
    """Indices outside 0..E-1, as for slots that another rank serves."""
    return torch.randint(-1, E + 2, (N, K), generator=generator)


def _in_turn(N, K, E, generator):
    return torch.arange(N * K).view(N, K) % E


def _exact_tiles(N, K, E, generator):
    """Expert e gets 32 rows exactly, so that tiles end where experts do."""
    return torch.arange(N * K).view(N, K) // 32 % E


def _views(generator, dtype):
    """x in the columns of a wider tensor, weights transposed in memory, gates and indices strided."""
    values = _mlp(37, 24, 40, 4, 2)(generator, dtype)
    values["x"] = torch.randn(37, 60, generator=generator).to(dtype)[:, 5:53:2].requires_grad_()
    values["w1"] = (torch.randn(4, 40, 24, generator=generator) * 0.2).to(dtype).transpose(1, 2).requires_grad_()
    values["gates"] = torch.rand(2, 37, generator=generator).to(dtype).T.requires_grad_()
    values["experts"] = torch.randint(0, 4, (2, 37), generator=generator).T
    return values


def _int32(generator, dtype):
    values = _mlp(20, 16, 24, 3, 2)(generator, dtype)
    return values | {"experts": values["experts"].int()}


def _expanded(generator, dtype):
    values = _mlp(20, 16, 32, 3, 1)(generator, dtype)
    values["x"] = torch.randn(1, 16, generator=generator).to(dtype).expand(20, 16).requires_grad_()
    return values


FLOAT32 = (torch.float32,)
TWO = (torch.float32, torch.bfloat16)
PARAMETERS = ("w1", "b1", "w2", "b2")

CASES = [
    Case("expert_mlp", "two of four", "tails everywhere: rows, C and F off the blocks", _mlp(70, 40, 72, 4, 2)),
    Case(
        "expert_mlp",
        "float32 masters",
        "16-bit activations beside float32 weights, whose gradients come back float32",
        _mlp(40, 32, 48, 3, 2, weights=torch.float32),
        (torch.bfloat16, torch.float16),
    ),
    Case(
        "expert_mlp",
        "even blocks",
        "C, F and the rows of experts are whole blocks",
        _mlp(64, 32, 64, 4, 2, _exact_tiles),
    ),
    Case("expert_mlp", "no biases", "b1 and b2 None", _mlp(37, 16, 33, 3, 2, biases=False), TWO),
    Case(
        "expert_mlp",
        "after the exchange",
        "K = 1 and gates of 1 that want no gradient, as local experts see them",
        _mlp(50, 24, 32, 2, 1, gates=False, grad=("x", *PARAMETERS)),
        TWO,
    ),
    Case("expert_mlp", "one expert", "E = 1: a plain MLP", _mlp(33, 17, 19, 1, 1), TWO),
    Case("expert_mlp", "three choices", "K = E and no power of two", _mlp(19, 16, 24, 3, 3), FLOAT32),
    Case("expert_mlp", "wide", "C of two blocks in every kernel", _mlp(5, 40, 8, 2, 2), FLOAT32),
    Case("expert_mlp", "one token", "N = 1", _mlp(1, 16, 24, 4, 2), FLOAT32),
    Case("expert_mlp", "no tokens", "N = 0: zero gradients of the right shapes", _mlp(0, 16, 24, 4, 2), FLOAT32),
    Case(
        "expert_mlp", "empty experts", "first and last get none", _mlp(21, 16, 24, 5, 2, _never_first_or_last), FLOAT32
    ),
    Case("expert_mlp", "one hot", "all to one expert: three row tiles", _mlp(80, 16, 24, 4, 1, _only(2)), FLOAT32),
    Case("expert_mlp", "skewed", "one row here, all there", _mlp(35, 16, 24, 5, 2, _skewed), FLOAT32),
    Case(
        "expert_mlp",
        "strangers",
        "indices outside 0..E-1 add nothing",
        _mlp(40, 16, 24, 3, 2, _with_strangers),
        FLOAT32,
    ),
    Case("expert_mlp", "nobody", "every index outside: all zeros", _mlp(6, 16, 24, 3, 2, _only(-1)), FLOAT32),
    Case("expert_mlp", "views", "x, w1, gates and indices are strided", _views, FLOAT32),
    Case("expert_mlp", "expanded", "one row stands for all tokens", _expanded, FLOAT32),
    Case("expert_mlp", "int32 indices", "indices in 32 bits", _int32, FLOAT32),
    Case("expert_mlp", "4 of 32", "more experts than most get tokens for", _mlp(9, 16, 8, 32, 4), FLOAT32),
    Case("expert_mlp", "only x", "frozen experts", _mlp(20, 16, 24, 3, 2, grad=("x",)), FLOAT32),
    Case("expert_mlp", "only w1", "no gradient for x", _mlp(20, 16, 24, 3, 2, grad=("w1",)), FLOAT32),
    Case("expert_mlp", "narrow", "sizes below every block", _mlp(3, 1, 2, 2, 1), FLOAT32),
    Case(
        "expert_mlp",
        "whole steps",
        "emulated: the shipped bf16 tile, unmasked loops of three steps in depth and two in rows",
        _mlp(140, 64, 192, 2, 1, _in_turn),
        (torch.bfloat16,),
        emulate=True,
    ),
    Case("expert_mlp", "tiny", "emulated: the tile for odd sizes", _mlp(9, 16, 24, 3, 2), TWO, emulate=True),
    Case(
        "expert_mlp", "tiny skewed", "an empty expert, emulated", _mlp(7, 8, 16, 4, 1, _skewed), FLOAT32, emulate=True
    ),
]

MUTATIONS = [
    # the plan
    Mutation(
        "rank counts the slot itself",
        "rank = tl.cumsum(one_hot, 0) - 1",
        "rank = tl.cumsum(one_hot, 0)",
        caught_by="three choices",
        file="routing_plan.py",
    ),
    Mutation(
        "offsets taken from the last block",
        "if block == 0:",
        "if block == num_blocks - 1:",
        caught_by="one hot",
        file="routing_plan.py",
    ),
    Mutation(
        "a stranger gets a row",
        "tl.where(lost, -1, rows)",
        "rows",
        caught_by="strangers",
        file="routing_plan.py",
    ),
    # grouped GEMM
    Mutation(
        "last tile of an expert skipped",
        "tiles = (end - begin + BLOCK_M - 1) // BLOCK_M",
        "tiles = (end - begin) // BLOCK_M",
        caught_by="skewed",
        file="grouped_gemm.py",
    ),
    Mutation(
        "wrong expert offset",
        "tl.sum(tl.where(e == expert, begin, 0), 0)",
        "tl.sum(tl.where(e == expert, end, 0), 0)",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "bias of the first expert for all",
        "    bias_ptr += expert.to(tl.int64) * num_cols\n",
        "",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "gather index not masked",
        "a_rows = tl.where(row_mask, rows, first_row)",
        "a_rows = rows",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "slot taken for a token",
        "a_rows = tl.load(order_ptr + a_rows) // TOP_K",
        "a_rows = tl.load(order_ptr + a_rows)",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "K-loop tail of the weights not masked",
        "w = tl.load(w_ptrs, mask=(k + ks < depth)[:, None], other=0.0)",
        "w = tl.load(w_ptrs)",
        caught_by="one expert",
        file="grouped_gemm.py",
    ),
    Mutation(
        "K-loop tail not masked at all",
        "if EVEN_K:",
        "if True:",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "weights advance along the wrong dim",
        "w_ptrs += tl.cast(stride_wk, tl.int64) * BLOCK_K",
        "w_ptrs += tl.cast(stride_wn, tl.int64) * BLOCK_K",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "rows of the next expert overwritten",
        "mask = row_mask[:, None] & (cols < num_cols)[None, :]",
        "mask = (rows >= 0)[:, None] & (cols < num_cols)[None, :]",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "tail columns stored",
        "mask = row_mask[:, None] & (cols < num_cols)[None, :]",
        "mask = row_mask[:, None] & (cols >= 0)[None, :]",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "parts of a tile land on the first",
        "col + part * (BLOCK_N // 4)",
        "col",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "gate dropped in the hidden gradient",
        "dh = gate[:, None] * acc * slope",
        "dh = tl.where(row_mask[:, None], acc * slope, 0.0)",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "gate dropped in dw2",
        "(gate[:, None] * activation)",
        "activation",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "hidden gradient without the slope of GELU",
        "gate[:, None] * acc * slope",
        "gate[:, None] * acc",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "db1 parts of an expert on one row",
        "dbias_ptr += tile.to(tl.int64) * num_cols",
        "dbias_ptr += expert.to(tl.int64) * num_cols",
        caught_by="one hot",
        file="grouped_gemm.py",
    ),
    Mutation(
        "weight gradient takes a row of the next expert",
        "mask = rows < end\n        tokens",
        "mask = rows < end + 1\n        tokens",
        caught_by="three choices",
        file="grouped_gemm.py",
    ),
    Mutation(
        "weight gradient repeats its first block",
        "        rows += BLOCK_R\n",
        "",
        caught_by="one hot",
        file="grouped_gemm.py",
    ),
    # combine
    Mutation("gate dropped", "if GATED:", "if False:", caught_by="three choices"),
    Mutation(
        "only the first choice counts",
        "for k in tl.static_range(TOP_K):",
        "for k in tl.static_range(1):",
        caught_by="three choices",
    ),
    Mutation(
        "dgates of the last columns only",
        "dgates += tl.sum(dout * y, 1)",
        "dgates = tl.sum(dout * y, 1)",
        caught_by="wide",
    ),
    Mutation(
        "dgates in the order of rows",
        "tl.store(dgates_ptr + slots",
        "tl.store(dgates_ptr + rows",
        caught_by="three choices",
    ),
    Mutation(
        "db2 without the gate",
        "tl.sum(gates[:, None] * dout, 0)",
        "tl.sum(dout, 0)",
        caught_by="three choices",
    ),
    Mutation(
        "db over the wrong segment",
        "first = tl.sum(tl.where(e < expert, tiles, 0), 0)",
        "first = tl.sum(tl.where(e <= expert, tiles, 0), 0)",
        caught_by="three choices",
    ),
    Mutation(
        "db from the first tiles only",
        "for tile in range(first, last, BLOCK_T):",
        "for tile in range(first, first + 1, BLOCK_T):",
        caught_by="one hot",
    ),
]
