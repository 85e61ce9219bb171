"""Bugs planted into small Triton kernels: the emulator must find each, and be silent about the mended twin.

Triton's interpreter runs all of these without a word: it has no warps, takes hints as true, and runs programs in order.
"""

import pytest
import torch
import triton
import triton.language as tl

from heiretsu.offgpu.emulator import run

TARGETS = pytest.mark.parametrize("target", [80, 90])
SCHEDULES = pytest.mark.parametrize("schedule", ["lockstep", "random"])


@triton.jit
def reverse_through_scratch(X, Scratch, Y, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(Scratch + offsets, tl.load(X + offsets) * 2)
    if BARRIER:
        tl.debug_barrier()
    tl.store(Y + offsets, tl.load(Scratch + (BLOCK - 1 - offsets)))


@TARGETS
@SCHEDULES
def test_planted_missing_barrier(target, schedule):
    x, y = torch.randn(512), torch.zeros(512)

    def reports(barrier):
        arguments = dict(BLOCK=512, BARRIER=barrier)
        return run(reverse_through_scratch, (1,), [x, torch.zeros(512), y], arguments, target=target, schedule=schedule)

    assert not reports(True) and torch.equal(y, 2 * x.flip(0))
    assert reports(False).kinds() == ["race-global"]


@triton.jit
def add_one(X, Y, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(Y + offsets, tl.load(X + offsets, offsets < n) + 1, offsets < n)
    else:
        tl.store(Y + offsets, tl.load(X + offsets, offsets < n) + 1)


@TARGETS
@SCHEDULES
def test_planted_unmasked_tail(target, schedule):
    x, y = torch.randn(200), torch.zeros(200)

    def reports(masked):
        return run(add_one, (2,), [x, y, 200], dict(BLOCK=128, MASKED=masked), target=target, schedule=schedule)

    assert not reports(True) and torch.equal(y, x + 1)
    found = reports(False)
    assert found.kinds() == ["oob"]
    line = add_one.fn.__code__.co_firstlineno + 6
    assert found[0].where.endswith(f"test_planted.py:{line}") and "byte 800 of tensor #1" in found[0].text


@triton.jit
def copy_shifted(X, Y, shift, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    claimed = tl.max_contiguous(tl.multiple_of(shift + offsets, 4), 4)
    tl.store(Y + offsets, tl.load(X + claimed))


@TARGETS
@SCHEDULES
def test_planted_wrong_multiple_of(target, schedule):
    x, y = torch.randn(600), torch.zeros(512)

    def reports(shift):
        return run(copy_shifted, (1,), [x, y, shift], dict(BLOCK=512), target=target, schedule=schedule)

    assert not reports(4) and torch.equal(y, x[4:516])
    assert reports(3).kinds() == ["misaligned"]


@triton.jit
def add_up(X, Sum, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    total = tl.sum(tl.load(X + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0)
    if ATOMIC:
        tl.atomic_add(Sum, total)
    else:
        tl.store(Sum, tl.load(Sum) + total)


@TARGETS
@SCHEDULES
def test_planted_lost_update(target, schedule):
    x = torch.randint(-9, 9, (8, 64)).float()

    def reports(atomic):
        total = torch.zeros(1)
        report = run(add_up, (8,), [x, total], dict(BLOCK=64, ATOMIC=atomic), target=target, schedule=schedule)
        assert not atomic or total == x.sum()
        return report

    assert not reports(True)
    assert reports(False).kinds() == ["race-global"]


@triton.jit
def partial_sums(X, Partial, Sum, n, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, SPLIT: tl.constexpr):
    program = tl.program_id(0)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(Partial + (program if SPLIT else program // 2), tl.sum(tl.load(X + offsets, offsets < n, 0.0), 0))


@TARGETS
def test_planted_two_programs_with_one_partial_sum(target):
    x, partial = torch.randn(500), torch.zeros(4)

    def reports(split):
        arguments = dict(BLOCK=128, PROGRAMS=4, SPLIT=split)
        return run(partial_sums, (4,), [x, partial, torch.zeros(1), 500], arguments, target=target)

    assert not reports(True)
    torch.testing.assert_close(partial.sum(), x.sum())
    assert reports(False).kinds() == ["race-global"]


@triton.jit
def powers(A, W, n, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """A[i + 1] = A[i] W: each step reads what the last one wrote, so its loads must not run ahead."""
    rows = tl.arange(0, BLOCK)
    square = rows[:, None] * BLOCK + rows[None, :]
    w = tl.load(W + square)
    for i in tl.range(0, n, num_stages=STAGES):
        a = tl.load(A + i * BLOCK * BLOCK + square)
        tl.store(A + (i + 1) * BLOCK * BLOCK + square, tl.dot(a, w).to(tl.float16))
        if STAGES == 1:
            tl.debug_barrier()


@TARGETS
def test_planted_pipeline_that_reads_ahead_of_a_store(target):
    """The loads of a pipelined loop are issued early, as asked: a wrong result, which only a reference shows."""
    a, w = (torch.randn(5, 32, 32) * 0.3).half(), (torch.randn(32, 32) * 0.2).half()
    expected = [a[0]]
    for _ in range(4):
        expected.append((expected[-1].float() @ w.float()).half())

    def error(stages):
        ours = a.clone()
        run(powers, (1,), [ours, w, 4], dict(BLOCK=32, STAGES=stages), target=target)
        return (ours.float() - torch.stack(expected).float()).abs().max()

    assert error(1) < 1e-3 < 0.1 < error(3)
