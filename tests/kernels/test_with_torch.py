"""The ops inside what torch wraps around them: autocast, checkpoints, transforms, compilation, frozen inputs."""

import contextlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from heiretsu.kernels import fused, plain
from tests.kernels import forms
from tests.kernels.parity import Case, check, same_bits
from tests.kernels.samples import OPS, SAMPLES, outputs, runnable_forms, tensors, to

# In the interpreter one sample an op: these tests are about what torch does around a kernel, which is slow there.
ONE_EACH = ("attention, dropout", "bias_gelu", "dropout", "layer_norm, residual", "route", "expert_mlp",
            "linear_cross_entropy")  # fmt: skip
each_sample = pytest.mark.parametrize("sample", ONE_EACH if forms.INTERPRETED else SAMPLES)
cpu_form_alone = pytest.mark.skipif(forms.INTERPRETED, reason="the kernels' own tests ask this of them")


def calls(sample, n=7, dtype=torch.float32):
    """(name of the form, form, arguments on its device) for each form that this process can run."""
    op, build = SAMPLES[sample]
    return [(name, form, to(build(n, dtype), device)) for name, (form, device) in runnable_forms(op).items()]


def run(form, values, surroundings=contextlib.nullcontext, backward=contextlib.nullcontext):
    """Outputs, and gradients for cotangents that differ from element to element; within contexts."""
    with surroundings():
        out = outputs(form(**values))
    cotangents = [torch.linspace(-1.0, 1.0, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in out]
    with backward():
        return [*out, *torch.autograd.grad(out, list(tensors(values).values()), cotangents, allow_unused=True)]


def assert_same_bits(got, expected):
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@each_sample
def test_autocast_changes_nothing(sample):
    """The rule of all forms, plain's too. CPU attention with dropout had its forward in bf16, its backward in float32.

    Torch says to call backward outside of autocast; our own operators keep their dtypes inside as well.
    """
    op, _ = SAMPLES[sample]
    for name, form, values in calls(sample):
        device = next(iter(tensors(values).values())).device.type

        def autocast(device=device):
            return torch.autocast(device, torch.bfloat16)

        assert_same_bits(run(form, values, autocast, autocast), run(form, values))
        if name == "cpu-form":
            assert_same_bits(run(getattr(plain, op), values, autocast), run(getattr(plain, op), values))


@each_sample
def test_a_checkpoint_gives_the_same_bits(sample):
    """expert_mlp once read its saved tensors twice, which checkpoint refuses."""
    for _, form, values in calls(sample):
        names = list(tensors(values))

        def recomputed(form=form, names=names, **values):
            def function(*floats):
                return tuple(outputs(form(**values | dict(zip(names, floats, strict=True)))))

            return checkpoint(function, *(values[name] for name in names), use_reentrant=False)

        assert_same_bits(run(recomputed, values), run(form, values))


class Allocated(TorchDispatchMode):
    """Inside, `shapes` collects the shapes of what our operators give."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "heiretsu":
            self.shapes += [t.shape for t in (out if isinstance(out, tuple) else (out,))]
        return out


@each_sample
def test_a_frozen_input_costs_no_gradient_and_changes_no_other(sample):
    """The weight gradients of frozen experts were computed all the same."""
    for name, form, values in calls(sample):
        floats = tensors(values)
        everything = dict(zip(floats, run(form, values)[-len(floats) :], strict=True))
        for wanted in floats:
            for other, t in floats.items():
                t.requires_grad_(other == wanted)
            out = [o for o in outputs(form(**values)) if o.requires_grad]
            cotangents = [torch.linspace(-1.0, 1.0, o.numel(), device=o.device).view(o.shape) for o in out]
            with Allocated() as allocated:
                (gradient,) = torch.autograd.grad(out, [floats[wanted]], cotangents)
            assert same_bits(gradient, everything[wanted]), (name, wanted)
            made = {shape for shape in allocated.shapes if shape.numel()}
            assert made <= {floats[wanted].shape}, (name, wanted, made)


def jvp(f, t):
    return torch.func.jvp(f, (t,), (torch.ones_like(t),))[1]


def dual(f, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(t.detach(), torch.ones_like(t)))).tangent


def hessian(f, t):
    return torch.func.hessian(lambda t: f(t).square().sum())(t)


def vmapped(f, t):
    return torch.func.jvp(torch.vmap(f), (torch.stack([t, t]),), (torch.ones_like(torch.stack([t, t])),))[1]


@pytest.mark.parametrize("transform", [jvp, dual, hessian, vmapped])
@pytest.mark.parametrize("sample", ["attention", "attention, dropout", "attention_lse", "bias_gelu", "dropout",
                                    "layer_norm", "layer_norm, residual", "route", "expert_mlp",
                                    "linear_cross_entropy"])  # fmt: skip
def test_forward_mode_raises_where_it_would_be_wrong(sample, transform):
    """torch.library answered with a tangent of 0. The CPU form of route alone is made of torch's own operators."""
    op, _ = SAMPLES[sample]
    for name, form, values in calls(sample, n=3):
        argument = next(iter(tensors(values)))

        def function(t, form=form, values=values, argument=argument):
            return outputs(form(**values | {argument: t}))[0]

        if (op, name) == ("route", "cpu-form"):
            expected = transform(lambda t: function(t, getattr(plain, op)), values[argument].detach())
            torch.testing.assert_close(transform(function, values[argument].detach()), expected)
        else:
            with pytest.raises(NotImplementedError, match=f"^{op.removesuffix('_lse')}: .*heiretsu.kernels.plain"):
                transform(function, values[argument].detach())


@cpu_form_alone
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_elsewhere_lets_an_op_pass(op):
    """An op on what carries no tangent is a constant of the derivative."""
    for _, form, values in calls(op):
        values = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        with forward_ad.dual_level():
            inside = outputs(form(**values))
        assert_same_bits(inside, outputs(form(**values)))


@cpu_form_alone
@pytest.mark.parametrize("op", OPS)
def test_vmap_gives_plain_s_result_or_raises(op):
    for _, form, values in calls(op):
        argument, t = next(iter(tensors(values).items()))
        stack = torch.stack([t.detach(), t.detach() * 0.5])

        def result(t, form=form, values=values, argument=argument):
            return outputs(form(**values | {argument: t}))[0]

        if op in ("bias_gelu", "layer_norm"):  # an autograd.Function has no rule for vmap unless one writes it
            with pytest.raises(RuntimeError, match="vmap"):
                torch.vmap(result)(stack)
        else:
            expected = torch.stack([result(t, getattr(plain, op)) for t in stack])
            torch.testing.assert_close(torch.vmap(result)(stack), expected, rtol=1e-4, atol=1e-5)


@cpu_form_alone
@each_sample
def test_one_graph_serves_all_lengths(sample):
    """torch.compile(fullgraph=True) of forward and backward, with lengths that change."""
    for _, form, _ in calls(sample):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(form, fullgraph=True, backend=counter, dynamic=True)
        graphs = set()
        for n in (7, 10, 23):
            (values,) = (values for _, f, values in calls(sample, n) if f is form)
            for got, expected in zip(run(compiled, values), run(form, values), strict=True):
                torch.testing.assert_close(got, expected)
            graphs.add(counter.frame_count)
        assert len(graphs) == 1, f"{sample} was compiled again for another length"


@cpu_form_alone
@each_sample
def test_gradients_are_those_of_finite_differences(sample):
    for _, form, values in calls(sample, n=4, dtype=torch.float64):
        if next(iter(tensors(values).values())).device.type != "cpu":
            continue  # float64 runs on a CPU alone
        names = list(tensors(values))

        def function(*floats, form=form, values=values, names=names):
            result = outputs(form(**values | dict(zip(names, floats, strict=True))))
            return tuple(torch.where(o == -torch.inf, 0.0, o) for o in result)  # the lse of a query that sees nothing

        assert torch.autograd.gradcheck(function, tuple(values[n] for n in names), fast_mode=True)


@cpu_form_alone
def test_16_bit_gradients_do_not_grow_worse_with_the_length():
    """ATen's flash adds up blocks of queries or keys in 16 bits: at 767 queries that broke the parity rule."""

    def inputs(generator, dtype):
        return {name: torch.randn(1, 1, 767, 16, generator=generator).to(dtype).requires_grad_() for name in "qkv"}

    for seed in range(2):
        check(Case("attention", f"767 767 {seed}", "a long sequence", inputs), torch.bfloat16, fused.attention)
