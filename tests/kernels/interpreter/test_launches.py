"""Launches set triton.language back, and a launch after another kernel's sees its own device functions."""

import torch
import triton
import triton.language as tl


@triton.jit
def _row_sum(x):
    return tl.sum(x, 1)


@triton.jit
def _sums(X, OUT, ROWS: tl.constexpr, COLS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, COLS)
    tl.store(
        OUT + i, _row_sum(tl.load(X + i[:, None] * COLS + j[None, :])) + _row_sum(tl.zeros((ROWS, COLS), tl.float32))
    )


def test_a_launch_leaves_triton_as_it_was():
    before = dict(vars(tl.core)), dict(vars(tl)), dict(vars(tl.tensor)), dict(vars(tl.math))
    x, out = torch.randn(4, 8), torch.zeros(4)
    for _ in range(2):
        _sums[(1,)](x, out, 4, 8)
        torch.testing.assert_close(out, x.sum(1))
    assert before == (dict(vars(tl.core)), dict(vars(tl)), dict(vars(tl.tensor)), dict(vars(tl.math)))


@triton.jit
def _reciprocals(X, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(OUT + at, 1.0 / tl.load(X + at))


def test_floating_point_exceptions_are_silent(recwarn):
    out = torch.zeros(2)
    _reciprocals[(1,)](torch.tensor([0.0, 2.0]), out, 2)
    assert out.tolist() == [float("inf"), 0.5] and not recwarn.list
