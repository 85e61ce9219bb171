"""What a run says where there is no terminal to draw a bar on."""

from heiretsu.model import run_log
from heiretsu.model.options import parse_args
from heiretsu.parallel.engine import StepReport
from heiretsu.parallel.mesh import abstract_mesh


def steps_said(seconds_per_step, max_iters, monkeypatch, capsys, skipped=()) -> list[int]:
    """The steps that got a line, of the first 200 of a run."""
    now = 0.0
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: now)
    monkeypatch.setattr(run_log, "peak_flops", lambda *_: None)
    log = run_log.RunLog(parse_args(["--max_iters", str(max_iters)], world_size=1), abstract_mesh())
    for step in range(min(200, max_iters)):
        now += seconds_per_step
        report = StepReport(2.0, 0.0, 1.0, step in skipped)
        log.write({"step": step, "loss": 2.0, "tokens_per_s": 1.0}, report)
    return [int(line.split("/")[0].removeprefix("step")) for line in capsys.readouterr().out.splitlines()]


def test_a_fast_run_gets_about_twenty_lines(monkeypatch, capsys):
    assert steps_said(0.001, 200, monkeypatch, capsys) == [1, *range(10, 201, 10)]


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
