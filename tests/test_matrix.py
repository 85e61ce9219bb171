"""`make matrix` without an index: what it refuses to install, what it takes instead, and how a failure shows."""

import json
import re
import subprocess
import sys

import pytest

from tests import matrix
from tests.matrix import Pair, Seen, Step

NEWEST = Pair("9.1.0", "8.2.0")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text("{}")  # pip's, beside what was seen
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "matrix.md")
    monkeypatch.setattr(Pair, "folder", property(lambda pair: tmp_path / f"torch-{pair.torch}-triton-{pair.triton}"))
    monkeypatch.setattr(Pair, "python", sys.executable)


def pip_answering(monkeypatch, names=(), stderr="", stdout=""):
    """pip, asked for a plan, names these packages; with stderr, it fails."""

    def pip(python, *arguments):
        assert "--dry-run" in arguments, "nothing may be installed before the plan is known"
        plan = arguments[arguments.index("--report") + 1]
        with open(plan, "w") as file:
            json.dump({"install": [{"metadata": {"name": name}} for name in names]}, file)
        return subprocess.CompletedProcess(arguments, 1 if stderr else 0, stdout, stderr)

    monkeypatch.setattr(matrix, "_pip", pip)


def test_a_cuda_build_is_not_installed(monkeypatch):
    pip_answering(monkeypatch, ["torch", "triton", "nvidia-cublas", "cuda-toolkit", "filelock"])
    assert matrix.make(NEWEST, "") == "only a CUDA build of torch 9.1.0 is to be had here, with 2 packages of CUDA's"
    pip_answering(monkeypatch, ["torch", "triton", "filelock"])
    assert matrix.refusal(["install"], NEWEST) == ""


def test_what_pip_cannot_find_is_said_in_its_words_with_the_machine_s_own_constraint(monkeypatch):
    pip_answering(
        monkeypatch, stderr="WARNING: x\nERROR: No torch==9.1.0\n", stdout="requested (constraint) torch<=8\n"
    )
    assert matrix.make(NEWEST, "") == "No torch==9.1.0 (constraint torch<=8)"


def test_a_triton_whose_torch_is_not_to_be_had_is_taken_beside_the_tested_torch(monkeypatch, capsys):
    pinned = matrix.pins()
    taken = []
    monkeypatch.setattr(matrix, "make", lambda pair, index: "no build" if pair.torch != pinned["torch"] else "")

    def take(pair, name):
        taken.append((pair, name))
        return Seen(name, name != "emulated", "3 passed", 2.4, "c0ffee")

    monkeypatch.setattr(matrix, "take", take)
    beside = Pair(pinned["torch"], NEWEST.triton)
    assert matrix.main(["--pairs", str(NEWEST), "--index", ""]) == 1  # emulated failed
    assert taken == [(beside, name) for name in matrix.STEPS if matrix.STEPS[name].of_triton]
    printed = capsys.readouterr().out
    assert "9.1.0/8.2.0: not installed: no build\n" in printed
    assert "| 9.1.0 | 8.2.0 | - | not installed: no build |  |  |" in matrix.PAGE.read_text()
    assert f"| {beside.torch} | 8.2.0 | compiled | 3 passed | 2 | c0ffee |" in matrix.PAGE.read_text()
    # The tested pair itself is not taken twice, and what was seen of another pair stays on the page.
    taken.clear()
    assert matrix.main(["--pairs", f"9.1.0/{pinned['triton']}", "--steps", "compiled"]) == 0
    assert taken == [] and "8.2.0 | compiled" in matrix.PAGE.read_text()


def test_a_step_ends_with_its_first_failure_and_says_where_to_read_on(monkeypatch):
    script = "import os, sys; print('3 passed in 0.1s'); assert os.environ['TRITON_INTERPRET'] == '1'; sys.exit(%d)"
    commands = tuple(("-c", text) for text in (script % 0, script.replace("3", "4") % 3, script % 0))
    monkeypatch.setitem(matrix.STEPS, "interpreted", Step(commands, interpret=True))
    NEWEST.folder.mkdir()
    monkeypatch.setattr(matrix, "ROOT", NEWEST.folder.parent)
    seen = matrix.take(NEWEST, "interpreted")
    log = NEWEST.folder / "interpreted.log"
    assert not seen.passed and seen.says == f"FAILED (3): 4 passed; see {log.relative_to(matrix.ROOT)}"
    assert log.read_text().count("$ python -c") == 2
    monkeypatch.setitem(matrix.STEPS, "interpreted", Step(commands[:1], interpret=True))
    seen = matrix.take(NEWEST, "interpreted")
    assert seen.passed and seen.says == "3 passed"


def test_every_file_that_a_step_names_is_there():
    for step in matrix.STEPS.values():
        for command in step.commands:
            files = [word for word in command if word.startswith(("tests/", "bench/"))]
            assert all((matrix.ROOT / file).exists() for file in files), command
            assert files or command[0] == "-m", command


def test_the_pairs_begin_with_the_oldest_that_we_promise_and_hold_the_tested_one():
    oldest = dict(re.findall(r'"(torch|triton)>=([\d.]+)', (matrix.ROOT / "pyproject.toml").read_text()))
    assert matrix.PAIRS[0].torch.startswith(oldest["torch"] + ".") and matrix.PAIRS[0].triton.startswith(
        oldest["triton"]
    )
    pinned = matrix.pins()
    assert Pair(pinned["torch"], pinned["triton"]) in matrix.PAIRS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pairs", "2.13.0"], "'2.13.0' is no TORCH/TRITON, as in 2.11.0/3.6.0"),
        (["--pairs", "2.13.0/3.7.1,x"], "'2.13.0/3.7.1,x' is no TORCH/TRITON"),
        (["--steps", "lint,all"], "all is none of lint, compiled, interpreted, emulated, parity"),
    ],
)
def test_what_it_does_not_know_is_refused_in_a_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as raised:
        matrix.main(arguments)
    assert raised.value.code == 2 and says in capsys.readouterr().err
