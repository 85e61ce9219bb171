"""attention and attention_lse beyond parity: layout, memory, shards, tracing, derivatives, and what they refuse."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from heiretsu.kernels import fused, plain
from heiretsu.kernels.cpu import attention as cpu_attention
from heiretsu.kernels.cpu.random import BlockPhilox
from heiretsu.kernels.random import philox
from heiretsu.kernels.recording import recording
from tests.kernels import forms

if forms.HAS_TRITON:
    from heiretsu.kernels.gpu import attention as triton_attention
    from heiretsu.kernels.gpu import launch

FORMS = [
    pytest.param("cpu", id="cpu-form"),
    pytest.param("triton", id="triton", marks=pytest.mark.triton),
]
each_form = pytest.mark.parametrize("form", FORMS)
few_examples = settings(max_examples=10, deadline=None, database=None)


def functions(form):
    """attention_lse of the form, its two custom ops, and the device of its tensors."""
    if form == "cpu":
        return cpu_attention.attention_lse, cpu_attention._attention, cpu_attention._attention_backward, "cpu"
    ops = triton_attention._attention, triton_attention._attention_backward
    return triton_attention.attention_lse, *ops, forms.TRITON_DEVICE


def qkv(B=1, H=2, Hkv=2, T=5, S=5, D=3, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, D)
    return [torch.randn(s, generator=generator, dtype=dtype).to(device).requires_grad_() for s in shapes]


@each_form
def test_output_is_laid_out_for_the_next_projection(form):
    attention_lse, *_, device = functions(form)
    out, _ = attention_lse(*qkv(B=2, H=3, Hkv=3, T=4, D=8, device=device))
    assert out.transpose(1, 2).reshape(2, 4, 24).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("T, direct", [(1, True), (256, True), (257, False), (0, False)])
def test_short_16_bit_sequences_go_to_torch_as_they_are(T, direct):
    """Which every mode of torch knows; what torch cannot take, or not exactly, goes through our operator."""
    q, k, v = qkv(T=T, S=T, dtype=torch.bfloat16)
    with patch.object(cpu_attention, "_outputs", return_value=("through the operator",)) as ours:
        out = cpu_attention.attention(q, k, v)
    assert ours.called != direct and (out == "through the operator" if not direct else out.shape == q.shape)


def test_the_mask_of_dropout_is_a_byte_an_element():
    *_, keep = cpu_attention._attention(*qkv(), True, 0.3, 0.4, 7, 0, 0)
    assert keep.dtype == torch.bool and keep.shape == (1, 2, 5, 5)
    assert cpu_attention._attention(*qkv(), True, 0.3, 0.0, 7, 0, 0)[2].shape == (0,)


@pytest.mark.parametrize("B, T, S", [(1, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_the_smallest_tensors_are_no_special_case(B, T, S):
    """One number each, or none."""
    for causal, dropout_p in ((True, 0.0), (False, 0.0), (True, 0.5), (False, 0.5)):
        q, k, v = qkv(B=B, H=1, Hkv=1, T=T, S=S, D=1, dtype=torch.float64)
        found = []
        for form in (cpu_attention.attention_lse, plain.attention_lse):
            out, lse = form(q, k, v, causal=causal, dropout_p=dropout_p, seed=5)
            total = out.sum() + torch.where(lse.isinf(), 0.0, lse).sum()
            found.append([out, lse, *torch.autograd.grad(total, (q, k, v))])
        torch.testing.assert_close(*found)


def test_a_block_of_dropout_has_sixteen_queries_of_however_many_keys():
    """More scores than a block has otherwise; and drawn for a block more than those."""
    q, k, v = qkv(H=1, Hkv=1, T=17, S=5000)
    options = dict(dropout_p=0.5, seed=7)
    torch.testing.assert_close(
        cpu_attention.attention(q, k, v, **options), plain.attention(q, k, v, **options), rtol=1e-4, atol=1e-5
    )
    assert [rows for *_, rows, _ in cpu_attention._blocks(q, k, True)] == [slice(0, 16), slice(16, 17)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("turned", range(4))
def test_elements_that_are_no_neighbours_give_the_same_bits(turned, dropout_p):
    """q, k, v or the gradient of out, column by column in memory: ATen would read it as if it were row by row."""
    inputs = [t.detach() for t in [*qkv(B=2, T=6, S=6, D=4), torch.randn(2, 2, 6, 4)]]

    def run(q, k, v, dout):
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out, lse = cpu_attention.attention_lse(*leaves, dropout_p=dropout_p, seed=3)
        return [out, lse, *torch.autograd.grad(out, leaves, dout)]

    want = run(*(t.clone() for t in inputs))
    inputs[turned] = inputs[turned].mT.contiguous().mT
    assert inputs[turned].stride()[-2:] == (1, 6)
    assert all(map(torch.equal, run(*inputs), want))


@each_form
def test_a_shard_of_batch_and_heads_draws_the_mask_of_the_whole(form):
    attention_lse, *_, device = functions(form)
    q, k, v = qkv(B=3, H=4, Hkv=4, T=20, S=20, D=8, device=device)
    dropout = dict(dropout_p=0.4, seed=11)
    whole, _ = attention_lse(q, k, v, **dropout)
    shard, _ = attention_lse(*(t[1:, 2:] for t in (q, k, v)), **dropout, offsets=(1, 2))
    assert torch.equal(shard, whole[1:, 2:])
    other, _ = attention_lse(*(t[1:, 2:] for t in (q, k, v)), **dropout, offsets=(1, 1))
    assert not torch.equal(other, whole[1:, 2:])


@each_form
def test_nothing_of_the_size_of_the_scores_is_saved(form):
    attention_lse, *_, device = functions(form)
    q, k, v = qkv(T=150, S=150, D=4, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attention_lse(q, k, v)
    assert saved
    assert sum(t.numel() for t in saved) < 6 * q.numel() < 150 * 150  # q, k, v, out and lse


@each_form
def test_the_same_bits_twice(form):
    attention_lse, *_, device = functions(form)
    inputs = qkv(H=4, Hkv=2, T=70, S=70, D=16, device=device)
    first, second = ([out := attention_lse(*inputs)[0], *torch.autograd.grad(out.square().sum(), inputs)] for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_form
def test_gradients_are_those_of_finite_differences(form):
    if form == "triton" and forms.TRITON_DEVICE == "cuda":
        pytest.skip("float64 kernels run in the interpreter only")
    attention_lse, *_, device = functions(form)

    def finite(q, k, v):
        out, lse = attention_lse(q, k, v, dropout_p=0.3, seed=5)
        return out, torch.where(lse == -math.inf, 0.0, lse)  # one query more than keys: it sees nothing

    inputs = qkv(H=2, Hkv=1, T=4, S=3, D=2, device=device, dtype=torch.float64)
    assert torch.autograd.gradcheck(finite, inputs, fast_mode=True)


def gradients(attention_lse, inputs, dtype, cotangents, **options):
    """dq, dk, dv of (out, lse) for these cotangents, computed in `dtype`; as float64 on the CPU."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    outputs = attention_lse(*leaves, **options)
    total = sum((o * c.to(o)).sum() for o, c in zip(outputs, cotangents, strict=False))
    return [g.double().cpu() for g in torch.autograd.grad(total, leaves)]


@each_form
@pytest.mark.parametrize("size", [1e4, 1e15])
@pytest.mark.parametrize(
    ("H", "Hkv", "T", "S", "D", "causal", "every"),
    [(1, 1, 1, 1, 16, True, 1), (2, 1, 6, 1, 16, False, 1), (2, 1, 30, 3, 16, False, 1), (2, 2, 70, 70, 16, True, 1),
     (2, 1, 40, 70, 20, True, 1), (2, 2, 70, 40, 16, True, 1), (1, 1, 40, 70, 64, False, 3),
     (2, 2, 70, 70, 16, True, 3)],
)  # fmt: skip
def test_rows_that_one_key_takes_are_as_exact_as_plains(form, size, H, Hkv, T, S, D, causal, every):
    """Where p is 1 and zeros, ds is 0: rounding noise in it, times scores of 1e15, was a dk of 1e8."""
    attention_lse, *_, device = functions(form)
    q, k, v = (t.detach() for t in qkv(1, H, Hkv, T, S, D, device))
    q[:, :, ::every] *= size
    generator = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(shape, generator=generator) for shape in (q.shape, q.shape[:3]))
    dlse[:, :, : max(0, T - S) if causal else 0] = 0.0  # of queries that see nothing
    for cotangents in ([dout], [dout, dlse]):
        want, theirs = (
            gradients(plain.attention_lse, [q, k, v], dtype, cotangents, causal=causal)
            for dtype in (torch.float64, torch.float32)
        )
        ours = gradients(attention_lse, [q, k, v], torch.float32, cotangents, causal=causal)
        for name, got, plains, exact in zip("qkv", ours, theirs, want, strict=True):
            # 1e-20 and less is of a p of e^-50, whose exponent float32 rounds by more than a thousandth.
            allowed = 4 * (plains - exact).abs().max() + 1e-6 * exact.abs().max() + 1e-20
            assert (got - exact).abs().max() <= allowed, f"d{name}: {(got - exact).abs().max()}, not {allowed}"


@pytest.mark.parametrize("causal, T, S, row", [(False, 8, 8, 0), (True, 8, 11, 0), (True, 8, 8, 1)])
def test_a_row_that_one_key_takes_by_the_others_distance_is_as_exact_as_plains(causal, T, S, row):
    """The score of that key is 0, and so is lse; those of the others are -1e6."""
    q, k, v = (t.detach() for t in qkv(H=32, Hkv=32, T=T, S=S, D=16))
    q[:, :, row] = 0.0
    q[:, :, row, 0], k[..., 0], k[:, :, 0, 0] = -1e6, 1.0, 0.0
    dout = [torch.randn(q.shape, generator=torch.Generator().manual_seed(1))]
    want, theirs = (
        gradients(plain.attention_lse, [q, k, v], dtype, dout, causal=causal)
        for dtype in (torch.float64, torch.float32)
    )
    ours = gradients(cpu_attention.attention_lse, [q, k, v], torch.float32, dout, causal=causal)
    for name, got, plains, exact in zip("qkv", ours, theirs, want, strict=True):
        allowed = 4 * (plains - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (got - exact).abs().max() <= allowed, f"d{name}: {(got - exact).abs().max()}, not {allowed}"


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv", "kv"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_any_gradients_alone(wanted, dropout_p):
    inputs = {name: t.detach() for name, t in zip("qkv", qkv(H=4, T=6, S=6, dtype=torch.float64), strict=True)}
    leaves = [inputs[name].requires_grad_() for name in wanted]
    got, want = (
        torch.autograd.grad(form(**inputs, dropout_p=dropout_p, seed=3).square().sum(), leaves)
        for form in (cpu_attention.attention, plain.attention)
    )
    torch.testing.assert_close(got, want)


def test_gradients_of_heads_that_share_a_key_are_not_added_up_in_16_bits():
    q, k, v = qkv(H=16, Hkv=1, T=64, S=64, D=16, dtype=torch.bfloat16)
    dout = [torch.randn(q.shape, generator=torch.Generator().manual_seed(1))]
    ours, theirs, exact = (
        gradients(form, [q, k, v], dtype, dout, dropout_p=0.3, seed=3)
        for form, dtype in ((cpu_attention.attention_lse, torch.bfloat16), (plain.attention_lse, torch.bfloat16),
                            (plain.attention_lse, torch.float64))
    )  # fmt: skip
    for got, plains, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).abs().max() < 1.3 * (plains - want).abs().max()


@each_form
@pytest.mark.parametrize("rest", [5e-6, 3e-8])
def test_a_row_that_one_key_nearly_takes_keeps_its_gradients(form, rest):
    """p of 1 - rest, 1 in float32 beside a score of 200: its ds are the sizes of `rest`, and cannot be left out."""
    attention_lse, *_, device = functions(form)
    q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 9, 16)
    q[..., 0] = q[..., 1] = 200.0
    k[..., 3, 0] = 1.0
    k[..., 5, 1] = 1.0 + math.log(rest) / 200.0
    v, dout = (torch.randn(1, 1, n, 16, generator=torch.Generator().manual_seed(n)) for n in (9, 1))
    v[..., 3, :] *= 0.1  # dp of the key that takes all: its ulps are the noise of ds
    inputs, options = [t.to(device) for t in (q, k, v)], dict(causal=False, scale=1.0)
    (dq, dk, _), (want_q, want_k, _) = (
        gradients(f, inputs, dtype, [dout], **options)
        for f, dtype in ((attention_lse, torch.float32), (plain.attention_lse, torch.float64))
    )
    noise = 2 * torch.finfo(torch.float32).eps * (dout.abs() @ v[0, 0, 3].abs()).item()
    for axis, key in enumerate((3, 5)):
        allowed = 1e-3 * want_k[0, 0, key, 0].abs() + 200 * noise * (key == 3)
        assert (dk[0, 0, key, 0] - want_k[0, 0, key, 0]).abs() <= allowed
        allowed = 1e-3 * want_q[0, 0, 0, axis].abs() + noise * (key == 3)
        assert (dq[0, 0, 0, axis] - want_q[0, 0, 0, axis]).abs() <= allowed
    assert noise < want_q[0, 0, 0, 0].abs() / 2 or rest < 1e-6


@each_form
def test_a_second_derivative_is_an_error(form):
    attention_lse, *_, device = functions(form)
    q, k, v = qkv(device=device)
    (dq,) = torch.autograd.grad(attention_lse(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        dq.sum().backward()


@each_form
def test_compiles_without_a_graph_break_and_once_for_all_seeds(form):
    attention_lse, *_, device = functions(form)

    def block(q, k, v, seed):
        out, lse = attention_lse(q * 2, k, v, dropout_p=0.3, seed=seed)
        return out.transpose(1, 2).flatten(2) + lse.sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    inputs = qkv(H=4, Hkv=2, T=9, S=12, D=8, device=device)
    for seed in (11, 12, 2**40, 2**62 + 1):
        out, expected = compiled(*inputs, seed), block(*inputs, seed)
        assert torch.equal(out, expected)
        gradients = (torch.autograd.grad(o.square().sum(), inputs) for o in (out, expected))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert counter.frame_count <= 2  # the first seed as a constant, the second as a variable


@each_form
@few_examples
@given(
    B=st.integers(1, 2), group=st.integers(1, 3), Hkv=st.integers(1, 2), T=st.integers(0, 70), S=st.integers(0, 70),
    D=st.integers(1, 33), causal=st.booleans(), dropout_p=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_any_shape_agrees_with_plain(form, B, group, Hkv, T, S, D, causal, dropout_p, seed):
    attention_lse, *_, device = functions(form)
    dtype = torch.float32 if device == "cuda" else torch.float64
    q, k, v = qkv(B, group * Hkv, Hkv, T, S, D, device, dtype)
    options = dict(causal=causal, dropout_p=dropout_p, seed=seed, offsets=(1, 2))
    for ours, want in zip(attention_lse(q, k, v, **options), plain.attention_lse(q, k, v, **options), strict=True):
        torch.testing.assert_close(ours, want)  # tolerances of the dtype: parity.py has the sharp rule


@pytest.mark.parametrize("causal", [True, False])
def test_the_cpu_form_of_a_model_is_differentiable_through_views(causal):
    """The path of training: ATen's flash kernels on views of the projection, and an expanded gradient."""
    projection = torch.randn(2, 9, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    gradients = []
    for attention in (fused.attention, plain.attention):
        q, k, v = projection.permute(2, 0, 3, 1, 4)
        gradients.append(torch.autograd.grad(attention(q, k, v, causal=causal).sum(), projection)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "dtype, Hkv, T, lse, adds",
    [
        (torch.float32, 2, 6, False, False), (torch.float64, 2, 5, False, False), (torch.float32, 2, 6, True, True),
        (torch.bfloat16, 2, 6, False, True), (torch.float32, 1, 6, False, True), (torch.float32, 2, 7, False, True),
    ],
)  # fmt: skip
def test_what_comes_in_one_piece_is_not_added_to_zeros(dtype, Hkv, T, lse, adds):
    """Of each of q, k and v; and what nobody needs is not given, either way."""
    q, k, v = (t.detach() for t in qkv(H=2, Hkv=Hkv, T=T, S=6, dtype=dtype))
    out, lse_, keep = cpu_attention._attention(q, k, v, True, 0.5, 0.0, 0, 0, 0)
    given = (torch.ones_like(out), torch.zeros_like(lse_) if lse else None, q, k, v, out, lse_, keep, True, 0.5, 0.0)
    with patch.object(cpu_attention, "_groups", wraps=cpu_attention._groups) as groups:
        for dq, dkdv in ((True, True), (True, False), (False, True)):
            found = cpu_attention._attention_backward(*given, dq, dkdv)
            assert [t.numel() for t in found] == [dq * q.numel(), dkdv * k.numel(), dkdv * v.numel()]
            assert {t.dtype for t in found} == {dtype}
    assert groups.called == adds


@pytest.mark.parametrize("T, S, share", [(16, 4000, 0.7), (4000, 16, 0.95)])
def test_gradients_of_few_queries_or_few_keys_are_not_added_up_in_16_bits(T, S, share):
    """dq has a part of every block of keys, dk and dv of queries: ATen's, in bfloat16, are further off than plain's."""
    q, k, v = qkv(B=1, H=2, Hkv=2, T=T, S=S, D=32, dtype=torch.bfloat16)
    dout = [torch.randn(q.shape, generator=torch.Generator().manual_seed(1))]
    exact = gradients(plain.attention_lse, [q, k, v], torch.float64, dout, causal=False)
    theirs = gradients(plain.attention_lse, [q, k, v], torch.bfloat16, dout, causal=False)
    ours = gradients(cpu_attention.attention_lse, [q, k, v], torch.bfloat16, dout, causal=False)
    for got, plains, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).abs().max() < share * (plains - want).abs().max()


@pytest.mark.parametrize("options", [dict(scale=0.6), dict(causal=False, scale=0.6), dict(), dict(scale=0.0)])
def test_every_path_of_the_cpu_form_takes_the_scale(options):
    """scaled_dot_product_attention where it may be, our operator where not: more keys, dropout."""
    q, k, v = qkv(B=2, T=7, S=7, D=8, dtype=torch.float64)
    more = [torch.cat([t, t.flip(2)[:, :, :3]], 2) for t in (k, v)]
    for values, dropout in (((q, k, v), {}), ((q, *more), {}), ((q, k, v), dict(dropout_p=0.3, seed=3))):
        got, expected = (f(*values, **options, **dropout) for f in (cpu_attention.attention, plain.attention))
        torch.testing.assert_close(got, expected)
        gradients = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (got, expected))
        torch.testing.assert_close(*gradients)
    narrow = [t.bfloat16() for t in (q, k, v)]  # short ones of 16 bits take scaled_dot_product_attention
    got, expected = (f(*narrow, **options) for f in (cpu_attention.attention, plain.attention))
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


@given(
    seed=st.integers(-(2**63), 2**64), rows=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
    columns=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5), head=st.integers(0, 2**33),
    batch=st.integers(0, 2**33),
)  # fmt: skip
@settings(max_examples=50, deadline=None, database=None)
def test_block_philox_draws_the_bits_of_philox(seed, rows, columns, head, batch):
    rows, columns = torch.tensor(rows), torch.tensor(columns)
    bits = BlockPhilox(25).draw(seed, rows, columns, head, batch)
    want = philox(seed, columns[None, :], rows[:, None], torch.tensor(head), torch.tensor(batch))
    assert torch.equal(bits, want.expand_as(bits))


@pytest.mark.skipif(not forms.HAS_TRITON or forms.INTERPRETED, reason="the interpreter takes CPU tensors")
def test_the_triton_form_says_what_to_do_with_cpu_tensors():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1.*fused.attention"):
        triton_attention.attention(*qkv())


@pytest.mark.skipif(not forms.HAS_TRITON, reason="the launch table is Triton's")
@pytest.mark.parametrize("arch", ["ampere", "hopper", "blackwell", "cdna3", "interpreter"])
def test_every_head_dim_has_launch_parameters(arch):
    for kernel in ("attention_forward", "attention_delta", "attention_dkdv", "attention_dq"):
        for D in (1, 64, 65, 256):
            for itemsize in (2, 4):
                entry = launch.tiles_named(kernel).find(arch, D, itemsize)
                assert {"BLOCK_M", "num_warps", "num_stages"} <= entry.parameters.keys()


@pytest.mark.triton
def test_launches_with_dropout_ask_for_its_entries(monkeypatch):
    device = torch.device(forms.TRITON_DEVICE)
    kernels = ("attention_forward", "attention_dkdv", "attention_dq")
    for kernel in kernels:
        rows = launch.tiles_named(kernel).rows
        monkeypatch.setitem(rows, f"{kernel}/dropout", rows[kernel])
    for dropout_p, suffix in ((0.0, ""), (0.1, "/dropout")):
        with recording() as record:
            triton_attention.attention(*qkv(device=device, dtype=torch.float16), dropout_p=dropout_p).sum().backward()
        assert {entry.row for entry in record.entries} == {"attention_delta", *(kernel + suffix for kernel in kernels)}
