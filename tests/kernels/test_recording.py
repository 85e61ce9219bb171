"""What a recording writes down: calls, from which their inputs are made again, and launches, as Triton sees them."""

import copy
import pickle
import threading
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from heiretsu.kernels import fused, plain
from heiretsu.kernels.control import CONTROL
from heiretsu.kernels.recording import Call, Launch, Look, recording
from tests.kernels import forms
from tests.kernels.samples import SAMPLES, outputs, tensors

CPU = torch.device("cpu")
each_sample = pytest.mark.parametrize("sample", SAMPLES)


def run(op, values, form=None):
    """The op on the values, forward and backward; form: that of `fused` unless given."""
    out = outputs((form or getattr(fused, op))(**values))
    torch.autograd.grad([o.sum() for o in out], list(tensors(values).values()), allow_unused=True)


@each_sample
def test_a_call_made_again_looks_like_the_first(sample):
    op, build = SAMPLES[sample]
    with recording() as first:
        run(op, build(7))
    (call,) = first.calls
    again = pickle.loads(pickle.dumps(call)).inputs(CPU, torch.Generator().manual_seed(0))
    with recording() as second:
        run(op, again)
    assert second.calls == first.calls and str(second.calls[0]) == str(call) and hash(call) == hash(second.calls[0])
    assert call.op == op and call.elements == sum(t.numel() for t in build(7).values() if isinstance(t, torch.Tensor))


def test_strides_alignment_sizes_and_indices_are_made_again():
    x = (torch.randn(3, 4, 40, dtype=torch.float64) * 100)[:, 1, 5:38]
    indices = torch.arange(20)[3:15:2].expand(2, 6)
    call = Call.of(lambda x, indices, bias, scale=1.0: None, (x, indices), {"bias": None, "scale": 2.0})
    made = call.inputs(CPU, torch.Generator().manual_seed(0))
    assert made["x"].stride() == x.stride() and made["x"].storage_offset() == x.storage_offset() % 2 == 1
    assert 70 < made["x"].std() < 130 and made["x"].dtype == torch.float64 and not made["x"].requires_grad
    assert torch.equal(made["indices"], indices) and made["indices"].stride() == (0, 2)
    assert made["bias"] is None and made["scale"] == 2.0
    again = call.inputs(CPU, torch.Generator().manual_seed(0))["x"]
    assert torch.equal(again, made["x"])
    reach = 1 + 2 * 160 + 32  # from the first element to the last
    assert made["x"].untyped_storage().nbytes() == (made["x"].storage_offset() + reach) * 8
    with torch.device("meta"):  # whatever the default is, inputs are made where they are asked for
        assert torch.equal(call.inputs(CPU, torch.Generator().manual_seed(0))["x"], made["x"])


def test_a_look_has_the_root_mean_square_of_finite_numbers():
    for numbers, size in (
        (torch.tensor([3.0]), 3.0),
        (torch.tensor([3.0, -4.0, 0.0, 0.0]), 2.5),
        (torch.full((100,), 30_000.0).half(), 30_000.0),  # their norm is no number of 16 bits
        (torch.tensor([1.0, torch.inf]), 1.0),
        (torch.tensor([5.0, torch.nan]), 1.0),
        (torch.empty(0, 3), 0.0),
    ):
        assert Look.of(numbers).size == pytest.approx(size, rel=1e-6)


def test_a_look_is_of_what_launches_and_not_of_the_numbers():
    """Which elements an index names is no look, either; and without gradients, none is wanted of a parameter."""
    one, other = (Look.of(torch.tensor(numbers)) for numbers in ([1, 2], [3, 4]))
    assert one == other and hash(one) == hash(other) and one.values != other.values
    leaf = torch.ones(2, requires_grad=True)
    assert Look.of(leaf) == Look.of(leaf * 2)
    with torch.no_grad():
        assert not Look.of(leaf).requires_grad


@pytest.mark.parametrize(
    "change",
    [
        dict(q=lambda t: t.bfloat16(), k=lambda t: t.bfloat16(), v=lambda t: t.bfloat16()),
        dict(q=lambda t: t[:, :, 1:]),
        dict(v=lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
        dict(k=lambda t: t.detach()),
        dict(q=lambda t: torch.cat([t, t[..., :1]], -1)[..., 1:]),
        dict(dropout_p=lambda p: 0.2),
        dict(causal=lambda _: False),
    ],
)
def test_calls_that_launch_otherwise_have_other_words(change):
    values = {"causal": True, **SAMPLES["attention, dropout"][1](7)}
    other = values | {name: edit(values[name]) for name, edit in change.items()}
    first, second = (Call.of(plain.attention, (), v) for v in (values, other))
    assert first != second and str(first) != str(second)


def test_words_do_not_tell_what_is_drawn_or_left_at_its_default():
    values = SAMPLES["dropout"][1](7)
    assert str(Call.of(plain.dropout, (), values)) == "dropout x 2x7x24 float32, p 0.3"
    x, weight, bias = torch.zeros(4, 16), torch.ones(8), torch.ones(8)
    told = Call.of(plain.layer_norm, (x[:, 8:].bfloat16(), weight, bias), {"eps": 1e-5, "residual": None})
    assert str(told) == "layer_norm x 4x8 bfloat16 frozen, weight bias 8 float32 frozen"
    x, weight, targets = torch.zeros(4, 16), torch.zeros(9, 16), torch.arange(4)
    words = "linear_cross_entropy x 4x16 float32 frozen, weight 9x16 float32 frozen, targets 4 int64"
    assert str(Call.of(plain.linear_cross_entropy, (x, weight, targets, 3), {})) == words
    assert "offsets" not in str(Call.of(plain.attention, (), SAMPLES["attention, dropout"][1](7)))
    assert "values" not in repr(Call.of(plain.linear_cross_entropy, (x, x, torch.arange(4)), {}))
    assert "strides 16x1 from 2" in str(Call.of(plain.layer_norm, (x[:, 2:10], weight, bias), {}))


def test_what_was_written_down_cannot_be_changed():
    made = Launch(None, None, (1,), {}, {}, 4, 1)
    call = Call.of(plain.route, (torch.zeros(2, 3), 1), {})
    for record, name in ((made, "grid"), (call, "op"), (call.looks["logits"], "dtype")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, None)


def test_recordings_nest_and_end():
    values = SAMPLES["bias_gelu"][1](3)
    with recording() as outer:
        with recording() as inner:
            run("bias_gelu", values)
        run("bias_gelu", values)
    run("bias_gelu", values)
    with recording() as whole:
        with recording():
            pass
        run("bias_gelu", values)
    assert len(whole.calls) == 1
    assert len(outer.calls) == 2 and len(inner.calls) == 1
    with pytest.raises(ValueError), recording() as failed:
        fused.bias_gelu(None, None)
    with pytest.raises(ValueError, match="arch is 'sm_90'; it must be one of ampere, hopper"), recording(arch="sm_90"):
        pytest.fail("there is no such class")
    assert failed.calls == [] and CONTROL.records == [] and CONTROL.arch is None


def test_recording_compiles_no_graph_anew():
    values = SAMPLES["bias_gelu"][1](3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, bias: fused.bias_gelu(x, bias), backend=counter, fullgraph=True)
    compiled(**values)
    with recording() as record:
        compiled(**values)
    assert counter.frame_count == 1 and record.calls == []


if forms.HAS_TRITON and not forms.INTERPRETED:
    import triton
    from triton.runtime.jit import JITFunction

    from heiretsu.kernels.gpu import bias_gelu, launch
    from heiretsu.offgpu.emulator import installed

    @pytest.mark.parametrize("arch", launch.GPUS)
    @each_sample
    def test_launches_for_a_gpu_are_written_down_and_not_made(sample, arch):
        op, build = SAMPLES[sample]
        with recording(arch=arch) as record:
            run(op, build(7))
        assert len(record.calls) == 1 and len(record.launches) >= 2
        for made in record.launches:
            assert made.entry.arch == arch and made.entry.parameters.items() >= {"num_warps": made.num_warps}.items()
            constants = {n: v for n, v in made.entry.parameters.items() if n.isupper() and n != "BUFFER_ELEMENTS"}
            assert constants.items() <= made.constexprs.items()
            assert {*made.signature, *made.constexprs} == {*made.kernel.arg_names}

    @pytest.mark.parametrize(
        "sample", ["attention_lse, dropout", "bias_gelu", "expert_mlp, no biases", "layer_norm, residual"]
    )
    def test_a_launch_is_written_down_as_triton_specialises_it(monkeypatch, sample):
        """Triton's own binder, of a driver that emulates an H100, is the reference; nothing is compiled."""
        specialised = []
        monkeypatch.setattr(
            JITFunction, "run", lambda kernel, *args, **options: specialised.append(bound(kernel, args, options))
        )
        op, build = SAMPLES[sample]
        values = build(16)
        if sample == "bias_gelu":  # from 4 bytes behind an aligned address, rows 25 apart
            values["x"] = torch.zeros(2, 16, 25)[..., 1:].detach().requires_grad_()
        with installed(target=90), recording() as record:
            run(op, values, forms.triton_form(op))
        assert specialised == [
            (r.kernel, r.signature, r.constexprs, r.num_warps, r.num_stages) for r in record.launches
        ]

    def bound(kernel, args, options):
        """What JITFunction.run makes of a launch, before it compiles."""
        options = {name: value for name, value in options.items() if name not in ("grid", "warmup")}
        *_, backend, binder = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
        options, kinds, constexprs, attributes = kernel._pack_args(backend, options, *binder(*args, **options))
        for (position,), found in attributes.items():
            if ["tt.divisibility", 16] in found:
                kinds[kernel.arg_names[position]] += ":16"
        kinds = {name: kind for name, kind in kinds.items() if kind != "constexpr"}
        constants = {kernel.arg_names[position]: value for (position,), value in constexprs.items()}
        return kernel, kinds, constants, options.num_warps, options.num_stages

    def test_launches_of_any_thread_are_seen():
        values = copy.deepcopy(SAMPLES["dropout"][1](7))
        with recording(arch="hopper") as record:
            thread = threading.Thread(target=run, args=("dropout", values))
            thread.start()
            thread.join()
        assert [made.entry.row for made in record.launches] == ["dropout", "dropout"]

    def test_every_entry_is_found_once_and_pickles_to_itself():
        for arch in (*launch.GPUS, "interpreter"):
            entries = launch.every_entry(arch)
            assert len({*entries}) == len(entries) > 20
            for entry in pickle.loads(pickle.dumps(entries)):
                assert entry.tiles is launch.tiles_named(entry.tiles.name) and entry in entries

    def test_two_tiles_of_one_name_are_refused(monkeypatch):
        monkeypatch.setattr(bias_gelu, "TWIN", launch.Tiles("dropout", {}), raising=False)
        with pytest.raises(ValueError, match="two tiles are named dropout"):
            launch.all_tiles()
