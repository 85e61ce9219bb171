"""route and expert_mlp beyond parity: the plan, host syncs, memory, determinism, tracing, and what they refuse."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from heiretsu.kernels import plain
from heiretsu.kernels.cpu import expert_mlp as cpu_expert_mlp
from heiretsu.kernels.recording import recording
from tests.kernels import forms

triton_only = pytest.mark.triton
if forms.HAS_TRITON:
    from heiretsu.kernels.gpu import grouped_gemm, launch
    from heiretsu.kernels.gpu.expert_mlp import expert_mlp
    from heiretsu.kernels.gpu.route import route
    from heiretsu.kernels.gpu.routing_plan import make_plan

few_examples = settings(max_examples=25, deadline=None, database=None)


def arguments(N=7, C=8, F=12, E=3, K=2, dtype=torch.float32, device="cpu", biases=True, experts=None, seed=0):
    """Positional arguments of expert_mlp; all floats want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).to(device).requires_grad_()

    if experts is None:
        experts = torch.randint(0, E, (N, K), generator=generator)
    b1, b2 = (leaf(E, F), leaf(E, C)) if biases else (None, None)
    return [leaf(N, C), experts.to(device), leaf(N, K), leaf(E, C, F), b1, leaf(E, F, C), b2]


def floats(values):
    return [v for v in values if v is not None and v.is_floating_point()]


def run(op, values):
    """Output and gradients of `op` for a cotangent of ones."""
    out = op(*values)
    return [out, *torch.autograd.grad(out.sum(), floats(values))]


# The routing plan


@st.composite
def routings(draw):
    """(indices (N, K), E): even, skewed, one-hot and empty experts all come up; some indices belong to nobody."""
    E, K, N = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.integers(1, 60))
    experts = draw(st.lists(st.integers(-1, E), min_size=1, max_size=4))
    picks = draw(st.lists(st.sampled_from(experts), min_size=N * K, max_size=N * K))
    return torch.tensor(picks).view(N, K), E


@triton_only
@few_examples
@given(routings())
def test_plan_is_the_stable_sort_by_expert(routing_case):
    experts, E = routing_case
    plan = make_plan(experts.to(forms.TRITON_DEVICE), E)
    flat = experts.flatten()
    inside = (flat >= 0) & (flat < E)
    key = torch.where(inside, flat, E)
    order = key.sort(stable=True).indices
    assert plan.order.cpu().tolist() == order.tolist()
    assert plan.offsets.cpu().tolist() == [int((key < e).sum()) for e in range(E + 1)]
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel()))
    assert plan.slot_rows.cpu().flatten().tolist() == torch.where(inside, rows, -1).tolist()


@triton_only
@settings(few_examples, max_examples=4)
@given(routings())
def test_expert_mlp_agrees_with_plain_for_any_routing(routing_case):
    experts, E = routing_case
    values = arguments(len(experts), 5, 6, E, experts.shape[1], torch.float64, forms.TRITON_DEVICE, experts=experts)
    for ours, expected in zip(run(expert_mlp, values), run(plain.expert_mlp, values), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@triton_only
@given(st.lists(st.integers(0, 300), min_size=1, max_size=12), st.sampled_from([1, 16, 128]))
def test_row_tile_bound_holds_for_every_load(counts, block):
    needed = sum(-(-count // block) for count in counts)
    assert needed <= grouped_gemm.row_tile_bound(sum(counts), len(counts), block)


@triton_only
@pytest.mark.parametrize(("counts", "block"), [([1, 1, 1], 16), ([17, 1, 1], 16), ([0, 129], 128), ([5], 1)])
def test_row_tile_bound_is_reached(counts, block):
    needed = sum(-(-count // block) for count in counts)
    assert needed == grouped_gemm.row_tile_bound(sum(counts), len([c for c in counts if c]), block)


# No host sync, no memory that is not needed


class NoHostSync(TorchDispatchMode):
    """Raises where a tensor's values would have to reach the host: in Python numbers, or in another tensor's shape."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        assert name != "index" or all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean mask waits"
        return function(*args, **(kwargs or {}))


@triton_only
def test_forward_and_backward_do_not_wait_for_the_device(triton_device):
    values = arguments(device=triton_device)
    logits = torch.randn(7, 3, device=triton_device, requires_grad=True)
    if triton_device == "cuda":
        run(expert_mlp, values)  # compiling may wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoHostSync():
            gates, experts = route(logits, 2)
            out = expert_mlp(values[0], experts, gates, *values[3:])
            torch.autograd.grad(out, [logits, *floats(values[:1] + values[3:])], torch.ones_like(out))
    finally:
        if triton_device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_the_watch_for_host_syncs_sees_plain_wait():
    with pytest.raises(AssertionError, match="waits"), NoHostSync():
        plain.expert_mlp(*arguments())


@triton_only
def test_pre_activations_are_kept_only_for_a_backward(triton_device):
    values = arguments(device=triton_device)
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        expert_mlp(*values)
    assert kept.count((14, 12)) == 1  # h, and not its GELU beside it
    op = torch.ops.heiretsu.expert_mlp
    assert op(*values, False)[1].numel() == 0
    with torch.no_grad():
        assert torch.equal(expert_mlp(*values), op(*values, True)[0])


# The tile


@triton_only
@pytest.mark.parametrize(
    ("dtype", "F", "entry"),
    [
        (torch.bfloat16, 32, "grouped_gemm"),
        (torch.bfloat16, 24, "grouped_gemm_odd"),
        (torch.float32, 24, "grouped_gemm"),
    ],
)
def test_odd_sizes_of_16_bit_take_the_tile_that_does_not_spill(triton_device, dtype, F, entry):
    with torch.no_grad(), recording() as record:
        expert_mlp(*arguments(C=16, F=F, dtype=dtype, device=triton_device))
    asked = {launched.tiles.name for launched in record.entries}
    assert {name for name in asked if name.startswith("grouped_gemm")} == {entry}


# Determinism


@triton_only
def test_results_repeat_bit_for_bit(triton_device):
    values = arguments(40, 8, 12, 3, 2, torch.bfloat16, triton_device)
    for first, second in zip(run(expert_mlp, values), run(expert_mlp, values), strict=True):
        assert torch.equal(first, second)


@triton_only
def test_a_token_does_not_depend_on_the_others(triton_device):
    values = arguments(40, 8, 12, 3, 2, device=triton_device)
    whole = expert_mlp(*values)
    part = expert_mlp(*(v[11:30] for v in values[:3]), *values[3:])
    assert torch.equal(part, whole[11:30])


@triton_only
def test_weight_gradients_of_float32_masters_are_not_rounded(triton_device):
    x, experts, gates, w1, b1, w2, b2 = arguments(33, 8, 12, 2, 1, torch.float32, triton_device)
    x, gates = x.detach().bfloat16(), gates.detach().bfloat16()
    out = expert_mlp(x, experts, gates, w1, b1, w2, b2)
    for name, grad in zip(("dw1", "db1", "dw2", "db2"), torch.autograd.grad(out.sum(), (w1, b1, w2, b2)), strict=True):
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.bfloat16().float()), name


def test_the_cpu_form_s_buffers_fit_and_float32_biases_are_not_summed_in_bfloat16():
    """ATen makes an `out` of another shape anew, and warns of it once."""
    values = arguments(33, 8, 12, 3, 2, torch.float32)
    narrow = [t.detach().bfloat16().requires_grad_() if i in (0, 2) else t for i, t in enumerate(values)]
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(forms.cpu_form("expert_mlp"), values)
            *_, db1, _, db2 = run(forms.cpu_form("expert_mlp"), narrow)
            with torch.no_grad():
                forms.cpu_form("expert_mlp")(*narrow)
    finally:
        torch.set_warn_always(False)
    for gradient in (db1, db2):
        assert gradient.dtype == torch.float32 and not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("wanted", [[i] for i in (0, 2, 3, 4, 5, 6)] + [[0, 3], [2, 6], [3, 4], [0, 5]])
def test_the_cpu_form_gives_any_gradients_alone(wanted):
    """Of weights in one dtype or two; of an expert without rows, which is the last, zeros."""
    experts = torch.randint(0, 3, (7, 2), generator=torch.Generator().manual_seed(1))
    for dtypes in ((torch.float64, torch.float64), (torch.float32, torch.float64), (torch.float64, torch.float32)):
        values = [t.detach() for t in arguments(E=4, dtype=torch.float64, experts=experts)]
        values[3], values[5] = values[3].to(dtypes[0]), values[5].to(dtypes[1])
        for i in wanted:
            values[i] = values[i].requires_grad_()
        leaves = [values[i] for i in wanted]
        got, want = (
            torch.autograd.grad(form(*values).square().sum(), leaves)
            for form in (forms.cpu_form("expert_mlp"), plain.expert_mlp)
        )
        torch.testing.assert_close(got, want)


def test_the_cpu_form_keeps_activations_only_for_a_backward(monkeypatch):
    saved, operator = [], cpu_expert_mlp._expert_mlp

    def recorded(*what):
        saved.append((what[-1], [len(t) for t in operator(*what)]))
        return operator(*what)

    monkeypatch.setattr(cpu_expert_mlp, "_expert_mlp", recorded)
    values = arguments()
    cpu_expert_mlp.expert_mlp(*values)
    with torch.no_grad():
        cpu_expert_mlp.expert_mlp(*values)
    cpu_expert_mlp.expert_mlp(*(t.detach() for t in values))
    assert saved == [(True, [7, 14, 14, 14]), (False, [7, 0, 0, 14]), (False, [7, 0, 0, 14])]


def test_the_cpu_forms_gradient_of_a_gate_is_added_up_in_float32():
    """(1 + 2^-7) (1 + 2^-6) - (1 + 2^-6 + 2^-7) is 2^-13, which a product of 8 bits loses."""
    values = [t.detach().bfloat16() if t.is_floating_point() else t for t in arguments(1, 2, 2, 1, 1)]
    gates = values[2].requires_grad_()
    values[5].zero_()
    values[6][0] = torch.tensor([1 + 2**-7, 1.0])
    dout = torch.tensor([[1 + 2**-6, -(1 + 2**-6 + 2**-7)]], dtype=torch.bfloat16)
    (dgates,) = torch.autograd.grad(forms.cpu_form("expert_mlp")(*values), gates, dout)
    assert dgates.item() == 2**-13


def test_no_experts_or_no_tokens_give_zeros_on_a_cpu():
    """E = 0 ended in max() of nothing."""
    for N, C, E, F, outside in ((5, 4, 0, 6, 0), (0, 4, 2, 6, 0), (5, 4, 2, 6, 2), (5, 0, 2, 6, 0), (5, 4, 2, 0, 0)):
        experts = torch.full((N, 2), outside)
        for dtype in (torch.float32, torch.float64):
            values = arguments(N, C, F, E, 2, dtype, experts=experts)
            weights = [w.detach().float().requires_grad_() for w in values[3:]]
            leaves, found = floats(values[:3]) + weights, []
            for form in (forms.cpu_form("expert_mlp"), plain.expert_mlp):
                out = form(*values[:3], *weights)
                total = out.sum() + values[0].sum() * 0.0  # plain of no experts is a constant
                found.append([out, *torch.autograd.grad(total, leaves, materialize_grads=True)])
            torch.testing.assert_close(*found)


# Tracing


def layer_compiles(form, device):
    """A routed layer under torch.compile(fullgraph=True) gives the values and gradients that it gives without."""
    route, expert_mlp = form("route"), form("expert_mlp")
    x, _, _, *weights = arguments(device=device)
    router = torch.randn(8, 3, device=device, requires_grad=True)

    def layer(x, router, *weights):
        gates, experts = route(x @ router, 2)
        return expert_mlp(x, experts, gates, *weights)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    values = [x, router, *weights]
    for got, expected in zip(run(compiled, values), run(layer, values), strict=True):
        assert torch.equal(got, expected)


@triton_only
def test_layer_compiles_in_one_graph(triton_device):
    layer_compiles(forms.triton_form, triton_device)


def test_layer_of_cpu_forms_compiles_in_one_graph():
    layer_compiles(forms.cpu_form, "cpu")


if forms.INTERPRETED:  # float64 runs there only

    @triton_only
    def test_gradients_are_those_of_finite_differences():
        x, experts, gates, *weights = arguments(4, 3, 4, 2, 2, torch.float64)
        logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

        def layer(x, gates, *weights):
            return expert_mlp(x, experts, gates, *weights)

        assert torch.autograd.gradcheck(layer, (x, gates, *weights), fast_mode=True)
        assert torch.autograd.gradcheck(lambda logits: route(logits, 2)[0], (logits,), fast_mode=True)


# What they refuse


if forms.HAS_TRITON and not forms.INTERPRETED:  # in the interpreter CPU tensors are what it takes

    def test_triton_form_refuses_cpu_tensors_and_names_the_other():
        with pytest.raises(ValueError, match="heiretsu.kernels.fused.expert_mlp"):
            expert_mlp(*arguments())


@triton_only
def test_second_backward_is_an_error_not_a_wrong_number(triton_device):
    values = arguments(device=triton_device)
    (dx,) = torch.autograd.grad(expert_mlp(*values).sum(), values[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), values[3:4])


@triton_only
def test_every_architecture_routes_up_to_2048_experts():
    for arch in ("ampere", "hopper", "blackwell", "cdna3"):
        for kernel in ("route", "routing_plan"):
            tiles = launch.tiles_named(kernel)
            assert tiles.find(arch, 2048).parameters["num_warps"] == 4
            with pytest.raises(ValueError, match="2049 is larger than 2048"):
                tiles.find(arch, 2049)
