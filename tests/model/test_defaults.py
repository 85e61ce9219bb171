"""What the caller's program has set as torch's default dtype or device changes nothing: not the initial values, not a
step, an evaluation, a sample, a checkpoint or an export."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from heiretsu.kernels import fused, plain
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import state
from heiretsu.run.batches import evaluate, read_batches
from heiretsu.run.building import build_engine
from heiretsu.run.log import peak_flops
from heiretsu.run.sampling import generate
from heiretsu.run.saved import load_model
from heiretsu.run.tuning import call_runs, record_calls
from tests.training import MIXTURE, dataset, run_config

OPS = {"plain": plain, "fused": fused}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "device meta": lambda: default_device("meta"),
}


def whole_run(folder, ops, amp) -> dict:
    """Two steps of a mixture with dropout, and all that is made of them; tensors as bytes."""
    model = replace(MIXTURE, dropout=0.1)
    config = replace(run_config(model, microbatches=2), dtype="float32", amp=amp)
    mesh, data = abstract_mesh(), dataset(model.vocab_size, model.block_size)
    engine = build_engine(config, mesh, ops)
    initial = {name: bits(param) for name, param in engine.params.items()}
    reports = [engine.step(read_batches(config, mesh, data, step)) for step in range(2)]
    path = state.save(folder, 2, engine, json.loads(config.to_json()), keep=1)
    again = build_engine(config, mesh, ops)
    state.load(path, again, json.loads(config.to_json()))
    loaded, _ = load_model(path, ops)
    assert peak_flops(mesh, config) > 0
    measured = record_calls(again, read_batches(config, mesh, data, 3))
    runs = call_runs(measured, ops, mesh.device)
    calls = {name: {k: (t.dtype, t.device) for k, t in make()().items()} for name, make in runs.items()}
    return {
        "initial values": initial,
        "losses": [
            (r.metrics["loss"], r.metrics["aux_loss"], r.grad_norm, r.metrics["expert_load"].tolist()) for r in reports
        ],
        "parameters": {name: bits(param) for name, param in engine.params.items()},
        "evaluation": evaluate(replace(config, eval_iters=2), mesh, engine, data),
        "a step after resuming": again.step(read_batches(config, mesh, data, 2)).metrics["loss"],
        "sample": list(generate(loaded, [1, 2], 12, temperature=0.9, top_k=9, seed=3)),
        "calls that are measured": calls,
    }


def bits(tensor) -> bytes:
    assert tensor.device.type == "cpu"
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("ops, amp", [("plain", "none"), ("fused", "bf16")])
def test_a_default_dtype_or_device_changes_nothing(tmp_path, ops, amp):
    wanted = whole_run(tmp_path / "as it is", OPS[ops], amp)
    for name, context in DEFAULTS.items():
        with context():
            got = whole_run(tmp_path / name, OPS[ops], amp)
        for what, value in wanted.items():
            assert got[what] == value, f"{what} under default {name}"
