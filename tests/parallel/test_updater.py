"""The loss scale beside torch.amp.GradScaler's; and any optimizer that the caller makes."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.placement import Placement, Spec
from heiretsu.parallel.updater import LossScaler, Updater, two_norm
from heiretsu.run import state
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from tests.training import MIXTURE, assemble, dataset, differences, pieces, run_config


def test_the_scale_moves_as_torchs_gradscaler_moves_it():
    window, chance = 4, random.Random(3)
    ours = LossScaler(2.0**16, window)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=window)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    seen = set()
    for step in range(300):
        overflow = chance.random() < 0.12
        theirs.scale(weight)  # where it makes its tensors
        weight.grad = torch.tensor(math.inf if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflow)
        assert ours.scale == theirs.get_scale(), f"step {step}"
        assert ours.good_steps == theirs.state_dict()["_growth_tracker"], f"step {step}"
        seen.add((overflow, ours.good_steps))
    assert {(False, n) for n in range(window)} | {(True, 0)} == seen


def test_the_scale_stops_halving_at_one_and_stays_where_it_does_not_grow():
    small, fixed = LossScaler(2.0, 4), LossScaler()
    for overflow in (True, True, False):
        small.update(overflow)
        fixed.update(overflow)
    assert (small.scale, small.good_steps) == (1.0, 1) and fixed == LossScaler()


# An optimizer of the caller's


def of_the_page():
    """The function that docs/adding-an-optimizer.md shows."""
    page = (Path(__file__).parents[2] / "docs" / "adding-an-optimizer.md").read_text()
    found: dict = {"torch": torch}
    exec(re.search(r"```python\n(def .+?)```", page, re.S)[1], found)
    return found["sgd"]


def trained(mesh, config, first, stop, folder=None, load=False):
    """Losses, pieces of the parameters, and names of what is saved, of steps first to stop - 1 with the page's
    optimizer; saved at the end, or loaded at the beginning."""
    engine, as_json = build_engine(config, mesh, plain, of_the_page()), json.loads(config.to_json())
    if load:
        assert state.load(folder / f"step_{first:08d}", engine, as_json) == first
    data = dataset(config.model.vocab_size, config.model.block_size)
    reports = [engine.step(read_batches(config, mesh, data, step)) for step in range(first, stop)]
    if folder and not load:
        state.save(folder, stop, engine, as_json, keep=1)
    named = {name: param.detach() for name, param in engine.params.items()}
    return [report.metrics["loss"] for report in reports], pieces(engine, named), set(engine.updater.pieces())


def test_the_pages_optimizer_takes_the_steps_of_torch_sgd_on_one_process():
    config = replace(run_config(MIXTURE, microbatches=1, weight_decay=0.25), grad_clip=0.0)
    engine = build_engine(config, abstract_mesh(), plain, of_the_page())
    names = {param: name for name, param in engine.params.items()}
    by_hand = {name: param.detach().clone() for name, param in engine.params.items()}
    momentum: dict[str, torch.Tensor] = {}
    data = dataset(config.model.vocab_size, config.model.block_size)
    for step in range(3):
        engine.step(read_batches(config, abstract_mesh(), data, step))
        for name, value in by_hand.items():
            decay = 0.25 if name in {names[p] for p in engine.updater.optimizer.param_groups[0]["params"]} else 0.0
            grad = engine.updater.grads[name] + decay * value
            momentum[name] = 0.9 * momentum[name] + grad if name in momentum else grad
            value -= config.learning_rate * momentum[name]
    for name, value in by_hand.items():
        torch.testing.assert_close(engine.params[name].detach(), value, rtol=1e-12, atol=1e-15)
    decaying = {names[param] for param in engine.updater.optimizer.param_groups[0]["params"]}
    assert decaying == {name for name, place in engine.table.items() if place.spec.decay}


def test_it_is_the_same_run_on_every_mesh_and_goes_on_on_another(ranks, tmp_path):
    meshes = ({"dp": 2, "pp": 2}, {"ep": 2, "tp": 2})
    saved_on, resumed_on = (run_config(MIXTURE, microbatches=2, **mesh) for mesh in meshes)
    alone = replace(saved_on, dp=1, pp=1, batch_size=saved_on.batch_size * 2)
    losses, whole, _ = trained(abstract_mesh(), alone, 0, 5)
    before = ranks(trained, saved_on, 0, 3, tmp_path, **meshes[0])
    after = ranks(trained, resumed_on, 3, 5, tmp_path, load=True, **meshes[1])
    for (first, _, kept), (second, _, _) in zip(before, after, strict=True):
        assert first + second == pytest.approx(losses, rel=1e-9)
        assert {name.partition("/")[0] for name in kept} == {"model", "momentum_buffer"}
    ours, disagreement = assemble([parts for _, parts, _ in after])
    assert disagreement == dict.fromkeys(disagreement, 0.0)
    assert differences(ours, assemble([whole])[0], 1e-9) == {}


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    config = run_config(MIXTURE)
    trained(abstract_mesh(), config, 0, 1, tmp_path)
    adamw = build_engine(config, abstract_mesh(), plain)
    complaint = "it holds momentum_buffer of each parameter, and this run's keeps exp_avg and exp_avg_sq"
    with pytest.raises(ValueError, match=complaint):
        state.load(tmp_path / "step_00000001", adamw, json.loads(config.to_json()))


def test_an_optimizer_that_keeps_what_no_piece_can_hold_is_refused():
    config = run_config(MIXTURE)
    engine = build_engine(config, abstract_mesh(), plain, lambda groups, config: torch.optim.Adafactor(groups))
    engine.step(read_batches(config, abstract_mesh(), dataset(67, 8), 0))
    with pytest.raises(ValueError, match="Adafactor keeps row_var for .*: only tensors of a parameter's shape"):
        engine.updater.pieces()


def test_restoring_makes_room_without_changing_a_parameter():
    engine = build_engine(run_config(MIXTURE), abstract_mesh(), plain)
    before = {name: param.detach().clone() for name, param in engine.params.items()}
    engine.updater.restore({"optimizer_steps": 7, "scaler": {"growth": 0, "scale": 4.0, "good_steps": 0}})
    assert all(torch.equal(param, before[name]) for name, param in engine.params.items())
    assert [group["lr"] for group in engine.updater.optimizer.param_groups] == [0.01, 0.01]
    assert {piece.tensor.item() for name, piece in engine.updater.pieces(counts=True).items() if "step/" in name} == {7}
    assert engine.updater.facts() == {
        "optimizer_steps": 7,
        "scaler": {"growth": 0, "scale": 4.0, "good_steps": 0},
    }


@pytest.mark.parametrize(
    "grad_clip, scale, factor",
    [
        (0.0, 1.0, 1.0),
        (0.0, 4.0, 0.25),
        (10.0, 1.0, 1.0),
        (2.5, 1.0, 2.5 / (5 + 1e-6)),
        (1.0, 1.0, 1 / (5 + 1e-6)),
        (2.5, 4.0, 2.5 / (5 + 1e-6) / 4),
    ],
)
def test_one_step_of_sgd_by_hand(grad_clip, scale, factor):
    """The gradient (3, 4), of norm 5, times the loss scale: clipped by its norm, unscaled, taken at rate 1."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    table = {"w": Placement("w", Spec((2,), partial_over=("dp",), decay=True), abstract_mesh())}
    updater = Updater({"w": weight}, table, lambda groups: torch.optim.SGD(groups, 1.0), grad_clip, LossScaler(scale))
    updater.prepare(1)
    weight.grad += scale * torch.tensor([3.0, 4.0], dtype=torch.float64)
    squares, bad = updater.squares()
    assert (squares.tolist(), bad.tolist()) == ([(5 * scale) ** 2], [0.0])
    with patch.object(updater.averager, "scale", wraps=updater.averager.scale) as scaled:
        assert updater.apply(squares.item(), 0.0) == (5.0, False)
    assert scaled.call_count == (factor != 1.0)  # all gradients are read and written for it
    assert weight.tolist() == pytest.approx([-3 * factor * scale, -4 * factor * scale], rel=1e-15)
    assert updater.steps == 1
    before = weight.tolist()
    for skipping in ((math.inf, 0.0), (25.0, 1.0)):
        norm, skipped = updater.apply(*skipping)
        assert skipped and not math.isfinite(norm) and updater.steps == 1 and weight.tolist() == before
    assert math.isnan(updater.apply(25.0, 2.0)[0]) and updater.apply(math.inf, 0.0)[0] == math.inf


def test_a_gradient_counts_on_the_rank_that_owns_it_alone():
    """Whether it is finite, on each."""
    params = {"w": torch.nn.Parameter(torch.zeros(2))}
    for rank, squares in ((0, 25.0), (1, 0.0)):
        table = {"w": Placement("w", Spec((2,), partial_over=("dp",)), abstract_mesh(tp=2, rank=rank))}
        updater = Updater(params, table, torch.optim.SGD)
        updater.grads["w"].copy_(torch.tensor([3.0, 4.0]))
        assert [part.tolist() for part in updater.squares()] == [[squares], [0.0]]
        updater.grads["w"][0] = math.inf
        assert updater.squares()[1].tolist() == [1.0]


class CountsInPython(torch.optim.SGD):
    """Keeps its step counts as Python's numbers."""

    def step(self):
        for param in self.param_groups[0]["params"]:
            self.state[param]["step"] = self.state[param].get("step", 0) + 1


def test_a_count_in_python_is_restored_too_and_none_is_given_to_who_keeps_none():
    params = {"w": torch.nn.Parameter(torch.zeros(2))}
    table = {"w": Placement("w", Spec((2,), partial_over=("dp",)), abstract_mesh())}
    facts = {"optimizer_steps": 7, "scaler": {"growth": 0, "scale": 1.0, "good_steps": 0}}
    for optimizer, state_of_w in ((CountsInPython, {"step": 7}), (torch.optim.SGD, {})):
        updater = Updater(params, table, lambda groups, optimizer=optimizer: optimizer(groups, 1.0))
        updater.restore(facts)
        assert updater.steps == 7 and {**updater.optimizer.state[params["w"]]} == state_of_w


def test_an_updater_that_is_told_nothing_clips_nothing_and_works_where_its_parameters_are():
    params = {"w": torch.nn.Parameter(torch.zeros(2, device="meta"))}
    table = {"w": Placement("w", Spec((2,), partial_over=("dp",)), abstract_mesh(device="meta"))}
    updater = Updater(params, table, torch.optim.SGD)
    assert updater.grad_clip == 0 and updater.scaler == LossScaler(1.0, 0, 0) and updater._owned.is_meta


@pytest.mark.parametrize("size", [1, 2, 1023, 1024, 1025, 2048, 2050, 3 * 1024**2 + 5])
def test_a_norm_counts_every_element_once(size):
    x = torch.full((size,), 3.0, dtype=torch.float64)
    assert two_norm(x).item() == pytest.approx(3 * math.sqrt(size), rel=1e-14)
    x[-1], x[0] = 1e6, 2e6
    assert two_norm(x.view(1, -1)).item() == pytest.approx(x.square().sum().sqrt().item(), rel=1e-14)
