"""A model can be copied and pickled: for an average of its weights, or to be taken elsewhere whole."""

import copy
import io
import pickle
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from heiretsu.kernels import fused, plain
from heiretsu.model.copying import HoldsOps
from heiretsu.parallel.mesh import Axis, abstract_mesh
from heiretsu.parallel.pipeline import Context, Microbatch
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from tests.training import MIXTURE, dataset, run_config


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": reloaded,
    "AveragedModel": lambda model: AveragedModel(model).module,
}


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("ops", [plain, fused], ids=["plain", "fused"])
def test_a_copy_of_a_model_in_training_computes_the_same(ops, compiled):
    config = replace(run_config(MIXTURE), compile=compiled)
    mesh, data = abstract_mesh(), dataset(MIXTURE.vocab_size, MIXTURE.block_size)
    engine = build_engine(config, mesh, ops)
    if not compiled:  # which would take a minute
        engine.step(read_batches(config, mesh, data, 0))
    (model,) = engine.stages
    batch = Microbatch(*data.batch(1, range(2)), Context(step=1))
    for name, make in COPIES.items():
        twin = make(model)
        assert twin.ops is twin.blocks["0"].attn.ops is ops, name
        for (path, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr(), f"{name}: {path}"
        if not compiled:
            assert torch.equal(twin(None, batch).objective, model(None, batch).objective), name


def test_ops_that_are_no_module_are_copied_as_they_are():
    holder = HoldsOps(SimpleNamespace(name="mine"))
    assert copy.deepcopy(holder).ops == holder.ops and pickle.loads(pickle.dumps(holder)).ops == holder.ops


def test_a_copy_talks_over_the_same_process_groups():
    axis = Axis("tp", 2, 0, (0, 1), group=threading.Lock())  # it cannot be copied, as a process group cannot
    assert copy.deepcopy({"layer": axis})["layer"] is axis
