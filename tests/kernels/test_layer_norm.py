"""layer_norm beyond parity: derivatives, sums over many rows, tracing, determinism, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heiretsu.kernels import fused, plain
from heiretsu.kernels.cpu import layer_norm as cpu_layer_norm
from tests.kernels import forms
from tests.kernels.parity import Case, check

if forms.HAS_TRITON:
    from heiretsu.kernels.gpu import layer_norm as triton_layer_norm

FORMS = [pytest.param("cpu", id="cpu-form"), pytest.param("triton", id="triton", marks=pytest.mark.triton)]
each_form = pytest.mark.parametrize("form", FORMS)


def function(form):
    """The form of layer_norm, and the device of its tensors."""
    if form == "cpu":
        return cpu_layer_norm.layer_norm, "cpu"
    return triton_layer_norm.layer_norm, forms.TRITON_DEVICE


def inputs(device, *shape, dtype=torch.float32):
    """x, weight, bias, residual."""
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, shape[-1:], shape[-1:], shape)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def with_residual(op):
    return lambda x, weight, bias, residual: op(x, weight, bias, residual=residual)


@each_form
def test_gradients_are_those_of_finite_differences(form):
    op, device = function(form)
    if device == "cuda":
        pytest.skip("float64 runs in the interpreter alone")
    x, weight, bias, residual = inputs(device, 5, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(op, (x, weight, bias))
    assert torch.autograd.gradcheck(with_residual(op), (x, weight, bias, residual))


@each_form
def test_a_second_derivative_is_an_error(form):
    op, device = function(form)
    x, weight, bias, _ = inputs(device, 2, 3)
    (dx,) = torch.autograd.grad(op(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


@each_form
def test_the_gradient_of_a_float32_parameter_is_not_summed_in_bfloat16(form):
    """ATen's backward for bfloat16 rows and float32 parameters is off by 2 here."""
    op, device = function(form)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 4, generator=generator).bfloat16().to(device)
    weight = torch.ones(4, device=device, requires_grad=True)
    bias = torch.zeros(4, device=device, requires_grad=True)
    got = torch.autograd.grad(op(x, weight, bias).sum(), (weight, bias))
    wide = [t.detach().double().cpu().requires_grad_() for t in (weight, bias)]
    expected = torch.autograd.grad(plain.layer_norm(x.double().cpu(), *wide).sum(), wide)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-3)


@each_form
def test_compiles_without_a_graph_break(form):
    op, device = function(form)
    values = inputs(device, 20, 40)

    def block(x, weight, bias, residual):
        y, total = op(x * 2, weight, bias, residual=residual)
        return op(y + total, weight, bias)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(*values).square().sum(), values) for f in (compiled, block))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@each_form
def test_the_same_bits_twice(form):
    op, device = function(form)
    x, weight, bias, _ = inputs(device, 100, 33)
    first, second = (torch.autograd.grad(op(x, weight, bias).square().sum(), (x, weight, bias)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=15, deadline=None, database=None)
@given(
    N=st.integers(0, 20),
    C=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    add=st.booleans(),
)
def test_any_shape_agrees_with_plain(N, C, dtype, add):
    def draw(generator, dtype):
        x, residual = torch.randn(2, N, C, generator=generator).to(dtype).unbind()
        parameters = torch.randn(2, C, generator=generator).to(dtype).unbind()
        weight, bias, x, residual = (t.clone().requires_grad_() for t in (*parameters, x, residual))
        return {"x": x, "weight": weight, "bias": bias} | ({"residual": residual} if add else {})

    check(Case("layer_norm", f"{N} x {C}", "any shape", draw), dtype, fused.layer_norm)
