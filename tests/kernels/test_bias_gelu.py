"""bias_gelu beyond parity: derivatives, tracing, determinism, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heiretsu.kernels import fused, plain
from heiretsu.kernels.cpu import bias_gelu as cpu_bias_gelu
from tests.kernels import forms
from tests.kernels.cases.bias_gelu import CASES
from tests.kernels.parity import Case, check

if forms.HAS_TRITON:
    from heiretsu.kernels.gpu import bias_gelu as triton_bias_gelu
    from heiretsu.kernels.gpu import launch

FORMS = [pytest.param("cpu", id="cpu-form"), pytest.param("triton", id="triton", marks=pytest.mark.triton)]
each_form = pytest.mark.parametrize("form", FORMS)


def function(form):
    """The form of bias_gelu, and the device of its tensors."""
    if form == "cpu":
        return cpu_bias_gelu.bias_gelu, "cpu"
    return triton_bias_gelu.bias_gelu, forms.TRITON_DEVICE


def inputs(device, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(shape, generator=generator), torch.randn(shape[-1:], generator=generator)
    return [t.to(device, dtype).requires_grad_() for t in (x, bias)]


@each_form
def test_gradients_are_those_of_finite_differences(form):
    op, device = function(form)
    if device == "cuda":
        pytest.skip("float64 runs in the interpreter alone")
    assert torch.autograd.gradcheck(op, inputs(device, 9, 3))


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_far_away_the_derivative_is_0_or_1(form, dtype):
    op, device = function(form)
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 runs in the interpreter alone")
    far = torch.tensor([40.0, 1e3, 1e6, 1e12, 1e15, 1e18])
    x = torch.cat([-far, far]).to(device, dtype).requires_grad_()
    out = op(x, torch.zeros_like(x.detach()))
    (dx,) = torch.autograd.grad(out.sum(), x)
    below, above = dx.tolist()[:6], dx.tolist()[6:]
    assert all(abs(slope) < 1e-30 for slope in below) and above == [1.0] * 6
    assert (out[:6].abs() < 1e-30).all() and torch.equal(out[6:], x[6:])


@each_form
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(form, bad):
    op, device = function(form)
    x = torch.tensor([1.0, bad], device=device, requires_grad=True)
    out = op(x, torch.zeros(2, device=device))
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert out[0].isfinite() and dx[0].isfinite() and not out[1].isfinite()
    assert dx[1].isnan() if bad != bad else not dx[1] < 1.0  # plain has NaN at infinity, and 1 would be right


@each_form
def test_the_gradient_of_a_float32_bias_is_not_summed_in_bfloat16(form):
    op, device = function(form)
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    bias = torch.zeros(4, device=device, requires_grad=True)
    wide = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(op(x, bias).sum(), bias)
    (expected,) = torch.autograd.grad(plain.bias_gelu(x.double().cpu(), wide).sum(), wide)
    torch.testing.assert_close(got.double().cpu(), expected, rtol=2e-4, atol=0.0)


@each_form
def test_a_second_derivative_is_an_error(form):
    op, device = function(form)
    x, bias = inputs(device, 2, 3, dtype=torch.float32)
    (dx,) = torch.autograd.grad(op(x, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break_and_stays_exact(form, dtype):
    """The CPU form is another formula while it is traced, so that is held to the rule as well."""
    op, device = function(form)
    (case,) = (case for case in CASES if case.name == "tails")
    check(case, dtype, torch.compile(op, fullgraph=True, backend="aot_eager"), device)


@each_form
def test_the_same_bits_twice(form):
    op, device = function(form)
    x, bias = inputs(device, 100, 70, dtype=torch.float32)
    first, second = (torch.autograd.grad(op(x, bias).square().sum(), (x, bias)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_cpu_form_saves_no_more_than_the_derivative():
    saved = []
    x, bias = inputs("cpu", 50, 64, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel() * t.itemsize), lambda t: t):
        cpu_bias_gelu.bias_gelu(x, bias)
    assert sum(saved) == x.numel() * 2


@settings(max_examples=15, deadline=None, database=None)
@given(N=st.integers(0, 40), F=st.integers(1, 80), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_shape_agrees_with_plain(N, F, dtype):
    def draw(generator, dtype):
        x, bias = torch.randn(N, F, generator=generator), torch.randn(F, generator=generator)
        return {"x": x.to(dtype).requires_grad_(), "bias": bias.to(dtype).requires_grad_()}

    check(Case("bias_gelu", f"{N} x {F}", "any shape", draw), dtype, fused.bias_gelu)


@pytest.mark.triton
@pytest.mark.parametrize("blocks", [dict(BLOCK_N=4, BLOCK_F=16), dict(ROWS=8), dict(ROWS=64)])
def test_any_blocks_give_the_same_gradients(blocks):
    x, bias = inputs(forms.TRITON_DEVICE, 37, 45, dtype=torch.float32)
    expected = torch.autograd.grad(triton_bias_gelu.bias_gelu(x, bias).sum(), (x, bias))
    with launch.override(**blocks):
        got = torch.autograd.grad(triton_bias_gelu.bias_gelu(x, bias).sum(), (x, bias))
    torch.testing.assert_close(got, expected)
