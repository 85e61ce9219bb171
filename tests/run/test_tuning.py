"""What --autotune measures are the calls that the model makes: seen by ops that write down what they are given."""

import inspect
import types
from collections import Counter

import pytest
import torch

from heiretsu.kernels import fused, plain
from heiretsu.kernels.recording import Call
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.pipeline import Microbatch
from heiretsu.run import tuning
from heiretsu.run.building import build_engine
from heiretsu.run.options import parse_args
from heiretsu.run.tuning import call_runs, distinct, record_calls, tune_kernels

OPS = ("attention", "bias_gelu", "dropout", "expert_mlp", "layer_norm", "linear_cross_entropy", "route")
SMALL = "--n_layer 2 --n_head 4 --n_embed 16 --block_size 8 --batch_size 3 --fused".split()
EXPERTS = "--num_experts 4 --moe_freq 2".split()
CPU = torch.device("cpu")


class WatchedOps(types.SimpleNamespace):
    """`fused`, and in `calls` the (op, arguments) of each call: see _look for a tensor."""

    def __init__(self):
        super().__init__(calls=set(), **{name: self._watched(name) for name in OPS})

    def _watched(self, name):
        op = getattr(fused, name)

        def watched(*args, **kwargs):
            given = inspect.signature(op).bind(*args, **kwargs)
            given.apply_defaults()
            for irrelevant in ("seed", "offset", "offsets"):
                given.arguments.pop(irrelevant, None)
            self.calls.add((name, *((key, _look(value)) for key, value in given.arguments.items())))
            return op(*args, **kwargs)

        return watched


def _look(value):
    if not isinstance(value, torch.Tensor):
        return value
    return tuple(value.shape), value.stride(), value.dtype, value.requires_grad


def built(mesh, flags, ops=fused):
    """The engine, and this rank's microbatches of a step."""
    config = parse_args(flags, world_size=mesh.world.size)
    ids = torch.arange(config.batch_size * config.model.block_size).view(config.batch_size, -1) % 250
    return build_engine(config, mesh, ops), [Microbatch(ids, ids) for _ in range(config.grad_accum_steps)]


def calls_of_the_model(mesh, flags):
    ops = WatchedOps()
    engine, batches = built(mesh, flags, ops)
    engine.step(batches)
    return ops.calls


def calls_recorded(mesh, flags):
    return record_calls(*built(mesh, flags))


def calls_measured(calls):
    ops = WatchedOps()
    for prepare in call_runs(calls, ops, CPU).values():
        prepare()()
    return ops.calls


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--amp", "bf16", "--dropout", "0.1"],
        [*EXPERTS, "--dropout", "0.1"],
        [*EXPERTS, "--amp", "bf16", "--grad_accum_steps", "2"],
        [*EXPERTS[:2], "--moe_freq", "1"],
    ],
    ids=" ".join,
)
def test_calls_are_those_of_a_step_of_the_model(more):
    measured = calls_measured(calls_recorded(abstract_mesh(), SMALL + more))
    assert measured == calls_of_the_model(abstract_mesh(), SMALL + more)


def test_calls_are_those_of_all_ranks_of_a_mesh(ranks):
    """The number of rows that reach an expert's rank depends on the router: the most are measured, once."""
    flags = [*SMALL, *EXPERTS, "--tp", "2", "--ep", "2", "--pp", "2", "--grad_accum_steps", "2", "--top_k", "1"]

    def without_rows(calls):
        def look(op, name, value):
            rows = op == "expert_mlp" and name in ("x", "experts", "gates")
            return (name, value[0][1:], *value[2:]) if rows else value

        return {(op, *(look(op, *argument) for argument in arguments)) for op, *arguments in calls}

    seen = set().union(*ranks(calls_of_the_model, flags, tp=2, ep=2, pp=2))
    recorded = ranks(calls_recorded, flags, tp=2, ep=2, pp=2)[0]
    measured = calls_measured(recorded)
    assert without_rows(measured) == without_rows(seen)
    rows = {dict(arguments)["x"][0][0] for op, *arguments in seen if op == "expert_mlp"}
    assert [dict(arguments)["x"][0][0] for op, *arguments in measured if op == "expert_mlp"] == [max(rows)]
    assert len(rows) > 1


def test_compiled_blocks_are_recorded_too():
    assert calls_recorded(abstract_mesh(), [*SMALL, "--compile"]) == calls_recorded(abstract_mesh(), SMALL)


def test_recording_changes_nothing_in_the_run():
    flags = [*SMALL, *EXPERTS, "--dropout", "0.1"]
    (engine, batches), (other, _) = built(abstract_mesh(), flags), built(abstract_mesh(), flags)
    record_calls(engine, batches)
    for name, param in engine.params.items():
        assert torch.equal(param, other.params[name])
    for _ in range(2):
        assert engine.step(batches).metrics["loss"] == other.step(batches).metrics["loss"]
    for name, param in engine.params.items():
        assert torch.equal(param, other.params[name])


def test_one_call_of_each_kind_is_kept_and_counted():
    """What differs in its seed, or in how many tokens an index is for, is one kind: its largest call."""

    def expert_mlp(rows, F=8):
        shapes = dict(x=(rows, 4), gates=(rows, 1), w1=(2, 4, F), b1=(2, F), w2=(2, F, 4), b2=(2, 4))
        floats = {name: torch.ones(shape) for name, shape in shapes.items()}
        return Call.of(plain.expert_mlp, (), floats | {"experts": torch.zeros(rows, 1, dtype=torch.int64)})

    def dropout(rows, seed):
        return Call.of(plain.dropout, (torch.ones(1, rows, 4), 0.1, seed), {})

    kept, times = distinct(
        [expert_mlp(5), expert_mlp(9), expert_mlp(0), expert_mlp(5, F=6), dropout(5, 1), dropout(5, 2)]
    )
    assert list(kept.values()) == [expert_mlp(9), expert_mlp(5, F=6), dropout(5, 1)] and [*times.values()] == [3, 1, 2]
    assert len(distinct([dropout(5, 1), dropout(6, 1)])[0]) == 2


def test_the_dearest_call_is_measured_first(monkeypatch):
    """By its elements times how often all ranks make it: 4 x 20, 1 x 60, 2 x 20."""
    bias = torch.ones(10)

    def accumulate(_):
        fused.bias_gelu(torch.ones(5, 10), bias)
        for _ in range(2):
            fused.dropout(torch.ones(1, 2, 10), 0.5, 1)
        for _ in range(4):
            fused.bias_gelu(bias, bias)

    def order():
        calls = record_calls(types.SimpleNamespace(mesh=abstract_mesh(), accumulate=accumulate), [])
        return [(call.op, call.elements) for call in calls]

    def gather(mine, axis):  # another rank makes 7 more of the second
        largest, times = mine
        return [mine, (largest, Counter({kind: 7 * kind.startswith("dropout") for kind in times}))]

    assert order() == [("bias_gelu", 20), ("bias_gelu", 60), ("dropout", 20)]
    monkeypatch.setattr(tuning, "gather_objects", gather)
    assert order() == [("dropout", 20), ("bias_gelu", 20), ("bias_gelu", 60)]


@pytest.mark.parametrize("world, rank", [(1, 0), (2, 0), (2, 1), (3, 0)])
def test_who_waits_for_rank_0_is_told_once_and_at_once(monkeypatch, world, rank):
    said, sent, tuned = [], [], []
    monkeypatch.setattr(tuning, "CONTROL", types.SimpleNamespace(chosen={}))
    monkeypatch.setattr(tuning, "record_calls", lambda engine, batches: [])
    tune = lambda runs, device: tuned.append((runs, device)) or {"entry": 1}  # noqa: E731
    monkeypatch.setattr(tuning, "autotune", types.SimpleNamespace(tune=tune), raising=False)
    monkeypatch.setattr(tuning, "print", lambda *what, **how: said.append((*what, how)), raising=False)

    def broadcast(chosen, src):
        sent.append((chosen[0], src))
        chosen[0] = {"entry": 1}

    monkeypatch.setattr(tuning.dist, "broadcast_object_list", broadcast)
    tune_kernels(types.SimpleNamespace(mesh=abstract_mesh(dp=world, rank=rank)), [])
    line = f"autotune: rank 0 measures for all {world} ranks, which wait for it"
    assert said == ([(line, {"flush": True})] if world > 1 and rank == 0 else [])
    assert tuned == [({}, CPU)] * (rank == 0) and sent == [(None if rank else {"entry": 1}, 0)] * (world > 1)
    assert tuning.CONTROL.chosen == {"entry": 1}


def test_each_call_gives_every_output_and_gradient_the_same_each_time():
    calls = calls_recorded(abstract_mesh(), [*SMALL, *EXPERTS, "--dropout", "0.1"])
    names = set()
    for name, prepare in call_runs(calls, plain, CPU).items():
        run = prepare()
        first, second = run(), run()
        names.add((name.split()[0], *(key.removeprefix("gradient of ") for key in first if key.startswith("gradient"))))
        for key, tensor in first.items():
            assert torch.isfinite(tensor).all() and torch.equal(tensor, second[key]), f"{name}: {key}"
    assert names == {
        ("attention", "q", "k", "v"),
        ("linear_cross_entropy", "x", "weight"),
        ("expert_mlp", "x", "gates", "w1", "b1", "w2", "b2"),
        ("route", "logits"),
        ("bias_gelu", "x", "bias"),
        ("layer_norm", "x", "weight", "bias"),
        ("layer_norm", "x", "weight", "bias", "residual"),
        ("dropout", "x"),
    }


ALL_OPS = {*OPS}


@pytest.mark.parametrize(
    "more, ops",
    [
        ("--amp bf16", ALL_OPS - {"route"}),
        ("--batch_size 4", ALL_OPS),
        ("--n_embed 32", ALL_OPS - {"route"}),
        ("--n_head 2", {"attention"}),
        ("--dropout 0.2", {"attention", "dropout"}),
        ("--top_k 1", {"expert_mlp", "route"}),
        ("--tokenizer gpt2", {"linear_cross_entropy"}),
    ],
)
def test_names_tell_apart_what_is_measured_apart(more, ops):
    """They are keys of the cache on disk."""
    flags = [*SMALL, *EXPERTS, "--dropout", "0.1"]
    here, there = (call_runs(calls_recorded(abstract_mesh(), f), fused, CPU) for f in (flags, [*flags, *more.split()]))
    assert {name.split()[0] for name in here.keys() - there.keys()} == ops


def test_what_is_measured_lies_on_its_device_whatever_the_default_is():
    calls = calls_recorded(abstract_mesh(), [*SMALL, *EXPERTS, "--dropout", "0.1"])
    with torch.device("meta"):
        for name, make in call_runs(calls, plain, CPU).items():
            assert {tensor.device.type for tensor in make()().values()} == {"cpu"}, name
