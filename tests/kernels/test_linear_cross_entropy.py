"""linear_cross_entropy beyond parity: the usual loss, memory, shards, tracing, determinism, and what it refuses."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heiretsu.kernels import fused, plain
from heiretsu.kernels.cpu import linear_cross_entropy as cpu_cross_entropy
from tests.kernels import forms
from tests.kernels.parity import Case, check, compare

if forms.HAS_TRITON:
    from heiretsu.kernels.gpu import launch
    from heiretsu.kernels.gpu import linear_cross_entropy as triton_cross_entropy

FORMS = [pytest.param("cpu", id="cpu-form"), pytest.param("triton", id="triton", marks=pytest.mark.triton)]
each_form = pytest.mark.parametrize("form", FORMS)


def function(form):
    """The form of linear_cross_entropy, and the device of its tensors."""
    if form == "cpu":
        return cpu_cross_entropy.linear_cross_entropy, "cpu"
    return triton_cross_entropy.linear_cross_entropy, forms.TRITON_DEVICE


def inputs(device, N=40, C=20, V=70, dtype=torch.float32, weights=None, ignored=0):
    """x, weight, targets, of which the first `ignored` are -100."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(N, C, generator=generator), torch.randn(V, C, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[:ignored] = -100
    x, weight = x.to(device, dtype).requires_grad_(), weight.to(device, weights or dtype).requires_grad_()
    return x, weight, targets.to(device)


def mean_loss(op, x, weight, targets, scale=1.0):
    """scale * the mean over tokens that have a target."""
    lse, target_logit = op(x, weight, targets)
    return torch.where(targets >= 0, lse - target_logit, 0.0).sum() * (scale / (targets >= 0).sum())


@pytest.fixture
def small_chunks(monkeypatch):
    """Three chunks of tokens, row blocks of a few rows and several blocks of the vocabulary, in the CPU form."""
    monkeypatch.setattr(cpu_cross_entropy, "_CHUNK_ELEMENTS", 16 * 70)
    monkeypatch.setattr(cpu_cross_entropy, "_ROW_BLOCK_ELEMENTS", 3 * 70)
    monkeypatch.setattr(cpu_cross_entropy, "_VOCAB_BLOCK", 32)


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [0, 7, 40])
def test_gradients_of_the_mean_loss(form, dtype, ignored, small_chunks):
    """dlse is one number wherever there is a target: what the CPU form computes in advance."""
    op, device = function(form)
    values = inputs(device, dtype=dtype, weights=torch.float32, ignored=ignored)
    if ignored == 40:
        values[2][:] = -100
        got = torch.autograd.grad(op(*values)[0].sum() * 0.0, values[:2])
        assert all(not g.any() for g in got)
        return
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in values]
    got, own = (torch.autograd.grad(mean_loss(f, *values, 3.0), values[:2]) for f in (op, plain.linear_cross_entropy))
    reference = torch.autograd.grad(mean_loss(plain.linear_cross_entropy, *wide, 3.0), wide[:2])
    for name, *tensors in zip(("dx", "dweight"), got, own, reference, strict=True):
        assert not compare(*tensors, gradient_size=3.0 / 33).message, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["scaled", "target alone", "one token weighted", "target of another shard"])
def test_the_cpu_form_recognises_a_loss_that_it_did_not_foresee(case, dtype, small_chunks):
    x, weight, targets = inputs("cpu", dtype=dtype, weights=torch.float32, ignored=5)
    targets = targets + 40 * (case == "target of another shard")
    dlse, dtarget = (targets >= 0) * 0.5, (targets >= 0) * -0.5
    if case == "scaled":
        dtarget = dtarget * 3
    elif case == "target alone":
        dlse = dlse * 0
    elif case == "one token weighted":
        dlse[9] *= 2
    got, expected = (
        torch.autograd.grad(f(x, weight, targets), (x, weight), (dlse, dtarget))
        for f in (cpu_cross_entropy.linear_cross_entropy, plain.linear_cross_entropy)
    )
    rounding = {} if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(got, expected, **rounding)


def test_the_cpu_form_computes_dweight_in_advance_unless_a_target_is_of_another_shard():
    x, weight, targets = inputs("cpu", ignored=3)
    targets[5:] = targets[5:].clamp(min=1)
    targets[4] = 0

    def in_advance(start, need_dweight=True):
        operator = torch.ops.heiretsu.cpu_linear_cross_entropy
        q_x = operator(x.detach(), weight.detach()[start:], targets, start, True, need_dweight)[3]
        return q_x.any(), len(q_x)

    assert in_advance(0) == (True, 70) and in_advance(0, need_dweight=False) == (False, 0)
    assert in_advance(1) == (False, 69)  # word 0 is one of a token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_the_mean_loss_are_computed_once_and_widened_a_block_at_a_time(dtype, small_chunks, monkeypatch):
    """Whichever tokens have a target; any other loss computes them again, in blocks of half a chunk."""
    cut, slices = [], cpu_cross_entropy.slices
    monkeypatch.setattr(cpu_cross_entropy, "slices", lambda *sizes: cut.append(sizes) or slices(*sizes))
    x, weight, targets = inputs("cpu", dtype=dtype, weights=torch.float32, ignored=7)
    accumulated = [(70, 32)] * (dtype == torch.bfloat16)
    loss = mean_loss(cpu_cross_entropy.linear_cross_entropy, x, weight, targets)
    loss.backward()
    assert cut == [(40, 16), *[(16, 3), *accumulated] * 2, (8, 3), *accumulated]
    cut.clear()
    lse, target_logit = cpu_cross_entropy.linear_cross_entropy(x, weight, targets)
    (lse * torch.arange(40)).sum().backward()
    assert cut.pop() == (70, 16 * 70 // 2 // 40)


def test_the_cpu_form_computes_gradients_in_advance_only_where_they_are_wanted(monkeypatch):
    asked, forward = [], cpu_cross_entropy._forward
    monkeypatch.setattr(cpu_cross_entropy, "_forward", lambda *what: asked.append(what[4:]) or forward(*what))
    x, weight, targets = inputs("cpu")
    want = torch.autograd.grad(mean_loss(plain.linear_cross_entropy, x, weight, targets), (x, weight))
    for tensors, wanted in (((x, weight), want), ((x, weight.detach()), want[:1]), ((x.detach(), weight), want[1:])):
        leaves = [t for t in tensors if t.requires_grad]
        got = torch.autograd.grad(mean_loss(cpu_cross_entropy.linear_cross_entropy, *tensors, targets), leaves)
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        cpu_cross_entropy.linear_cross_entropy(x, weight, targets)
    assert asked == [(True, True), (True, False), (False, True), (False, False)]


def test_the_cpu_forms_gradients_are_made_in_their_own_dtypes_traced_or_not(monkeypatch):
    """And not in float32 first, which would hold one of all words twice as large."""
    asked, backward = [], cpu_cross_entropy._backward
    monkeypatch.setattr(cpu_cross_entropy, "_backward", lambda *what: asked.append(what) or backward(*what))
    x, weight, targets = inputs("cpu", dtype=torch.bfloat16)
    mean_loss(cpu_cross_entropy.linear_cross_entropy, x, weight, targets).backward()
    (what,) = asked
    assert [t.dtype for t in backward(*what)] == [torch.bfloat16] * 2
    operator = torch.ops.heiretsu.cpu_linear_cross_entropy_backward.default
    torch.library.opcheck(operator, tuple(what), test_utils=("test_faketensor",))


@pytest.mark.parametrize("op", [plain.linear_cross_entropy, cpu_cross_entropy.linear_cross_entropy])
def test_an_empty_shard_has_an_lse_of_minus_infinity_and_gradients_of_0(op):
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x, weight, targets = inputs("cpu", N=3, V=70, dtype=dtype)
        lse, target_logit = op(x, weight[:0], targets)
        assert lse.tolist() == [-torch.inf] * 3 and target_logit.tolist() == [0.0] * 3
        assert lse.dtype == target_logit.dtype == wide
        for gradient in torch.autograd.grad(lse.sum() + target_logit.sum(), (x, weight)):
            assert not gradient.any()


def test_the_cpu_form_gives_the_same_gradients_twice_from_one_graph():
    x, weight, targets = inputs("cpu")
    loss = mean_loss(cpu_cross_entropy.linear_cross_entropy, x, weight, targets)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (x, weight))
    torch.testing.assert_close([2 * g for g in first], list(second))


@each_form
def test_shards_of_the_vocabulary_combine(form):
    op, device = function(form)
    x, weight, targets = inputs(device)
    whole_lse, whole_target = op(x, weight, targets)
    parts = [op(x, weight[start : start + 35], targets, start) for start in (0, 35)]
    torch.testing.assert_close(torch.stack([lse for lse, _ in parts]).logsumexp(0), whole_lse)
    torch.testing.assert_close(parts[0][1] + parts[1][1], whole_target)


@each_form
def test_gradients_are_those_of_finite_differences(form):
    op, device = function(form)
    if device == "cuda":
        pytest.skip("float64 runs in the interpreter alone")
    x, weight, targets = inputs(device, N=4, C=3, V=5, dtype=torch.float64, ignored=1)
    assert torch.autograd.gradcheck(lambda x, weight: op(x, weight, targets), (x, weight))
    assert torch.autograd.gradcheck(lambda x, weight: mean_loss(op, x, weight, targets), (x, weight))


@each_form
def test_a_second_derivative_is_an_error(form):
    op, device = function(form)
    x, weight, targets = inputs(device)
    (dx,) = torch.autograd.grad(mean_loss(op, x, weight, targets), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


@each_form
def test_compiles_without_a_graph_break(form):
    op, device = function(form)
    x, weight, targets = inputs(device)
    compiled = torch.compile(lambda x, weight: mean_loss(op, x, weight, targets), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weight), (x, weight))
    expected = torch.autograd.grad(mean_loss(op, x, weight, targets), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@each_form
def test_the_same_bits_twice(form):
    op, device = function(form)
    values = inputs(device, V=200)
    first, second = (
        torch.autograd.grad(op(*values), values[:2], (torch.ones(40, device=device),) * 2) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=10, deadline=None, database=None)
@given(N=st.integers(0, 50), C=st.integers(1, 40), V=st.integers(1, 150), start=st.integers(0, 100))
def test_any_shape_agrees_with_plain(N, C, V, start):
    def draw(generator, dtype):
        x, weight = torch.randn(N, C, generator=generator), torch.randn(V, C, generator=generator)
        targets = torch.randint(0, V + 100, (N,), generator=generator)
        x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        return {"x": x, "weight": weight, "targets": targets, "vocab_start": start}

    check(Case("linear_cross_entropy", f"{N} {C} {V}", "any shape", draw), torch.float32, fused.linear_cross_entropy)


def test_the_cpu_form_holds_a_chunk_and_never_the_logits():
    """Peak memory of a process that takes the loss and its gradients at N = 1536, V = 30000: logits are 184 MB.

    Linux counts what started a process into its ru_maxrss; VmHWM is of the process alone.
    """
    program = (
        "import pathlib, re, resource, torch, sys\n"
        "def peak():\n"
        "    status = pathlib.Path('/proc/self/status')\n"
        "    if not status.exists():\n"
        "        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text()).group(1))\n"
        "from heiretsu.kernels import plain\n"
        "from heiretsu.kernels.cpu import linear_cross_entropy as ours\n"
        "ours._CHUNK_ELEMENTS = 1_000_000\n"
        "x, w = torch.randn(1536, 16, requires_grad=True), torch.randn(30000, 16, requires_grad=True)\n"
        "t = torch.randint(0, 30000, (1536,))\n"
        "op = (ours if sys.argv[1] == 'ours' else plain).linear_cross_entropy\n"
        "lse, target = op(x[:8], w, t[:8])\n"
        "(lse - target).mean().backward()\n"
        "before = peak()\n"
        "lse, target = op(x, w, t)\n"
        "(lse - target).mean().backward()\n"
        "print(peak() - before)\n"
    )
    ours, own = (
        int(subprocess.run([sys.executable, "-c", program, which], capture_output=True, text=True, check=True).stdout)
        * (1 if sys.platform == "darwin" else 1024)
        for which in ("ours", "plain")
    )
    logits = 1536 * 30000 * 4
    assert own > logits > 4 * ours, f"{ours / 2**20:.0f} MiB more against {own / 2**20:.0f} of plain"


@pytest.mark.triton
def test_the_triton_form_allocates_no_tensor_as_large_as_the_logits(monkeypatch):
    x, weight, targets = inputs(forms.TRITON_DEVICE, N=64, C=8, V=640)
    largest = 0
    new_empty = torch.Tensor.new_empty

    def recording(self, *size, **options):
        nonlocal largest
        out = new_empty(self, *size, **options)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", recording)
    torch.autograd.grad(triton_cross_entropy.linear_cross_entropy(x, weight, targets)[0].sum(), (x, weight))
    assert weight.numel() <= largest < 64 * 640 / 4


@pytest.mark.triton
@pytest.mark.parametrize("blocks", [dict(SPLIT_V=32), dict(BLOCK_N=16, BLOCK_C=32), dict(BUFFER_ELEMENTS=1 << 20)])
def test_any_blocks_give_the_same_results(blocks):
    values = inputs(forms.TRITON_DEVICE, V=200)
    ones = (torch.ones(40, device=values[0].device),) * 2
    op = triton_cross_entropy.linear_cross_entropy
    expected = [*op(*values), *torch.autograd.grad(op(*values), values[:2], ones)]
    with launch.override(**blocks):
        got = [*op(*values), *torch.autograd.grad(op(*values), values[:2], ones)]
    torch.testing.assert_close(got, expected)
