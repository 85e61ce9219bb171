"""Every operator that the library registers passes torch.library.opcheck, called as the ops call it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from heiretsu.kernels.cpu import attention as cpu_attention
from tests.kernels import forms
from tests.kernels.samples import SAMPLES, outputs, runnable_forms, tensors, to


def registered(forms_here) -> set[str]:
    """Names of our operators of these forms: those on the CPU say so in their names."""
    names = {n.removeprefix("heiretsu::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("heiretsu::")}
    return {name for name in names if ("cpu-form" if "cpu" in name else "triton") in forms_here}


class Recorded(TorchDispatchMode):
    """Inside, `calls` collects our operators with what they were called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "heiretsu":
            self.calls.append((function, [t.detach() if isinstance(t, torch.Tensor) else t for t in args]))
        return function(*args, **(kwargs or {}))


def recorded_calls():
    """{id: (operator, arguments)}: what the samples' forwards and backwards call on the forms that this process can
    run; of each operator the first call and the last, which have the least and the most options."""
    calls = {}
    for sample, (op, build) in SAMPLES.items():
        for form, device in runnable_forms(op).values():
            values = to(build(7), device)
            with Recorded() as recorded:
                out = outputs(form(**values))
                torch.autograd.grad([o.sum() for o in out], list(tensors(values).values()), allow_unused=True)
            for function, args in recorded.calls:
                calls.setdefault(function, []).append((f"{function.__name__} of {sample}", function, args))
    return {name: (function, args) for of in calls.values() for name, function, args in (of[0], of[-1])}


@pytest.fixture(scope="module")
def calls():
    return recorded_calls()


def test_every_registered_operator_passes_opcheck(calls):
    failures = []
    for name, (function, args) in calls.items():
        if "_backward" not in function.__name__:  # a backward has no derivative of its own
            args = [t.requires_grad_() if _is_float(t) else t for t in args]
        try:
            torch.library.opcheck(function, tuple(args))
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    assert not failures, "\n".join(failures)


def test_the_samples_call_every_registered_operator(calls):
    here = {name for op in SAMPLES.values() for name in runnable_forms(op[0])}
    assert {function.__name__.split(".")[0] for function, _ in calls.values()} == registered(here)
    if "cpu-form" in here:  # bias_gelu, layer_norm and route are no operators of ours there
        ours = {"cpu_dropout", "cpu_expert_mlp", "cpu_linear_cross_entropy", "attention_cpu"}
        backward = {"cpu_expert_mlp_backward", "cpu_linear_cross_entropy_backward", "attention_cpu_backward"}
        assert registered({"cpu-form"}) == ours | backward
    assert registered({"cpu-form"}) and (not forms.HAS_TRITON or registered({"triton"}))


def test_no_part_of_the_cpu_attention_s_mask_is_left_unwritten(monkeypatch):
    """It was, where no query of a block sees a key: a bool of 254. Scratch memory is True here (scratch.py)."""
    monkeypatch.setattr(cpu_attention, "BLOCK_SCORES", 1)  # blocks of 16 queries
    q, k, v = (torch.randn(shape) for shape in ((2, 4, 47, 8), (2, 2, 40, 8), (2, 2, 40, 8)))
    keep = torch.ops.heiretsu.attention_cpu(q, k, v, True, 0.3, 0.4, 7, 0, 0)[2]
    assert not keep[:, :, :7].any()  # queries that see no key
    assert not keep[:, :, 7:23, 16:].any() and not keep[:, :, 23:39, 32:].any()
    assert keep[:, :, 7:23, :16].any()


@pytest.mark.parametrize(
    "sample, wanted",
    [
        ("attention, dropout", [True, True, False]),
        ("expert_mlp", [True, False, False, False]),
        ("linear_cross_entropy", [True, True, False, False]),
    ],
)
def test_what_a_cpu_operator_keeps_for_its_backward_has_no_derivative(sample, wanted):
    op, build = SAMPLES[sample]
    with Recorded() as recorded:
        forms.cpu_form(op)(**to(build(7), "cpu"))
    ((function, args),) = recorded.calls
    found = function(*(t.requires_grad_() if _is_float(t) else t for t in args))
    assert [t.requires_grad for t in found] == wanted


def _is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("sample", ["attention, dropout", "dropout", "expert_mlp", "linear_cross_entropy"])
def test_a_traced_operator_gives_the_strides_that_it_gives(sample):
    """Of inputs that are not contiguous, forward and backward; opcheck compares the fake tensors' strides as well."""
    op, build = SAMPLES[sample]
    for form, device in runnable_forms(op).values():
        values = to(build(7), device)
        for name, t in tensors(values).items():
            if t.dim() > 1:
                values[name] = t.detach().mT.contiguous().mT.requires_grad_()
        with Recorded() as recorded:
            out = outputs(form(**values))
            torch.autograd.grad([o.sum() for o in out], list(tensors(values).values()), allow_unused=True)
        with Recorded() as without_gradients, torch.no_grad():
            form(**values)
        assert recorded.calls and without_gradients.calls
        for function, args in recorded.calls + without_gradients.calls:
            torch.library.opcheck(function, tuple(args), test_utils=("test_faketensor",))
