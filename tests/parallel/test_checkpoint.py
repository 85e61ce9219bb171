"""A checkpoint continues the run: bit for bit on the same mesh, to 1e-9 on any other, and never half of it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.parallel import checkpoint
from heiretsu.parallel.mesh import abstract_mesh
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
        assert checkpoint.load(checkpoint.complete(folder)[-1], engine, as_json) == first
    data = dataset(config.model.vocab_size, config.model.block_size)
    trace = Trace()
    said: list[str] = []
    saver = Saver(replace(config, checkpoint_dir=str(folder)), engine, {"run_id": "a"}, said.append)
    engine.note = saver.note
    for step in range(first, stop):
        report = engine.step(read_batches(config, mesh, data, step))
        trace.losses.append(report.loss)
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
    return engine, config, checkpoint.save(tmp_path, step, engine, json.loads(config.to_json()), keep)


def test_a_checkpoint_from_before_the_first_step_can_be_resumed(tmp_path):
    config = config_on({})
    as_json = json.loads(config.to_json())
    engine = build_engine(config, abstract_mesh(), plain)
    path = checkpoint.save(tmp_path, 0, engine, as_json, keep=1)
    other = build_engine(replace(config, seed=5), abstract_mesh(), plain)
    assert checkpoint.load(path, other, as_json) == 0
    assert all((other.params[name] == param).all() for name, param in engine.params.items())


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_00000002", "step_00000003"]


def test_a_save_that_dies_leaves_the_earlier_one_chosen(tmp_path, monkeypatch):
    _, _, earlier = saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 2)
    assert checkpoint.complete(tmp_path) == [earlier]


def test_a_torn_checkpoint_is_refused_by_name(tmp_path):
    engine, config, path = saved(tmp_path)
    (path / ".metadata").unlink()
    assert checkpoint.complete(tmp_path) == []
    with pytest.raises(ValueError, match="step_00000001: not a complete checkpoint: .metadata missing"):
        checkpoint.load(path, engine, json.loads(config.to_json()))
    shutil.rmtree(path)
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        checkpoint.load(path, engine, json.loads(config.to_json()))


def test_another_model_is_refused_with_what_differs(tmp_path):
    _, _, path = saved(tmp_path)
    config = run_config(replace(DENSE, n_layer=2))
    engine = build_engine(config, abstract_mesh(), plain)
    with pytest.raises(ValueError, match=r"another model: n_layer 4 \(this run: 2\), num_experts 4 \(this run: 0\)"):
        checkpoint.load(path, engine, json.loads(config.to_json()))


def test_every_size_that_differs_is_refused_by_name_though_the_shapes_fit(tmp_path):
    engine, config, path = saved(tmp_path)
    model = config.model
    for name, other in {"n_head": 2, "top_k": 1, "moe_freq": 4, "block_size": 4, "vocab_size": 66}.items():
        theirs = json.loads(replace(config, model=replace(model, **{name: other})).to_json())
        complaint = rf"another model: {name} {getattr(model, name)} \(this run: {other}\)"
        for load in (checkpoint.load, checkpoint.load_parameters):
            with pytest.raises(ValueError, match=complaint):
                load(path, engine, theirs)


def test_the_optimizers_step_lies_beside_its_parameter(tmp_path, monkeypatch):
    """Where the fused update counts it up: on CUDA it refuses one on the CPU. Parameters without memory stand in."""
    _, config, path = saved(tmp_path)
    engine = build_engine(config, abstract_mesh(), plain)
    for stage in engine.stages:
        stage.to("meta")
    engine.params = {name: param for stage in engine.stages for name, param in stage.named_parameters()}
    engine.optimizer = torch.optim.AdamW(list(engine.params.values()))
    monkeypatch.setattr(checkpoint.dcp, "load", lambda *_, **__: None)
    checkpoint.load(path, engine, json.loads(config.to_json()))
    assert {state["step"].device.type for state in engine.optimizer.state.values()} == {"meta"}
