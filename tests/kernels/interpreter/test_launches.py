"""Launches set triton.language back, and a launch after another kernel's sees its own device functions."""

import torch
import triton
import triton.language as tl

from heiretsu.kernels.gpu import launch  # noqa: F401  # mends the interpreter, as for whoever imports a kernel


@triton.jit
def _row_sum(x):
    return tl.sum(x, 1)


@triton.jit
def _sums(X, OUT, ROWS: tl.constexpr, COLS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, COLS)
    tl.store(
        OUT + i, _row_sum(tl.load(X + i[:, None] * COLS + j[None, :])) + _row_sum(tl.zeros((ROWS, COLS), tl.float32))
    )


def names_of_the_language() -> dict:
    """What each name of triton.language stands for. Triton sets back what tensor inherits as an attribute of its own,
    which is the same to all who look it up."""
    places = {"core": tl.core, "language": tl, "tensor": tl.tensor, "math": tl.math}
    bookkeeping = ("__annotations__", "__dict__")
    return {
        (place, name): getattr(owner, name)
        for place, owner in places.items()
        for name in dir(owner)
        if name not in bookkeeping
    }


def test_a_launch_leaves_triton_as_it_was():
    before = names_of_the_language()
    x, out = torch.randn(4, 8), torch.zeros(4)
    for _ in range(2):
        _sums[(1,)](x, out, 4, 8)
        torch.testing.assert_close(out, x.sum(1))
    assert names_of_the_language() == before


@triton.jit
def _reciprocals(X, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(OUT + at, 1.0 / tl.load(X + at))


def test_floating_point_exceptions_are_silent(recwarn):
    out = torch.zeros(2)
    _reciprocals[(1,)](torch.tensor([0.0, 2.0]), out, 2)
    assert out.tolist() == [float("inf"), 0.5] and not recwarn.list
