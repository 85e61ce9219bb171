"""dropout beyond parity: the mask itself, shards, tracing, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from heiretsu.kernels.cpu import dropout as cpu_dropout
from heiretsu.kernels.random import dropout_keep_mask
from tests.kernels import forms

if forms.HAS_TRITON:
    from heiretsu.kernels.gpu import dropout as triton_dropout

FORMS = [pytest.param("cpu", id="cpu-form"), pytest.param("triton", id="triton", marks=pytest.mark.triton)]
each_form = pytest.mark.parametrize("form", FORMS)


def function(form):
    """The form of dropout, its custom op, and the device of its tensors."""
    if form == "cpu":
        return cpu_dropout.dropout, cpu_dropout._dropout, "cpu"
    return triton_dropout.dropout, triton_dropout._dropout, forms.TRITON_DEVICE


@each_form
@settings(max_examples=25, deadline=None, database=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70)),
    p=st.floats(0.001, 0.999),
    seed=st.integers(-(2**63), 2**64 - 1),
    offset=st.integers(0, 2**33),
)
def test_the_mask_is_that_of_the_specification_bit_for_bit(form, shape, p, seed, offset):
    op, _, device = function(form)
    kept = op(torch.ones(shape, device=device), p, seed, offset) != 0
    assert torch.equal(kept.cpu(), dropout_keep_mask(shape, p, seed, offset))


@each_form
def test_a_shard_of_the_batch_draws_the_mask_of_the_whole(form):
    op, _, device = function(form)
    x = torch.ones(4, 9, 33, device=device)
    whole = op(x, 0.4, 11, 5)
    assert torch.equal(op(x[2:], 0.4, 11, 7), whole[2:])
    assert not torch.equal(op(x[2:], 0.4, 11, 6), whole[2:])


@each_form
def test_long_samples_in_several_blocks_keep_their_positions(form):
    """More elements of a sample than a block of the CPU form, or a tile, holds."""
    op, _, device = function(form)
    shape = (1, 1030, 130) if form == "cpu" else (1, 40, 130)
    kept = op(torch.ones(shape, device=device), 0.5, 3) != 0
    assert torch.equal(kept.cpu(), dropout_keep_mask(shape, 0.5, 3))


@each_form
def test_the_gradient_is_masked_and_scaled_alike(form):
    op, _, device = function(form)
    x = torch.full((2, 5, 37), 3.0, device=device, requires_grad=True)
    out = op(x, 0.25, 8)
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(dx, out.detach() / 3.0)


@each_form
def test_compiles_without_a_graph_break_and_once_for_all_seeds(form):
    op, _, device = function(form)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, seed: op(x * 2, 0.3, seed) + 1, fullgraph=True, backend=counter)
    x = torch.ones(2, 5, 37, device=device, requires_grad=True)
    for seed in (11, 12, 2**40, 2**62 + 1):
        out, expected = compiled(x, seed), op(x * 2, 0.3, seed) + 1
        assert torch.equal(out, expected)
        assert torch.equal(*(torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected)))
    assert counter.frame_count <= 2  # the first seed as a constant, the second as a variable
