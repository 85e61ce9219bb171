"""The loop: when it evaluates, compares, saves and ends, in which order, and what a step's record holds."""

import math
from types import SimpleNamespace

import pytest

from heiretsu.parallel.engine import StepReport
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import training
from heiretsu.run.options import parse_args
from heiretsu.run.stop import Ending
from heiretsu.run.training import learning_rate, train

METRICS = {"loss": 2.5, "aux_loss": 0.25, "expert_load": "of each expert"}


def events_of(monkeypatch, *flags, first_step=0, ending=None, ends_at=None, tokenizer="a tokenizer", facts=None):
    """What a run does, in order, and its records; each of its parts says what it is asked to do, and no more."""
    did, records, now = [], [], [0.0]

    def say(*what):
        did.append(" ".join(map(str, what)))

    class Log:
        def __init__(self, config, mesh, first_step, run_id):
            say("log from", first_step, "of", run_id)

        def write(self, record, report):
            assert report.metrics is METRICS
            records.append(dict(record))
            say("write", record["step"])

        def say(self, line):
            say("said", line)

        def close(self):
            say("log closed")

    class Stop:
        note = staticmethod(lambda: 0b001)

        def __init__(self, config):
            pass

        def after(self, report, differing):
            say("stop?", repr(differing))
            return ending if now[0] == ends_at else None

        def close(self):
            say("stop closed")

    class Saver:
        note = staticmethod(lambda: 0b100)

        def __init__(self, config, engine, facts, told):
            say("saves with", facts)
            told("from the saver")

        def begin(self, step):
            say("save", step)

        def after(self, report):
            say("saved?")

        def close(self):
            say("saver closed")

    class Profiler:
        def __init__(self, *what):
            say("profile", *what)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            say("profiled")

        def step(self):
            return "a trace" if now[0] == 2 else None

    groups = [{"lr": None}, {"lr": None}]

    class Engine:
        updater = SimpleNamespace(
            optimizer=SimpleNamespace(param_groups=groups), pieces=lambda counts: ("pieces", counts)
        )

        def step(self, batches):
            assert [group["lr"] for group in groups] == [learning_rate(config, batches)] * 2
            say("step", batches)
            now[0] = batches + 1
            return StepReport(METRICS, 1.5, False, loss_scale=8.0, compute_s=(0.5,))

    ticks = iter(range(0, 10**6, 4))
    config = parse_args(list(flags), world_size=1)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    for name, fake in (("RunLog", Log), ("Stop", Stop), ("Saver", Saver), ("StepProfiler", Profiler)):
        monkeypatch.setattr(training, name, fake)
    monkeypatch.setattr(training, "find_tokenizer", lambda config, mesh: tokenizer)
    monkeypatch.setattr(training, "read_batches", lambda config, mesh, data, step: step if data == "train" else None)
    monkeypatch.setattr(
        training, "evaluate", lambda config, mesh, engine, data: say("evaluate", data) or {"eval_loss": 9}
    )
    monkeypatch.setattr(training, "first_difference", lambda pieces, mesh: say("compare", pieces) or "")
    monkeypatch.setattr(training, "sample", lambda config, engine, tokenizer: f"by {tokenizer}")
    engine, status = Engine(), None
    try:
        train(config, abstract_mesh(), engine, "train", "val", first_step, facts)
    except SystemExit as stop:
        status = stop.code
    assert engine.note() == 0b101
    return did, records, status


BEGIN = ["log from 0 of None", "saves with {}", "said from the saver", "profile None"]


def test_a_run_of_three_steps_evaluates_and_saves_at_the_last(monkeypatch, capsys):
    did, records, status = events_of(monkeypatch, "--max_iters", "3", "--eval_interval", "2", "--batch_size", "2")
    mesh = abstract_mesh()
    assert did[:3] == BEGIN[:3] and did[3] == f"profile None {mesh} False"
    step = ["stop? ''", "saved?"]
    assert did[4:] == [
        "step 0", "write 0", *step,
        "step 1", "evaluate val", "write 1", "said a trace", *step,
        "step 2", "evaluate val", "write 2", *step, "save 3",
        "profiled", "saver closed", "stop closed", "log closed",
    ]  # fmt: skip
    assert status is None and capsys.readouterr().out == "by a tokenizer\n"
    first = {
        "step": 0,
        "loss": 2.5,
        "aux_loss": 0.25,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "skipped": False,
        "loss_scale": 8.0,
    }
    assert records[0] == first | {"tokens_per_s": 2 * 128 / 4, "slowest_rank": 0, "slowest_over_median": 1.0}
    assert records[1] == records[0] | {"step": 1, "eval_loss": 9} and records[2]["step"] == 2


def test_intervals_of_saving_and_comparing_and_none_of_evaluation(monkeypatch):
    flags = "--max_iters 5 --eval_interval 0 --save_interval 2 --check_replicas 3".split()
    did, records, _ = events_of(monkeypatch, *flags, first_step=1, facts={"run_id": "ab12", "data": "d"})
    assert did[:2] == ["log from 1 of ab12", "saves with {'run_id': 'ab12', 'data': 'd'}"]
    kept = [what for what in did if what.startswith(("step", "save ", "compare", "evaluate"))]
    compared = "compare ('pieces', True)"
    assert kept == ["step 1", "save 2", "step 2", compared, "step 3", "save 4", "step 4", "save 5"]
    assert [record["step"] for record in records] == [1, 2, 3, 4] and "eval_loss" not in records[-1]


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("status", [0, 3])
def test_what_ends_a_run_is_said_after_its_save_and_leaves_no_sample(monkeypatch, capsys, saves, status):
    flags = "--max_iters 4 --save_interval 2".split()
    did, _, ended = events_of(monkeypatch, *flags, ending=Ending("a signal", status, saves), ends_at=2)
    last = did[did.index("step 1") + 1 :]
    saved = ["save 2"] if saves else []
    assert last == ["write 1", "said a trace", "stop? ''", "saved?", *saved, "said a signal", "profiled", *last[-3:]]
    assert last[-3:] == ["saver closed", "stop closed", "log closed"]
    assert ended == (status or None) and capsys.readouterr().out == ""


def test_a_run_without_a_tokenizer_or_steps_ends_in_silence(monkeypatch, capsys):
    did, records, status = events_of(monkeypatch, "--max_iters", "2", first_step=2, tokenizer=None)
    assert did[4:] == ["profiled", "saver closed", "stop closed", "log closed"] and (records, status) == ([], None)
    assert capsys.readouterr().out == ""


def test_a_slow_rank_and_where_a_trace_lies_are_said_after_the_steps_numbers(monkeypatch):
    monkeypatch.setattr(training.Stragglers, "update", lambda self, seconds: setattr(self, "line", "slow") or {})
    did, _, _ = events_of(monkeypatch, "--max_iters", "2", "--eval_interval", "0")
    said = [what for what in did if what.startswith(("write", "said"))]
    assert said == ["said from the saver", "write 0", "said slow", "write 1", "said slow", "said a trace"]


def test_learning_rates_at_named_steps():
    config = parse_args("--learning_rate 0.8 --warmup_iters 4 --max_iters 13 --min_lr 0.2".split(), world_size=1)
    assert [learning_rate(config, step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    cosines = [0.2 + 0.3 * (1 + math.cos(math.pi * part)) for part in (0.25, 0.5, 1.0)]
    assert [learning_rate(config, step) for step in (6, 8, 12)] == pytest.approx(cosines) and cosines[2] == 0.2
    constant = parse_args("--learning_rate 0.8 --warmup_iters 4".split(), world_size=1)
    assert [learning_rate(constant, step) for step in (2, 3, 4, 999)] == pytest.approx([0.6, 0.8, 0.8, 0.8])
    one = parse_args("--learning_rate 0.8 --max_iters 1 --min_lr 0.2".split(), world_size=1)
    assert learning_rate(one, 0) == 0.8
    two = parse_args("--learning_rate 0.8 --max_iters 2 --min_lr 0.2".split(), world_size=1)
    assert learning_rate(two, 1) == pytest.approx(0.2)
