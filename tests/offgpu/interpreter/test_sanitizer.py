"""The sanitizer finds planted defects, in every order of programs, and passes kernels that are right."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from heiretsu.offgpu.interpreter.sanitizer import ORDERS, OutOfBounds, Race, UnwrittenRead, sanitize

N, BLOCK = 100, 32


@triton.jit
def _kernel(X, Y, n, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(X + at, mask=inside, other=0.0)
    if WHAT == "right":
        tl.store(Y + at, x * 2, mask=inside)
    elif WHAT == "right, with atomics":
        tl.atomic_add(Y, tl.sum(x))
    elif WHAT == "right, reading what others read":
        tl.store(Y + at, x + tl.load(X), mask=inside)
    elif WHAT == "load past the end":
        tl.store(Y + at, tl.load(X + at + 1), mask=inside)
    elif WHAT == "load before the start":
        tl.store(Y + at, tl.load(X + at - 1, mask=inside), mask=inside)
    elif WHAT == "store without mask":
        tl.store(Y + at, x)
    elif WHAT == "store with a mask too wide":
        tl.store(Y + at, x, mask=at < n + 4)
    elif WHAT == "atomic past the end":
        tl.atomic_add(Y + at, x)
    elif WHAT == "read of unwritten memory":
        tl.store(Y + at, tl.load(Y + at, mask=inside) + x, mask=inside)
    elif WHAT == "sum into unwritten memory":
        tl.atomic_add(Y + at, x, mask=inside)
    elif WHAT == "lost update":
        tl.store(Y, tl.load(Y) + tl.sum(x))
    elif WHAT == "last one wins":
        tl.store(Y + tl.arange(0, BLOCK), x)
    elif WHAT == "carry from the program before":
        carry = tl.load(Y + program * BLOCK - 1, mask=program > 0, other=0.0)
        tl.store(Y + at, x + carry, mask=inside)
    elif WHAT == "store beside an atomic":
        tl.atomic_add(Y, tl.sum(x))
        tl.store(Y, 0.0, mask=program == 1)
    elif WHAT == "two lanes, one element":
        tl.store(Y + at // 2, x, mask=inside)


DEFECTS = {
    "load past the end": OutOfBounds,
    "load before the start": OutOfBounds,
    "store without mask": OutOfBounds,
    "store with a mask too wide": OutOfBounds,
    "atomic past the end": OutOfBounds,
    "read of unwritten memory": UnwrittenRead,
    "sum into unwritten memory": UnwrittenRead,
    "lost update": Race,
    "last one wins": Race,
    "carry from the program before": Race,
    "store beside an atomic": Race,
    "two lanes, one element": Race,
}


def _launch(what, order, x=None, y=None, n=N):
    x = torch.randn(n) if x is None else x
    y = torch.zeros(n) if y is None else y
    with sanitize(order, seed=1):
        _kernel[(triton.cdiv(n, BLOCK),)](x, y, n, what, BLOCK)
    return x, y


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", DEFECTS)
def test_a_planted_defect_is_found(what, order):
    y = torch.empty(N) if "unwritten" in what else torch.zeros(N)  # the fixture of these tests poisons the empty one
    with pytest.raises(InterpreterError) as raised:
        _launch(what, order, y=y)
    assert type(raised.value.__cause__) is DEFECTS[what]
    assert "test_sanitizer.py:" in str(raised.value) and "program (" in str(raised.value)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", ["right", "right, with atomics", "right, reading what others read"])
def test_a_kernel_that_is_right_passes(what, order):
    _launch(what, order)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_runs_every_program_once(order):
    x, y = _launch("right", order)
    assert torch.equal(y, 2 * x)


def test_the_error_names_argument_and_element():
    with pytest.raises(InterpreterError, match=r"28 of 32 lanes outside every argument; the first at element 100 of Y"):
        _launch("store without mask", "forward")


def test_the_gap_of_a_strided_view_is_outside():
    rows = torch.zeros(4, 32)[:, :30]  # one block a row, 2 elements between rows

    @triton.jit
    def rowwise(X, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(X + tl.program_id(0) * 32 + at, 1.0, mask=at < n)

    with sanitize():
        rowwise[(4,)](rows, 30, 32)
        with pytest.raises(InterpreterError, match="outside every argument"):
            rowwise[(4,)](rows, 31, 32)


def test_views_of_one_storage_count_together():
    whole = torch.zeros(2, N)
    _launch("right", "random", whole[0], whole[1])
    with pytest.raises(InterpreterError, match="what another program"):
        _launch("last one wins", "random", whole[0], whole[0])


def test_memory_written_by_an_earlier_launch_or_by_pytorch_may_be_read():
    x, y = torch.randn(N), torch.empty(N)
    _launch("right", "forward", x, y)
    _launch("read of unwritten memory", "forward", x, y)
    torch.testing.assert_close(y, 3 * x)
    filled = torch.empty(N).copy_(x)
    _launch("read of unwritten memory", "forward", x, filled)
    torch.testing.assert_close(filled, 2 * x)


def test_float_atomics_give_results_that_depend_on_the_order():
    x = torch.tensor([1e8, 1.0, -1e8, 1.0]).repeat_interleave(BLOCK)
    totals = {order: _launch("right, with atomics", order, x, torch.zeros(1), len(x))[1].item() for order in ORDERS[:2]}
    assert totals["forward"] != totals["reverse"]


def test_nothing_is_watched_afterwards():
    with pytest.raises(InterpreterError):
        _launch("lost update", "forward")
    y = torch.zeros(N)
    _kernel[(4,)](torch.ones(N), y, N, "lost update", BLOCK)
    assert y[0] == N
