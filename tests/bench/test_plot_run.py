"""Run logs become a picture; broken logs become a message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from heiretsu.bench import plot_run

ROOT = Path(__file__).parents[2]


def write_log(path, steps=120, **changes):
    records = []
    for step in range(1, steps + 1):
        record = {"step": step, "loss": 4 + 6 / step, "grad_norm": 1 / step, "lr": 1e-3, "tokens_per_s": 4000.0}
        if step % 40 == 0:
            record["eval_loss"] = 4.1 + 6 / step
        records.append(record | changes)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_picture_is_written_from_two_logs(tmp_path):
    logs = [write_log(tmp_path / "plain.jsonl"), write_log(tmp_path / "fused.jsonl", aux_loss=1.0)]
    out = tmp_path / "charts" / "run.png"
    command = [sys.executable, ROOT / "bench" / "plot_run.py", *logs, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


def test_every_curve_of_every_run_is_drawn(tmp_path):
    runs = {name: plot_run.read_log(write_log(tmp_path / name, aux_loss=1.0)) for name in ("a", "b")}
    axes = {axis.get_title(loc="left"): axis for axis in plot_run.draw(runs).axes}
    assert set(axes) == {"Loss", "Gradient norm", "Tokens per second", "Learning rate", "MoE balance loss"}
    for title, axis in axes.items():
        steps_drawn = [len(line.get_xdata()) for line in axis.lines]
        assert steps_drawn.count(120) >= 2, title
    assert [len(line.get_xdata()) for line in axes["Loss"].lines].count(3) == 2  # eval_loss, where it was measured


def test_panels_without_data_are_left_out(tmp_path):
    curves = plot_run.read_log(write_log(tmp_path / "run.jsonl", grad_norm=None, tokens_per_s=None, aux_loss=0.0))
    titles = [axis.get_title(loc="left") for axis in plot_run.draw({"run": curves}).axes]
    assert titles == ["Loss", "Learning rate"]


def test_resumed_steps_are_drawn_once_and_a_torn_last_line_is_dropped(tmp_path):
    log = tmp_path / "run.jsonl"
    log.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 9.0}\n{"step": 2, "loss": 4.0}\n{"step": 3, "lo')
    assert plot_run.read_log(log) == {"loss": [(1, 5.0), (2, 4.0)]}


def test_values_that_are_not_finite_are_left_out(tmp_path):
    log = tmp_path / "run.jsonl"
    log.write_text('{"step": 1, "loss": NaN, "grad_norm": Infinity}\n{"step": 2, "loss": 4.0, "grad_norm": 1.0}\n')
    assert plot_run.read_log(log) == {"loss": [(2, 4.0)], "grad_norm": [(2, 1.0)]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step 1 loss 3\n{}\n", "run.jsonl:1 is not a JSON object with a step"),
        ('{"loss": 3}\n{"step": 2, "loss": 1}\n', "run.jsonl:1 is not a JSON object with a step"),
        ('{"step": 1}\n', "no step with a finite loss"),
        ("", "no step with a finite loss"),
    ],
)
def test_broken_log_is_named(tmp_path, text, message):
    log = tmp_path / "run.jsonl"
    log.write_text(text)
    with pytest.raises(ValueError, match=message):
        plot_run.read_log(log)


def test_smoothing_keeps_a_line_and_does_not_lag():
    line = [0.5 * i for i in range(50)]
    assert plot_run.smooth(line, 9) == pytest.approx(line)
    assert plot_run.smooth([0.0] * 10 + [1.0] + [0.0] * 10, 5)[8:13] == pytest.approx([0.2] * 5)


def test_runs_of_the_same_name_are_told_apart():
    assert plot_run.labels_for([Path("a/run.jsonl"), Path("b/run.jsonl")]) == ["a/run.jsonl", "b/run.jsonl"]
    assert plot_run.labels_for([Path("a/plain.jsonl"), Path("b/fused.jsonl")]) == ["plain", "fused"]
