"""The ops inside what torch wraps around them: autocast, checkpoints, transforms, compilation, frozen inputs."""

import contextlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from heiretsu.kernels import fused, plain
from heiretsu.kernels.cpu import bias_gelu as cpu_bias_gelu
from heiretsu.kernels.cpu import layer_norm as cpu_layer_norm
from heiretsu.kernels.cpu.row_blocks import block_rows, row_blocks, slices
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


@cpu_form_alone
@each_sample
def test_a_default_device_changes_nothing(sample):
    """Scratch memory, counters and masks are made where the inputs are."""
    for _, form, values in calls(sample):
        expected = run(form, values)
        with torch.device("meta"):
            found = outputs(form(**values))
            cotangents = [
                torch.linspace(-1.0, 1.0, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in found
            ]
            found += torch.autograd.grad(found, list(tensors(values).values()), cotangents, allow_unused=True)
        assert_same_bits(found, expected)


@cpu_form_alone
@pytest.mark.parametrize("sample", ["bias_gelu", "dropout", "layer_norm", "expert_mlp"])
def test_results_and_gradients_are_contiguous_whatever_the_inputs_are(sample):
    op, build = SAMPLES[sample]
    for form, _ in runnable_forms(op).values():
        values = build(7)
        for name, t in tensors(values).items():
            values[name] = t.detach().mT.contiguous().mT.requires_grad_() if t.dim() > 1 else t
        for name, t in zip(("out", *tensors(values)), run(form, values), strict=True):
            assert t.is_contiguous(), name


@cpu_form_alone
def test_what_only_a_backward_reads_requires_no_gradient_and_is_there_only_for_one():
    values = SAMPLES["bias_gelu"][1](5)
    out, derivative = cpu_bias_gelu._BiasGelu.apply(values["x"], values["bias"], True)
    assert out.requires_grad and not derivative.requires_grad
    values = SAMPLES["layer_norm"][1](5)
    out, mean, rstd = cpu_layer_norm._LayerNorm.apply(*values.values(), 1e-5)
    assert out.requires_grad and not mean.requires_grad and not rstd.requires_grad
    for sample, op, shown in (
        ("expert_mlp", torch.ops.heiretsu.cpu_expert_mlp, 1),
        ("linear_cross_entropy", torch.ops.heiretsu.cpu_linear_cross_entropy, 2),
        ("attention, dropout", torch.ops.heiretsu.attention_cpu, 2),
        ("dropout", torch.ops.heiretsu.cpu_dropout, 1),
    ):
        ((_, form, values),) = calls(sample)
        with Called(op) as called:
            form(**values)
            with torch.no_grad():
                form(**values)
            form(**{n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in values.items()})
        results = op(*(t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, torch.Tensor) else t
                       for t in called.arguments[0]))  # fmt: skip
        assert [t.requires_grad for t in results] == [i < shown for i in range(len(results))], sample
        flags = [[a for a in arguments if isinstance(a, bool)] for arguments in called.arguments]
        if sample in ("expert_mlp", "linear_cross_entropy"):
            asked = len(flags[0])
            assert flags == [[True] * asked, [False] * asked, [False] * asked], sample
    derivatives = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_bias_gelu._BiasGelu, "apply", lambda x, bias, save: derivatives.append(save) or (x,))
        x, bias = SAMPLES["bias_gelu"][1](5).values()
        fused.bias_gelu(x, bias)
        fused.bias_gelu(x.detach(), bias)
        fused.bias_gelu(x, bias.detach())
        fused.bias_gelu(x.detach(), bias.detach())
        with torch.no_grad():
            fused.bias_gelu(x, bias)
    assert derivatives == [True, True, True, False, False]


class Called(TorchDispatchMode):
    """Inside, `arguments` collects what an operator was called with."""

    def __init__(self, op):
        super().__init__()
        self.op, self.arguments = op, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is self.op:
            self.arguments.append(args)
        return function(*args, **(kwargs or {}))


@cpu_form_alone
def test_fused_looks_at_the_first_tensor_by_place_or_by_name():
    logits = torch.zeros(3, 4, device="meta")
    for call in (lambda: fused.route(logits, 2), lambda: fused.route(top_k=2, logits=logits)):
        with pytest.raises(ValueError, match="^route: .*meta tensors"):
            call()


@cpu_form_alone
def test_what_is_empty_or_dropped_never_costs_nothing():
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert fused.dropout(x, 0.0, 7) is x
    for shape in ((3, 0), (0, 5), (2, 0, 4)):
        x, weight, bias = (torch.randn(s, requires_grad=True) for s in (shape, shape[-1:], shape[-1:]))
        for form in (fused.layer_norm, plain.layer_norm):
            y = form(x, weight, bias)
            gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
            assert y.shape == x.shape and [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]
            assert not any(g.any() for g in gradients)


def test_blocks_of_rows_cover_all_and_fit_the_cache():
    assert block_rows(768) == 170 and block_rows(2**17) == block_rows(2**18) == 1 and block_rows(0) == 2**17
    assert (
        slices(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)] and slices(0, 4) == [] and slices(8, 4)[-1].stop == 8
    )
    assert row_blocks(400, 768) == slices(400, 170)
