"""What a run says where there is no terminal to draw a bar on."""

import json

import pytest

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


def mfu(tmp_path, flags: str, mesh) -> float:
    """What the log file says of a step of a million tokens a second."""
    path = tmp_path / "log.jsonl"
    log = run_log.RunLog(parse_args([*flags.split(), "--log_file", str(path)], world_size=mesh.world.size), mesh)
    log.write({"step": 0, "loss": 2.0, "tokens_per_s": 1e6}, StepReport(2.0, 0.0, 1.0, False))
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
