"""`python bench/gpu.py`: what it refuses, what it does with processes that die, hang or are over their time, and a
whole rehearsal. The processes of all tests but the last import no torch."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from heiretsu.bench import gpu
from heiretsu.bench.gpu_kit import lines
from heiretsu.bench.gpu_kit.plan import PARTS, Group, Part
from heiretsu.bench.gpu_kit.record import FILE, read
from heiretsu.bench.gpu_kit.runner import Runner

ROOT = Path(__file__).parents[2]

# Stands for heiretsu.bench.gpu_kit.worker: items that need no torch. What was begun is not begun again, as there.
WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from heiretsu.bench.gpu_kit.record import Record, read
out, part, group, items = Path(sys.argv[1]), *sys.argv[2:5]
record = Record(out, part, group)
begun = {line["name"] for line in read(out) if line["what"] == "begin" and line["part"] == part}
for name in items.split(","):
    if name in begun:
        continue
    record.write("begin", name, limit_s=1.5 if name == "hang" else 600)
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif name in ("hang", "endless"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        record.write("fact", "child", value=child.pid)
        time.sleep(600)
    elif name == "exit":
        sys.exit("no such thing")
    record.write("check", name, ok=True, detail="")
    record.write("end", name)
"""


class Pretend(Runner):
    """Runs WORKER in place of the kit's."""

    items = "a,b"

    def _command(self, part, group, number, count):
        return [sys.executable, "-c", WORKER, str(self.out), part, group.name, self.items]


def pretend(tmp_path, monkeypatch, items, minutes=5.0, **options) -> list[dict]:
    """A part whose one process has these items to do; the lines."""
    monkeypatch.setitem(PARTS, "facts", Part(1.0, ((Group("only"),),)))
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir(), scratch.mkdir()
    runner = Pretend(out, scratch, minutes, rehearse=True, say=lambda line: None, **options)
    runner.items = items
    runner.run(["facts"])
    return read(out)


def names(found, what):
    return [line["name"] for line in found if line["what"] == what]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_process_that_dies_loses_its_item_alone(tmp_path, monkeypatch):
    found = pretend(tmp_path, monkeypatch, "a,crash,b")
    assert names(found, "check") == ["a", "b"]
    (failure,) = lines.failures(found)
    assert (failure["name"], failure["kind"]) == ("crash", "died") and "SIGSEGV" in failure["detail"]


def test_the_last_word_of_a_process_that_gave_up_is_in_the_failure(tmp_path, monkeypatch):
    (failure,) = lines.failures(pretend(tmp_path, monkeypatch, "exit"))
    assert failure["detail"] == "its process ended with status 1: no such thing"


def test_an_item_that_hangs_is_ended_with_what_it_started_and_the_next_has_its_turn(tmp_path, monkeypatch):
    found = pretend(tmp_path, monkeypatch, "a,hang,b")
    assert names(found, "check") == ["a", "b"]
    (failure,) = lines.failures(found)
    assert (failure["name"], failure["kind"]) == ("hang", "over time")
    assert gone(next(line["value"] for line in found if line["name"] == "child"))


def test_a_part_over_its_time_is_ended_and_what_it_had_is_in_the_report(tmp_path, monkeypatch):
    found = pretend(tmp_path, monkeypatch, "a,endless,b", minutes=8 / 60, grace_s=1.0)
    assert names(found, "check") == ["a"] and names(found, "begin") == ["a", "endless"]
    (failure,) = lines.failures(found)
    assert (failure["name"], failure["kind"]) == ("endless", "over time") and "the part is over its time" in failure[
        "detail"
    ]
    assert gone(next(line["value"] for line in found if line["name"] == "child"))
    summary = gpu.report.write(tmp_path / "out")
    assert "1 of 1 checks hold" in summary.text and "endless: over time" in summary.text.splitlines()[1]


def test_time_that_a_part_leaves_goes_to_the_later_ones(tmp_path, monkeypatch):
    said = []
    for name in ("facts", "right"):
        monkeypatch.setitem(PARTS, name, Part(1.0, ((Group("only"),),)))
    runner = Pretend(tmp_path, tmp_path, 10.0, rehearse=True, say=said.append)
    runner.run(["facts", "right"])
    first, second = (float(line.split()[-2]) for line in said)
    assert 290 < first < 300 and second > first + 200


def test_sigterm_ends_the_workers_and_leaves_a_report(tmp_path):
    program = f"""
        import sys
        from heiretsu.bench import gpu
        sys.path.insert(0, {str(ROOT)!r})
        from tests.bench.test_gpu import Pretend
        Pretend.items = "a,endless,b"
        gpu.Runner = Pretend
        sys.exit(gpu.main(["--out", {str(tmp_path / "out")!r}, "--rehearse", "--parts", "facts,several"]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 200
    while "child" not in names(read(tmp_path / "out"), "fact"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output
    found = read(tmp_path / "out")
    assert names(found, "check") == ["a"]
    assert gone(next(line["value"] for line in found if line["name"] == "child"))
    assert "FAILURES: 1" in output and "stopped: SIGTERM before it had ended" in output
    assert "not run: right, proof, fast, train, several" in (tmp_path / "out/summary.txt").read_text()


def test_a_run_that_was_cut_off_gets_its_report_afterwards(tmp_path, capsys):
    line = {"part": "right", "group": "rows", "worker": 0, "time": 0, "what": "check", "name": "row x", "ok": False}
    (tmp_path / FILE).write_text(json.dumps({**line, "detail": "off by 3"}) + '\n{"part": "ri')
    assert gpu.main(["--report", str(tmp_path)]) == 1
    assert "row x: wrong: off by 3" in capsys.readouterr().out
    assert "| right | row x | wrong | off by 3 |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--out {new} --parts right,quick", "there is no part quick; the parts are facts, right,"),
        ("--rehearse", "--out DIR is missing"),
        ("--out {used} --rehearse", "holds an earlier run: name a new folder"),
        ("--out {new} --rehearse --minutes 0", "--minutes 0 must be above 0"),
        ("--report {new}", "there is no figures.jsonl in it"),
        ("--out {new} --parts ,", "--parts names no part"),
        ("--out {new}", "there is no GPU here"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, reason):
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    (tmp_path / FILE).touch()
    with pytest.raises(SystemExit) as exit:
        gpu.main(flags.format(new=tmp_path / "new", used=tmp_path).split())
    assert exit.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("gpu.py: error:") or "error:" in last
    assert reason in last


@pytest.mark.full
def test_a_rehearsal_runs_every_part_without_what_a_rented_machine_may_lack(tmp_path):
    """All of the kit's code, in a Python that has no tqdm, tiktoken, wandb and so on."""
    absent = ["liger_kernel", "modal", "rich", "tiktoken", "tqdm", "transformers", "wandb"]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n")
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "bench/gpu.py"), "--out", str(out), "--rehearse"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    log = (out / "log.txt").read_text() if (out / "log.txt").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log[-6000:]

    found = read(out)
    assert lines.failures(found) == []
    begun, ended = names(found, "begin"), names(found, "end")
    assert sorted(begun) == sorted(ended)
    assert [name for name in names(found, "absent") if name.endswith(" items")] == [], (
        "no item was left for want of time"
    )
    groups = {(line["part"], line["group"]) for line in found if line["what"] == "begin"}
    assert groups == {(part, group.name) for part, how in PARTS.items() for phase in how.phases for group in phase}
    for part in set(PARTS) - {"right"}:
        assert lines.figures(found, part), f"{part} has no figure"
    assert len(lines.of(found, "check", "right")) > 20
    left_out = set(names(found, "absent"))
    assert {"liger-kernel", "tiktoken", "tqdm", "wandb", "rich", "transformers"} <= left_out

    summary = (out / "summary.txt").read_text().splitlines()
    assert summary[0] == "no failures" and len(summary) <= 45
    assert [line.split()[0] for line in summary if line.startswith("  ")][: len(PARTS)] == list(PARTS)
    text = (out / "report.md").read_text()
    for heading in (
        "Targets",
        "Facts and roofs",
        "Right",
        "Proof: registers",
        "Fast",
        "Train",
        "Several GPUs",
        "Left out",
    ):
        assert f"## {heading}" in text, heading
    charts = {"roofline.png", "speedup.png", "time.png"}
    texts = {"figures.jsonl", "log.txt", "report.md", "summary.txt"}
    assert {path.name for path in out.iterdir()} == charts | texts | {"trace.json.gz"}
