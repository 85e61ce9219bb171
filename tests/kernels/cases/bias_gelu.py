"""Parity cases and planted bugs of bias_gelu.

In the interpreter a tile is 8 rows by 32 columns, and a backward program takes two of them, one after the other.
"""

import torch

from tests.kernels.parity import Case, Mutation


def _inputs(*shape, bias_dtype=None, grad=("x", "bias")):
    """bias_dtype: that of x by default."""

    def inputs(generator, dtype):
        x = (torch.randn(shape, generator=generator) * 2.0).to(dtype)
        bias = torch.randn(shape[-1], generator=generator).to(bias_dtype or dtype)
        return {"x": x.requires_grad_("x" in grad), "bias": bias.requires_grad_("bias" in grad)}

    return inputs


def _view(generator, dtype):
    x = torch.randn(3, 2, 90, generator=generator).to(dtype)[:, 1, 5:38]  # rows 180 apart, from element 95 on
    bias = torch.randn(66, generator=generator).to(dtype)[::2]
    return {"x": x.requires_grad_(), "bias": bias.requires_grad_()}


def _transposed(generator, dtype):
    x = torch.randn(40, 3, 9, generator=generator).to(dtype).permute(2, 1, 0)  # columns are not contiguous
    return {"x": x.requires_grad_(), "bias": torch.randn(40, generator=generator).to(dtype).requires_grad_()}


def _saturated(generator, dtype):
    # Nothing in between: around -8, float64 plain itself is 0 where GELU is -1e-15.
    near, sign = torch.randn(2, 40, 50, generator=generator).unbind()
    x = torch.where(torch.rand(40, 50, generator=generator) < 0.5, near, 40.0 * sign.sign()).to(dtype)
    return {"x": x.requires_grad_(), "bias": torch.randn(50, generator=generator).to(dtype).requires_grad_()}


def _far_away(generator, dtype):
    """Numbers whose third power overflows, too, beside others of the usual size."""
    x = torch.randn(24, 40, generator=generator)
    largest = min(1e18, torch.finfo(dtype).max / 4)
    for row, size in enumerate((30.0, 1e3, largest**0.5, largest**0.7, largest)):
        x[row, ::2] = size * x[row, ::2].sign()
    return {"x": x.to(dtype).requires_grad_(), "bias": torch.zeros(40, dtype=dtype).requires_grad_()}


def _expanded(generator, dtype):
    x = torch.randn(1, 33, generator=generator).to(dtype).expand(11, 33)
    return {"x": x, "bias": torch.randn(33, generator=generator).to(dtype).requires_grad_()}


CASES = [
    Case("bias_gelu", "one element", "the smallest tile is nearly all tail", _inputs(1, 1)),
    Case("bias_gelu", "whole tiles", "no tail anywhere: 16 rows, 32 columns", _inputs(16, 32), emulate=True),
    Case("bias_gelu", "tails", "35 rows and 65 columns end one behind tiles and blocks", _inputs(5, 7, 65)),
    Case("bias_gelu", "short tails", "15 rows and 63 columns end one before", _inputs(15, 63), emulate=True),
    Case("bias_gelu", "float32 bias", "the parameter of mixed precision", _inputs(37, 48, bias_dtype=torch.float32)),
    Case("bias_gelu", "saturated", "sigmoid is 0 or 1, and exp2 overflows, for half of the elements", _saturated),
    Case("bias_gelu", "far away", "up to 1e18, where the derivative is 0 or 1 and the cube overflows", _far_away),
    Case("bias_gelu", "rows apart", "a slice of a larger tensor, and a strided bias", _view),
    Case("bias_gelu", "transposed", "columns that are not contiguous", _transposed),
    Case("bias_gelu", "expanded", "all rows are one row in memory", _expanded),
    Case("bias_gelu", "only x", "bias is frozen", _inputs(9, 33, grad=("x",))),
    Case("bias_gelu", "only bias", "x comes from a frozen layer", _inputs(9, 33, grad=("bias",))),
    Case("bias_gelu", "no grad", "inference", _inputs(9, 33, grad=())),
    Case("bias_gelu", "no rows", "an empty batch", _inputs(0, 33)),
]

_STORED = "total += dx  # rows beyond N have dout 0"

MUTATIONS = [
    Mutation(
        "bias not added",
        "gelu(load_tile(x_ptr, rows, stride_x, cols, N, F) + bias[None, :])",
        "gelu(load_tile(x_ptr, rows, stride_x, cols, N, F))",
        "whole tiles",
        "bias_gelu.py",
    ),
    Mutation(
        "exp2 without log2 e",
        "u * (-_LOG2_E * _LINEAR - _LOG2_E * _CUBIC * u * u)",
        "u * (-_LINEAR - _CUBIC * u * u)",
        "whole tiles",
        "gelu.py",
    ),
    Mutation("derivative of the cubic term", "3.0 * _CUBIC * square", "_CUBIC * square", "whole tiles", "gelu.py"),
    Mutation("derivative overflows below", "tl.maximum(u, -_EDGE", "tl.maximum(u, -1e38", "saturated", "gelu.py"),
    Mutation("derivative overflows above", "tl.minimum(low, _EDGE", "tl.minimum(low, 1e38", "far away", "gelu.py"),
    Mutation("dbias of the last tile alone", _STORED, "total = dx", "tails", "bias_gelu.py"),
    Mutation(
        "dbias race: all blocks write one row",
        "partial_ptr + row_block * F + cols",
        "partial_ptr + cols",
        "tails",
        "bias_gelu.py",
    ),
    Mutation(
        "second tile of a block skipped",
        "for start in range(0, ROWS, BLOCK_N)",
        "for start in range(0, BLOCK_N, BLOCK_N)",
        "tails",
        "bias_gelu.py",
    ),
    Mutation(
        "rows of the backward overlap",
        "row_block * ROWS + start",
        "row_block * BLOCK_N + start",
        "tails",
        "bias_gelu.py",
    ),
    Mutation(
        "stride of dout taken for x's",
        "load_tile(x_ptr, rows, stride_x, cols, N, F)\n        dout",
        "load_tile(x_ptr, rows, stride_dout, cols, N, F)\n        dout",
        "rows apart",
        "bias_gelu.py",
    ),
    Mutation(
        "tail of the store not masked",
        "(rows < N)[:, None] & (cols < C)[None, :]\n    tl.store",
        "(rows < N)[:, None] & (cols <= C)[None, :]\n    tl.store",
        "tails",
        "row_tiles.py",
        op="bias_gelu",
    ),
    Mutation(
        "rows of the load not masked",
        "mask = (rows < N)[:, None] & (cols < C)[None, :]\n    return",
        "mask = (rows <= N)[:, None] & (cols < C)[None, :]\n    return",
        "tails",
        "row_tiles.py",
        op="bias_gelu",
    ),
]
