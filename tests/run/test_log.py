"""What a run says where there is no terminal to draw a bar on, and what its file and wandb keep of it."""

import json
import math
import os
import resource
import sys
import types
from dataclasses import replace

import pytest

from heiretsu.bench.plot_run import read_log
from heiretsu.parallel.engine import StepReport
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import log as run_log
from heiretsu.run.options import parse_args


def steps_said(seconds_per_step, max_iters, monkeypatch, capsys, skipped=()) -> list[int]:
    """The steps that got a line, of the first 200 of a run."""
    now = 0.0
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: now)
    monkeypatch.setattr(run_log, "peak_flops", lambda *_: None)
    log = run_log.RunLog(parse_args(["--max_iters", str(max_iters)], world_size=1), abstract_mesh())
    for step in range(min(200, max_iters)):
        now += seconds_per_step
        report = StepReport({}, 1.0, step in skipped)
        log.write({"step": step, "loss": 2.0, "tokens_per_s": 1.0}, report)
    return [int(line.split("/")[0].removeprefix("step")) for line in capsys.readouterr().out.splitlines()]


def test_a_fast_run_gets_about_twenty_lines(monkeypatch, capsys):
    assert steps_said(0.001, 200, monkeypatch, capsys) == [1, *range(10, 201, 10)]
    assert steps_said(0.001, 5, monkeypatch, capsys) == [1, 2, 3, 4, 5]


def test_a_slow_run_is_not_silent_for_long(monkeypatch, capsys):
    said = steps_said(6.0, 100_000, monkeypatch, capsys)
    assert said == [1, *range(5, 201, 4)]  # 24 s is the first multiple of 6 s above LONGEST_SILENCE_S


def test_a_skipped_step_is_always_said(monkeypatch, capsys):
    assert steps_said(0.001, 200, monkeypatch, capsys, skipped=(122,)) == [
        1,
        *range(10, 121, 10),
        123,
        *range(130, 201, 10),
    ]


def mfu(tmp_path, flags: str, mesh) -> float:
    """What the log file says of a step of a million tokens a second."""
    path = tmp_path / "log.jsonl"
    log = run_log.RunLog(parse_args([*flags.split(), "--log_file", str(path)], world_size=mesh.world.size), mesh)
    log.write({"step": 0, "loss": 2.0, "tokens_per_s": 1e6}, StepReport({}, 1.0, False))
    log.close()
    return json.loads(path.read_text())["mfu"]


def test_mfu_of_gpt2_on_one_gpu_and_on_eight_is_what_data_sheet_and_paper_give(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log.torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(run_log, "peak_memory_mib", lambda device: 0.0)
    gpt2 = "--preset gpt2 --tokenizer gpt2"
    one, eight = abstract_mesh(device="cuda"), abstract_mesh(dp=2, pp=2, tp=2, device="cuda")
    # 797,815,296 FLOPs a token (see test_gpt.py), a million a second, against 312 TFLOP/s a GPU
    assert mfu(tmp_path, gpt2, one) == pytest.approx(797_815_296e6 / 312e12)
    assert mfu(tmp_path, f"{gpt2} --dp 2 --pp 2 --tp 2", eight) == pytest.approx(797_815_296e6 / 312e12 / 8)


def test_ranks_on_cpus_share_the_peak_that_one_measures(tmp_path, monkeypatch):
    now = iter(range(1000))  # a second between any two looks at the clock
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: float(next(now)))
    tiny = "--n_layer 1 --n_head 1 --n_embed 8 --block_size 4"
    flops_per_token = 6 * (12 * 8**2 + 4 * 8 + 257 * 8)  # of bytes: the vocabulary's padding is not computed
    for mesh, flags in ((abstract_mesh(), tiny), (abstract_mesh(dp=2), f"{tiny} --dp 2")):
        assert mfu(tmp_path, flags, mesh) == pytest.approx(1e6 * flops_per_token / (2 * 512**3))


def log_of(tmp_path, *flags):
    """A config whose log goes to tmp_path/log.jsonl, and that file."""
    path = tmp_path / "log.jsonl"
    return parse_args(["--log_file", str(path), "--max_iters", "9", *flags], world_size=1), path


def write_steps(config, steps, run_id=None, **numbers):
    log = run_log.RunLog(config, abstract_mesh(), steps[0], run_id)
    for step in steps:
        log.write({"step": step, "loss": 2.0 + step, "tokens_per_s": 1.0, **numbers}, StepReport({}, 1.0, False))
    log.close()


def strictly(line: str) -> dict:
    def refuse(name):
        raise ValueError(name)

    return json.loads(line, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_to_every_reader(tmp_path):
    config, path = log_of(tmp_path)
    write_steps(config, [0, 1], grad_norm=math.nan, aux_loss=-math.inf)
    records = [strictly(line) for line in path.read_text().splitlines()]
    assert [(record["grad_norm"], record["aux_loss"]) for record in records] == [(None, None)] * 2
    assert read_log(path)["loss"] == [(0, 2.0), (1, 3.0)]


def test_a_resumed_log_has_each_step_once(tmp_path):
    config, path = log_of(tmp_path)
    write_steps(config, range(6))
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # a kill came in between
    write_steps(config, range(4, 8), grad_norm=1.0)
    records = [strictly(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(8))
    assert ["grad_norm" in record for record in records] == [False] * 4 + [True] * 4
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_kill_while_the_log_is_shortened_leaves_it_as_it_was(tmp_path, monkeypatch):
    config, path = log_of(tmp_path)
    write_steps(config, range(6))
    before = path.read_bytes()
    monkeypatch.setattr(run_log.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_log.RunLog(config, abstract_mesh(), 3)
    assert path.read_bytes() == before


def test_what_replaces_a_log_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    config, path = log_of(tmp_path)
    write_steps(config, range(6))
    did, fsync, replace_file = [], os.fsync, os.replace
    monkeypatch.setattr(run_log.os, "fsync", lambda file: did.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(run_log.os, "replace", lambda *names: did.append("replaced") or replace_file(*names))
    run_log.RunLog(config, abstract_mesh(), 3).close()
    assert did == [path.stat().st_size, "replaced"] and did[0] > 0


def test_a_line_is_in_the_file_as_soon_as_its_step_is_done(tmp_path):
    log = run_log.LogFile(tmp_path / "run.jsonl", 0)
    for step in (1, 2):
        assert log.append({"step": step}) is None
        assert (tmp_path / "run.jsonl").read_text().splitlines()[-1] == f'{{"step": {step}}}'


def test_a_new_run_begins_a_new_log(tmp_path):
    config, path = log_of(tmp_path)
    write_steps(config, range(6))
    write_steps(config, [0])
    assert [strictly(line)["step"] for line in path.read_text().splitlines()] == [0]


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, capsys):
    config, path = log_of(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
        write_steps(config, range(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [strictly(line)["step"] for line in path.read_text().splitlines()] == [0]
    assert capsys.readouterr().out.count("lines are lost until there is room") == 1


WHY = "the server cannot be reached"


class Wandb:
    """What of wandb a log uses, with a server that cannot be reached, or that is lost at some step."""

    def __init__(self, refuses=("online",), lost_at=None, step=0):
        self.refuses, self.lost_at, self.modes, self.steps = refuses, lost_at, [], []
        self.run = types.SimpleNamespace(step=step)

    def init(self, mode, id, resume, **more):
        self.more = more
        self.modes.append((mode, id, resume))
        if mode in self.refuses:
            raise ConnectionError(f"{WHY}\nand a page of why")

    def log(self, record, step):
        if step == self.lost_at:
            raise ConnectionError("lost")
        self.steps.append(step)

    def finish(self):
        pass


@pytest.mark.parametrize("server", ["unreachable", "unreachable, and no disk", "lost at step 2"])
def test_a_run_loses_nothing_when_wandb_cannot_be_had(tmp_path, monkeypatch, capsys, server):
    refuses = {"unreachable": ("online",), "lost at step 2": ()}.get(server, ("online", "offline"))
    wandb = Wandb(refuses, 2 if server.startswith("lost") else None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config, path = log_of(tmp_path)
    write_steps(replace(config, wandb=True), range(4))
    assert [strictly(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    assert wandb.steps == {"unreachable": [0, 1, 2, 3], "lost at step 2": [0, 1]}.get(server, [])
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    why = "warning: wandb: the server cannot be reached: the run goes on without it"
    told = {"unreachable": [f"{why}; it is recorded on disk"], "lost at step 2": [why.replace(WHY, "lost")]}
    assert warnings == told.get(server, [f"{why}; it is recorded on disk", why])
    assert wandb.modes == [("online", None, None), ("offline", None, None)][: 2 - server.startswith("lost")]


def test_a_resumed_wandb_run_goes_on_without_the_steps_that_it_has(tmp_path, monkeypatch):
    wandb = Wandb(refuses=(), step=6)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config, _ = log_of(tmp_path)
    write_steps(replace(config, wandb=True), range(4, 9), run_id="ab12")
    assert wandb.modes == [("online", "ab12", "allow")] and wandb.steps == [6, 7, 8]


def test_wandb_that_is_not_installed_is_found_with_the_flags(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        parse_args(["--wandb"], world_size=1)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "pip install 'heiretsu[wandb]'" in err and err.count("\n") == 1


def test_wandb_is_told_whose_run_it_is_and_gets_what_the_file_gets(tmp_path, monkeypatch):
    wandb, logged = Wandb(refuses=()), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(wandb, "log", lambda record, step: logged.append((record, step)))
    config, path = log_of(tmp_path)
    config = replace(config, wandb=True, wandb_project="p", wandb_entity="e", run_name="n", wandb_mode="disabled")
    write_steps(config, [0], run_id="ab12")
    more = {"project": "p", "entity": "e", "name": "n", "config": config.as_json()}
    assert wandb.more == more and wandb.modes == [("disabled", "ab12", None)]
    assert logged == [(strictly(path.read_text()), 0)]


def test_what_wandb_breaks_with_at_any_moment_is_one_line(tmp_path, monkeypatch, capsys):
    def broken(*_, **more):
        raise RuntimeError("  \n")

    config, _ = log_of(tmp_path)
    for moment in ("init", "log", "finish"):
        wandb = Wandb(refuses=())
        monkeypatch.setattr(wandb, moment, broken)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        write_steps(replace(config, wandb=True, wandb_mode="offline"), range(2))
        said = capsys.readouterr().out
        assert said.count("warning: wandb: RuntimeError: the run goes on without it\n") == said.count("warning") == 1


def test_a_line_comes_after_twenty_seconds_of_silence_and_not_at_twenty(monkeypatch, capsys):
    assert steps_said(10.0, 100_000, monkeypatch, capsys) == [1, *range(4, 201, 3)]
    assert steps_said(20.25, 100_000, monkeypatch, capsys) == list(range(1, 201))
