"""What an engine tells of a step: whose gradient was not finite, how long its own part took; and what it refuses."""

import math
import time

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.parallel import engine as engine_module
from heiretsu.parallel.activity import ACTIVITY
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.metrics import Totals
from heiretsu.parallel.pipeline import Microbatch, run_schedule
from heiretsu.parallel.schedules import SCHEDULES
from heiretsu.parallel.schedules.actions import Action, Kind
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from tests.training import DENSE, MIXTURE, dataset, run_config


@pytest.fixture(scope="module")
def engine():
    return build_engine(run_config(MIXTURE, microbatches=2), abstract_mesh(), plain)


def told(engine, monkeypatch, *found):
    """What is said where the ranks tell (their first parameter, their metrics) so; None stands for this rank's own."""
    sent = []

    def gather(mine, axis):
        sent.append(mine)
        return [mine if other is None else other for other in found]

    monkeypatch.setattr(engine_module, "gather_objects", gather)
    return engine._first_not_finite(Totals(engine.metrics)), sent[0]


def test_the_first_parameter_and_the_first_metric_that_were_not_finite_are_named_with_their_ranks(engine, monkeypatch):
    for grad in engine.updater.grads.values():
        grad.zero_()
    assert told(engine, monkeypatch, None) == ("the gradient's norm overflowed", (None, []))
    names = list(engine.params)
    engine.updater.grads[names[5]].view(-1)[-1] = math.nan
    engine.updater.grads[names[2]].view(-1)[0] = -math.inf
    mine = (0, 2, names[2])
    alone = f"the gradient of {names[2]} was not finite"
    assert told(engine, monkeypatch, None) == (f"{alone} (rank 0)", (mine, []))
    other, lower = (1, 0, "ln_f.bias"), (0, 1, "lower")
    assert told(engine, monkeypatch, (other, []), None, (None, []), (mine, []))[0] == f"{alone} (rank 1, 3)"
    assert told(engine, monkeypatch, None, (lower, []))[0] == "the gradient of lower was not finite (rank 1)"
    both = told(engine, monkeypatch, (mine, ["aux_loss"]), None, (None, ["aux_loss", "loss"]), (None, ["loss"]))[0]
    assert both == f"{alone} (rank 0, 1), nor the loss (rank 2, 3)"
    assert (
        told(engine, monkeypatch, None, (None, ["expert_load"]))[0] == f"{alone} (rank 0), nor the expert_load (rank 1)"
    )


def test_of_several_stages_the_lowest_is_told_by_its_number_in_the_model(engine, monkeypatch):
    config = run_config(DENSE, microbatches=2, pp=2, virtual_stages=2, schedule="interleaved")
    upper = build_engine(config, abstract_mesh(pp=2, rank=1), plain)
    grads = upper.updater.grads
    for grad in grads.values():
        grad.zero_()
    last = list(dict(upper.stages[1].named_parameters()))
    grads[last[1]].fill_(math.nan)
    assert told(upper, monkeypatch, None)[1][0] == (3, 1, last[1])
    first = list(dict(upper.stages[0].named_parameters()))
    grads[first[2]].fill_(math.nan)
    assert told(upper, monkeypatch, None)[1][0] == (1, 2, first[2])


def test_a_step_tells_the_seconds_of_its_own_part_and_its_note(engine, monkeypatch):
    """Waiting is left out, and so is what the optimizer does."""
    config = run_config(MIXTURE, microbatches=2)
    batches = read_batches(config, abstract_mesh(), dataset(67, 8), 4)
    now, names = [50.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ACTIVITY, "waited_s", 3.0)
    real, apply = engine.updater.reduce, engine.updater.apply

    def reduce():
        real()
        names.append(ACTIVITY.where())
        now[0] += 8.0
        ACTIVITY.waited_s += 3.0

    def late(*arguments):
        names.append(ACTIVITY.where())
        now[0] += 100.0
        return apply(*arguments)

    monkeypatch.setattr(engine.updater, "reduce", reduce)
    monkeypatch.setattr(engine.updater, "apply", late)
    report = engine.step(batches)
    assert (report.compute_s, report.notes) == ((5.0,), (0,))
    assert names == ["average gradients / step 5", "optimizer / step 5"]
    monkeypatch.setattr(engine, "note", lambda: 7)
    report = engine.step(batches)
    assert report.notes == (7,) and report.not_finite == "" and report.loss_scale == 1.0 and not report.skipped
    assert report.metrics["expert_load"].shape == (2, 4) and isinstance(report.metrics["loss"], float)


def test_stages_train_in_a_step_and_do_not_in_evaluation(engine, monkeypatch):
    config = run_config(MIXTURE, microbatches=2)
    batches = read_batches(config, abstract_mesh(), dataset(67, 8), 0)
    where, run = [], engine_module.run_schedule
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "run_schedule", lambda *what: where.append(ACTIVITY.where()) or run(*what))
        engine.evaluate(batches)
    assert where == ["evaluation"] and not any(stage.training for stage in engine.stages)
    engine.accumulate(batches)
    assert all(stage.training for stage in engine.stages)
    with pytest.raises(AssertionError):
        engine.accumulate(batches[:1])


def test_a_norm_that_overflows_is_told_though_every_gradient_is_finite(engine, monkeypatch):
    batches = read_batches(run_config(MIXTURE, microbatches=2), abstract_mesh(), dataset(67, 8), 0)
    sums = torch.tensor([math.inf], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    monkeypatch.setattr(engine.updater, "squares", lambda: sums)
    report = engine.step(batches)
    assert report.skipped and report.not_finite == "the gradient's norm overflowed"


def test_a_schedule_that_leaves_something_out_is_refused(engine):
    with pytest.raises(ValueError):
        Engine(engine.stages, abstract_mesh(), [SCHEDULES["gpipe"](1, 2)[0][:-1]], engine.updater)


def test_several_stages_on_one_rank_and_a_split_backward_are_refused(engine):
    with pytest.raises(ValueError) as refused:
        Engine(engine.stages * 2, abstract_mesh(), SCHEDULES["gpipe"](1, 2), engine.updater)
    assert str(refused.value) == "2 stages on one rank: the ranks of a pipeline hand on to one another"
    batch = Microbatch(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError) as refused:
        run_schedule([Action(Kind.BACKWARD_INPUT, 0, 0)], engine.stages, [batch], abstract_mesh())
    here = "rank 0 (dp=0, ep=0, pp=0, tp=0)"
    assert str(refused.value) == f"{here}: the executor does not split backward, as I0.0 asks"
