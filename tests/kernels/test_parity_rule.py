"""The parity rule itself: what it must let pass, and what it must not."""

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.offgpu.scratch import poisoned_scratch
from tests.kernels.parity import Case, ParityError, check, compare


def _layer_norm_inputs(generator, dtype):
    x = torch.randn(6, 40, generator=generator).to(dtype)[:, :37].requires_grad_()
    weight, bias = (torch.randn(37, generator=generator).requires_grad_() for _ in range(2))
    residual = torch.randn(37, generator=generator).to(dtype).expand(6, 37)
    return {"x": x, "weight": weight, "bias": bias, "residual": residual.requires_grad_()}


CASE = Case("layer_norm", "rule", "a strided view, an expanded tensor, float32 parameters", _layer_norm_inputs)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _backward_with(edit):
    """layer_norm whose backward runs `edit` on the list [dx, dweight, dbias, dresidual]."""

    class Edited(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return plain.layer_norm(*inputs[:3], residual=inputs[3])

        @staticmethod
        def backward(ctx, *cotangents):
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            with torch.enable_grad():
                outputs = plain.layer_norm(*inputs[:3], residual=inputs[3])
            gradients = list(torch.autograd.grad(outputs, inputs, cotangents))
            edit(gradients, ctx.saved_tensors, cotangents)
            return tuple(gradients)

    return lambda x, weight, bias, residual: Edited.apply(x, weight, bias, residual)


def _forward_with(edit):
    return lambda **inputs: edit(*plain.layer_norm(**inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_passes_and_every_tensor_is_compared(dtype):
    results = check(CASE, dtype, plain.layer_norm)
    assert list(results) == ["y", "total", "dx", "dweight", "dbias", "dresidual"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_some_ulps_off_fails(dtype):
    def nudge(y, total):
        off = torch.zeros_like(y)
        off[3, 5] = 16 * torch.finfo(dtype).eps * y.abs().max().item()
        return y + off, total

    with pytest.raises(ParityError, match=r"layer_norm/rule in \w+ .*\n  y: \[3, 5\] is"):
        check(CASE, dtype, _forward_with(nudge))


@pytest.mark.parametrize("name, position", [("dx", 0), ("dweight", 1), ("dbias", 2), ("dresidual", 3)])
def test_one_wrong_gradient_element_fails_by_name(name, position):
    def nudge(gradients, _, __):
        gradients[position] = gradients[position] * 1.0
        gradients[position].view(-1)[-1] += 1e-4

    with pytest.raises(ParityError, match=rf"\n  {name}: \[.*36\] is .* 1 of \d+ elements"):
        check(CASE, torch.float32, _backward_with(nudge))


def test_swapped_outputs_fail():
    with pytest.raises(ParityError, match="total:"):
        check(CASE, torch.float32, _forward_with(lambda y, total: (total, y)))


def test_a_missing_output_fails():
    with pytest.raises(ParityError, match="returns"):
        check(CASE, torch.float32, lambda **inputs: plain.layer_norm(**inputs)[0])


def test_a_missing_gradient_fails():
    def drop(gradients, _, __):
        gradients[2] = None

    with pytest.raises(ParityError, match="dbias: is missing"):
        check(CASE, torch.float32, _backward_with(drop))


def test_a_detached_output_fails():
    with pytest.raises(ParityError, match="total: plain carries a gradient"):
        check(CASE, torch.float32, _forward_with(lambda y, total: (y, total.detach())))


def test_an_output_may_carry_a_gradient_of_zero_that_plain_does_not_have():
    def only_bias(generator, dtype):
        inputs = _layer_norm_inputs(generator, dtype)
        return {name: tensor.detach().requires_grad_(name == "bias") for name, tensor in inputs.items()}

    def surplus(factor):
        def forward(x, weight, bias, residual):
            y, total = plain.layer_norm(x, weight, bias, residual=residual)
            return y, total + factor * bias

        return forward

    case = Case("layer_norm", "only bias", "the sum does not depend on it", only_bias)
    assert list(check(case, torch.float32, surplus(0.0))) == ["y", "total", "dbias"]
    with pytest.raises(ParityError, match="total: "):
        check(case, torch.float32, surplus(1.0))


def test_another_dtype_fails():
    with pytest.raises(ParityError, match="y: is float32"):
        check(CASE, torch.bfloat16, _forward_with(lambda y, total: (y.float(), total)))


def test_a_nan_fails():
    def poison(y, total):
        return torch.where(torch.arange(37) == 3, float("nan"), y), total

    with pytest.raises(ParityError, match=r"y: \[0, 3\] is nan"):
        check(CASE, torch.float32, _forward_with(poison))


def test_infinities_must_agree_in_sign_and_place():
    inf = float("inf")
    want = torch.tensor([1.0, -inf, float("nan")])
    assert not compare(want, want, want.double()).message
    for got in ([1.0, inf, float("nan")], [1.0, -inf, 0.0], [1.0, -1e38, float("nan")], [-inf, -inf, float("nan")]):
        assert compare(torch.tensor(got), want, want.double()).message


def test_unwritten_memory_fails():
    def forget(y, total):
        with poisoned_scratch():
            out = torch.empty_like(y)
        out[:5] = y.detach()[:5]
        return y + (out - out.detach()) + (out * 0), total

    with pytest.raises(ParityError, match=r"y: \[5, 0\] is nan"):
        check(CASE, torch.float32, _forward_with(forget))


def test_reading_past_a_view_gives_nan():
    def stray(x, weight, bias, residual):
        x = x.as_strided((6, 38), (40, 1), x.storage_offset())[:, 1:]  # one column too far
        return plain.layer_norm(x, weight, bias, residual=residual)

    with pytest.raises(ParityError, match="y: .* is nan"):
        check(CASE, torch.float32, stray)


def test_writing_into_an_input_fails():
    def write(x, weight, bias, residual):
        outputs = plain.layer_norm(x, weight, bias, residual=residual)
        x.data[0, 0] += 1.0
        return outputs

    with pytest.raises(ParityError, match="input x was modified"):
        check(CASE, torch.float32, write)


def test_writing_beside_an_input_fails():
    def write(x, weight, bias, residual):
        x.data.as_strided((1,), (1,), x.storage_offset() + 38)[0] = 1.0
        return plain.layer_norm(x, weight, bias, residual=residual)

    with pytest.raises(ParityError, match="input x was modified"):
        check(CASE, torch.float32, write)


@pytest.mark.parametrize("which", ["saved", "cotangent"])
def test_a_backward_that_writes_into_what_it_was_handed_fails(which):
    def write(gradients, saved, cotangents):
        (saved if which == "saved" else cotangents)[0].data.fill_(0.0)

    with pytest.raises(
        ParityError, match="input x was modified" if which == "saved" else "cotangent of y was modified"
    ):
        check(CASE, torch.float32, _backward_with(write))


def test_a_backward_that_writes_into_a_saved_intermediate_fails():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, bias):
            ctx.save_for_backward(x + bias, bias)
            return plain.bias_gelu(x, bias)

        @staticmethod
        def backward(ctx, dy):
            total, bias = ctx.saved_tensors
            with torch.enable_grad():
                leaf = total.detach().clone().requires_grad_()
                (dx,) = torch.autograd.grad(torch.nn.functional.gelu(leaf, approximate="tanh"), leaf, dy)
            total.data.zero_()
            return dx, dx.sum(0)

    def inputs(generator, dtype):
        return {
            "x": torch.randn(5, 8, generator=generator).to(dtype).requires_grad_(),
            "bias": torch.randn(8, generator=generator).to(dtype).requires_grad_(),
        }

    with pytest.raises(ParityError, match=r"saved tensor \d+ \(5, 8\) was modified"):
        check(
            Case("bias_gelu", "saved", "a saved intermediate", inputs),
            torch.float32,
            lambda x, bias: Square.apply(x, bias),
        )


def test_an_output_that_aliases_an_input_fails():
    class Alias(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, bias):
            return x.view(x.shape)

        @staticmethod
        def backward(ctx, dy):
            return dy, dy.sum(0)

    def inputs(generator, dtype):
        return {"x": torch.zeros(5, 8, dtype=dtype).requires_grad_(), "bias": torch.zeros(8, dtype=dtype)}

    with pytest.raises(ParityError, match="out shares memory with x"):
        check(Case("bias_gelu", "alias", "zeros", inputs), torch.float32, lambda x, bias: Alias.apply(x, bias))


def test_a_huge_element_does_not_hide_errors_elsewhere():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(4096, generator=generator, dtype=torch.float64)
    reference[7] = 1e9
    own = reference.float()
    assert not compare(own, own, reference).message
    wrong = own.clone()
    wrong[100] += 1e-4  # far below one ulp of 1e9
    assert "[100]" in compare(wrong, own, reference).message


def test_a_huge_element_hides_only_errors_of_its_row_and_column():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    reference[7, 9] = 1e9 / 3
    own = reference.float()
    for row, column in ((8, 10), (63, 0)):
        wrong = own.clone()
        wrong[row, column] += 1e-4
        assert f"[{row}, {column}]" in compare(wrong, own, reference).message


def test_the_rest_of_a_cancellation_may_have_the_noise_of_its_row():
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 3, 40, dtype=torch.float64)[:, None]  # rows of very different size
    terms = torch.randn(2, 40, 30, generator=generator, dtype=torch.float64) * scale
    terms[1, 20:, 5] = -terms[0, 20:, 5] * (1 + 1e-3)  # large terms of which little is left
    reference = terms.bfloat16().double().sum(0)
    rounded = (terms.bfloat16() * 1.25).float()  # two ways to round on the way
    own, other = (rounded[0].bfloat16() + rounded[1].bfloat16()), (rounded[0] + rounded[1]).bfloat16()
    assert not compare(other, own, reference * 1.25).message
    wrong = other.clone()
    wrong[39, 5] += 0.05 * reference[39].abs().max().item()
    assert "[39, 5]" in compare(wrong, own, reference * 1.25).message


def test_exact_zeros_among_many_must_stay_zero():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(4096, generator=generator, dtype=torch.float64)
    reference[:1000] = 0.0
    own = reference.float()
    wrong = own.clone()
    wrong[10] = 1e-12
    assert "[10]" in compare(wrong, own, reference).message


def test_luck_of_plain_with_one_element_does_not_fail_another_rounding():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1000, generator=generator, dtype=torch.float64)
    down, up = reference.float(), torch.nextafter(reference.float(), torch.tensor(9.0))
    assert not compare(up, down, reference).message


def test_integers_compare_exactly():
    experts = torch.tensor([[0, 1], [2, 3]])
    assert not compare(experts, experts, experts).message
    assert "[1, 0] is 3, plain 2" in compare(torch.tensor([[0, 1], [3, 2]]), experts, experts).message


def test_a_gradient_that_plain_does_not_have_may_only_be_zero():
    def inputs(generator, dtype):
        return {
            "x": torch.randn(3, 8, generator=generator).to(dtype),
            "bias": torch.zeros(8, dtype=dtype).requires_grad_(),
        }

    case = Case("bias_gelu", "only dbias", "x needs no gradient", inputs)
    assert list(check(case, torch.float32, plain.bias_gelu)) == ["out", "dbias"]
