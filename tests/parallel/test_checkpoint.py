"""A checkpoint continues the run: bit for bit on the same mesh, to 1e-9 on any other, and never half of it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.model.config import ModelConfig
from heiretsu.parallel import checkpoint
from heiretsu.parallel.checkpoint_folder import complete
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import state
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from heiretsu.run.saving import Saver
from tests.training import DENSE, MIXTURE, Trace, dataset, failures, pieces, run_config, single_process

BEFORE, AFTER, TOLERANCE = 3, 3, 1e-9
MESHES = {"one": {}, "dp2xtp2": {"dp": 2, "tp": 2}, "pp2xep2": {"pp": 2, "ep": 2}, "tp4": {"tp": 4}}


def steps(mesh, config, first, stop, folder, load=False, save_after=None):
    """Run steps first..stop-1, from a checkpoint if `load`; one is written behind the steps that follow save_after."""
    engine = build_engine(config, mesh, plain)
    as_json = json.loads(config.to_json())
    if load:
        assert state.load(complete(folder)[-1], engine, as_json) == first
    data = dataset(config.model.vocab_size, config.model.block_size)
    trace = Trace()
    said: list[str] = []
    saver = Saver(replace(config, checkpoint_dir=str(folder)), engine, {"run_id": "a"}, said.append)
    engine.note = saver.note
    for step in range(first, stop):
        report = engine.step(read_batches(config, mesh, data, step))
        trace.losses.append(report.metrics["loss"])
        trace.grad_norms.append(report.grad_norm)
        saver.after(report)
        if step + 1 == save_after:
            saver.begin(save_after)
    saver.close()
    assert said == ([] if save_after is None else [f"saved {folder}/step_{save_after:08d}"])
    trace.params = pieces(engine, {name: param.detach() for name, param in engine.params.items()})
    return trace


def config_on(mesh: dict):
    return run_config(MIXTURE, microbatches=2, **mesh)


@pytest.fixture(scope="module")
def whole():
    """The run that was never interrupted, on one process."""
    return single_process(config_on({}), BEFORE + AFTER)


@pytest.mark.parametrize(
    "saved_on, resumed_on",
    [("dp2xtp2", "pp2xep2"), ("pp2xep2", "one"), ("one", "tp4"), ("tp4", "dp2xtp2")],
)
def test_a_run_saved_on_one_mesh_goes_on_on_another(ranks, tmp_path, whole, saved_on, resumed_on):
    ranks(steps, config_on(MESHES[saved_on]), 0, BEFORE + 1, tmp_path, save_after=BEFORE, **MESHES[saved_on])
    config = config_on(MESHES[resumed_on])
    traces = ranks(steps, config, BEFORE, BEFORE + AFTER, tmp_path, load=True, **MESHES[resumed_on])
    expected = Trace(losses=whole.losses[BEFORE:], grad_norms=whole.grad_norms[BEFORE:], params=whole.params)
    assert failures(traces, expected, TOLERANCE) == {}


@pytest.mark.parametrize("mesh", ["one", "dp2xtp2", "pp2xep2"])
def test_resuming_on_the_same_mesh_changes_no_bit(ranks, tmp_path, mesh):
    config, sizes = config_on(MESHES[mesh]), MESHES[mesh]
    straight = ranks(steps, config, 0, BEFORE + AFTER, tmp_path, save_after=BEFORE, **sizes)
    resumed = ranks(steps, config, BEFORE, BEFORE + AFTER, tmp_path, load=True, **sizes)
    for ours, theirs in zip(resumed, straight, strict=True):
        assert ours.losses == theirs.losses[BEFORE:]
        for name, (_, _, values) in theirs.params.items():
            assert (ours.params[name][2] == values).all(), name


def saved(tmp_path, step=1, keep=9):
    config = config_on({})
    engine = build_engine(config, abstract_mesh(), plain)
    engine.step(read_batches(config, abstract_mesh(), dataset(67, 8), 0))
    return engine, config, state.save(tmp_path, step, engine, json.loads(config.to_json()), keep)


def test_a_checkpoint_from_before_the_first_step_can_be_resumed(tmp_path):
    config = config_on({})
    as_json = json.loads(config.to_json())
    engine = build_engine(config, abstract_mesh(), plain)
    path = state.save(tmp_path, 0, engine, as_json, keep=1)
    other = build_engine(replace(config, seed=5), abstract_mesh(), plain)
    assert state.load(path, other, as_json) == 0
    assert all((other.params[name] == param).all() for name, param in engine.params.items())


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step, keep=2)
    assert [path.name for path in complete(tmp_path)] == ["step_00000002", "step_00000003"]


def test_a_save_that_dies_leaves_the_earlier_one_chosen(tmp_path, monkeypatch):
    _, _, earlier = saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 2)
    assert complete(tmp_path) == [earlier]


def test_a_torn_checkpoint_is_refused_by_name(tmp_path):
    engine, config, path = saved(tmp_path)
    (path / ".metadata").unlink()
    assert complete(tmp_path) == []
    with pytest.raises(ValueError, match="step_00000001: not a complete checkpoint: .metadata missing"):
        state.load(path, engine, json.loads(config.to_json()))
    shutil.rmtree(path)
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        state.load(path, engine, json.loads(config.to_json()))


def test_another_model_is_refused_with_what_differs(tmp_path):
    _, _, path = saved(tmp_path)
    config = run_config(replace(DENSE, n_layer=2))
    engine = build_engine(config, abstract_mesh(), plain)
    with pytest.raises(ValueError, match=r"another model: n_layer 4 \(this run: 2\), num_experts 4 \(this run: 0\)"):
        state.load(path, engine, json.loads(config.to_json()))


def test_every_size_that_differs_is_refused_by_name_though_the_shapes_fit(tmp_path):
    engine, config, path = saved(tmp_path)
    model = config.model
    for name, other in {"n_head": 2, "top_k": 1, "moe_freq": 4, "block_size": 4, "vocab_size": 66}.items():
        theirs = json.loads(replace(config, model=replace(model, **{name: other})).to_json())
        complaint = rf"another model: {name} {getattr(model, name)} \(this run: {other}\)"
        for load in (state.load, state.load_parameters):
            with pytest.raises(ValueError, match=complaint):
                load(path, engine, theirs)


def test_a_model_of_before_a_field_was_there_has_its_default(tmp_path, monkeypatch):
    engine, config, path = saved(tmp_path)
    run = json.loads((path / "run.json").read_text())
    assert run["config"]["model"].pop("top_k") == 2 == ModelConfig.top_k
    monkeypatch.setattr(state, "read_run", lambda path: run)
    assert state.load(path, engine, json.loads(config.to_json()), verified=True) == run["step"]
    other = replace(config, model=replace(config.model, top_k=1))
    with pytest.raises(ValueError, match=r"another model: top_k 2 \(this run: 1\)"):
        state.load(path, engine, json.loads(other.to_json()), verified=True)


class CountsElsewhere(torch.optim.SGD):
    """Keeps its step counts where the fused updates do, on the parameter's device, for which one without memory stands
    in: on CUDA they refuse one on the CPU."""

    def step(self):
        for param in self.param_groups[0]["params"]:
            self.state[param]["step"] = torch.ones((), dtype=torch.float32, device="meta")


def test_a_restored_step_count_lies_where_the_optimizer_keeps_it():
    engine = build_engine(config_on({}), abstract_mesh(), plain)
    engine.updater.optimizer = CountsElsewhere(list(engine.params.values()))
    engine.updater.restore({"optimizer_steps": 3, "scaler": {"growth": 0, "scale": 1.0, "good_steps": 0}})
    steps = [of_one["step"] for of_one in engine.updater.optimizer.state.values()]
    assert len(steps) == len(engine.params) and engine.updater.steps == 3
    assert {(step.device.type, step.dtype) for step in steps} == {("meta", torch.float32)}
