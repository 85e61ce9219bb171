"""The mutation tool on a toy of a product: what it edits, what it finds, and that it leaves the tree alone."""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.mutation.__main__ import IMPORT, Session, _bundles, blamed_for, draw_edits, main, without
from tests.mutation.edits import edits_of
from tests.mutation.equal import read_equal
from tests.mutation.reach import Reach

ROOT = Path(__file__).parents[2]
THING = """
def clamp(x, limit=5):
    if x > limit:
        return limit
    return x


def countdown(n):
    while True:
        n = n - 1
        if n < 1:
            break
    return "done"


def never(n):
    return not n
"""
TESTS = """
import os
import pytest
from heiretsu.model.thing import clamp, countdown


@pytest.fixture(scope="module")
def clamped():
    return clamp(9)


def test_clamp(clamped):
    assert clamp(3) == 3 and clamped == 5


def test_countdown_in_another_process():
    pid = os.fork()
    if pid == 0:
        os._exit(countdown(3) != "done")
    assert os.waitpid(pid, 0)[1] == 0


def test_that_fails_without_any_edit():
    assert clamp(1) == 2
"""
WARM = ["--imports", "hypothesis", "_hypothesis_pytestplugin", "xdist.plugin", "_pytest.assertion.rewrite"]


@pytest.fixture
def toy(tmp_path):
    root = tmp_path / "toy"
    for folder in ("model", "tests/model", "tests/mutation"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()
    (root / "model/thing.py").write_text(THING)
    (root / "tests/model/test_thing.py").write_text(TESTS)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["full: slow"]\n')
    return root


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*.py")}


def test_it_finds_what_no_test_sees_and_leaves_the_tree_as_it_was(toy, capsys):
    before, out = contents(toy), toy.parent / "verdicts.json"
    lines = [f"model/thing.py:{line}" for line in (3, 12, 13, 17)]
    options = ["--root", str(toy), "--jobs", "1", "--json", str(out), "--patience", "1", *WARM]
    assert main([*options, "--edits", *lines]) == 0
    assert contents(toy) == before
    verdicts = {row["edit"].partition(": ")[2]: row for row in json.loads(out.read_text())}
    file = "tests/model/test_thing.py::"
    assert {edit: row["by"] for edit, row in verdicts.items()} == {
        "if x > limit:  ->  if x >= limit:": "2 tests",  # an equal program; a fixture of the file reaches it
        "if x > limit:  ->  if x <= limit:": f"{file}test_clamp",
        "break  ->  pass": f"{file}test_countdown_in_another_process",
        "return \"done\"  ->  return 'doneX'": f"{file}test_countdown_in_another_process",
        "return not n  ->  return n": "as no test reaches it",
    }
    assert [edit for edit, row in verdicts.items() if row["why"] == "time limit"] == ["break  ->  pass"]
    assert {edit for edit, row in verdicts.items() if not row["caught"]} == {
        "if x > limit:  ->  if x >= limit:",
        "return not n  ->  return n",
    }
    said = capsys.readouterr().out
    assert "NOT GREEN without an edit: tests/model/test_thing.py::test_that_fails_without_any_edit" in said
    assert "model/thing.py:17: return not n  ->  return n" in said.partition("Survivors:")[2]
    assert "3 of 5 caught (60.0%), 1 of them by the time limit" in said


def test_a_seed_draws_the_same_edits_and_none_that_is_listed_as_equal(tmp_path):
    (tmp_path / "equal.txt").write_text(
        "# at the limit both are the limit\nt.py\n- if x > limit:\n+ if x >= limit:\n"
        "# it is gone\nt.py\n- if y > limit:\n+ if y >= limit:\n"
    )
    edits = edits_of("t.py", THING)
    equal, unused = read_equal(tmp_path / "equal.txt", edits)
    assert [edit.after for edit in equal] == ["if x >= limit:"]
    assert unused == ["t.py: if y > limit:: if y >= limit:"]

    def draw(seed, count):
        options = argparse.Namespace(seed=seed, count=count, files=["*"], edits=None)
        return draw_edits(edits, equal, {"t.py": THING}, options)

    everything, skipped = draw(1, 100)
    assert set(everything) == set(edits) - equal and skipped == 1
    assert draw(1, 4) == draw(1, 4) != draw(2, 4) and len(draw(1, 4)[0]) == 4


def test_the_own_tests_come_first_then_the_quickest_and_those_that_speak_of_the_edit():
    (edit, *_) = (edit for edit in edits_of("model/thing.py", THING) if edit.before == "if x > limit:")
    own, quick, slow, kin = "tests/model/test_thing.py", "tests/a.py", "tests/b.py", "tests/c.py"
    seconds = {f"{own}::x": 9.0, f"{quick}::x": 1.0, f"{slow}::x": 20.0, f"{kin}::x": 4.0, f"{kin}::y": 40.0}
    words = {own: set(), quick: {"x"}, slow: {"x"}, kin: {"limit", "x"}}
    session = Session(Path(), {}, SimpleNamespace(seconds=seconds), words, budget_s=60.0)
    assert _bundles(edit, {*seconds}, set(), session) == (
        [{own: [f"{own}::x"]}, {quick: [f"{quick}::x"], kin: [f"{kin}::x", f"{kin}::y"]}], 1
    )  # fmt: skip
    without_kin = session.words | {kin: {"x"}}
    bundles, left_out = _bundles(edit, {*seconds}, set(), dataclasses.replace(session, words=without_kin))
    assert [list(bundle) for bundle in bundles] == [[own], [quick, slow, kin]] and left_out == 1


def test_who_imports_a_file_while_it_runs_is_asked_about_its_top():
    source = "LIMIT = 3\n\n\ndef f():\n    return LIMIT\n"
    tests = {"runs": [1, 4, 5], "imports": [1, 4], "does neither": []}
    module = {test: [1.0, {"a.py": lines} if lines else {}] for test, lines in tests.items()}
    reach = Reach({"a.py": source}, [{"sources": {"a.py": source}, "shared": {}, "tests": module}])
    top = [edit for edit in edits_of("a.py", source) if edit.line == 1]
    assert top and all(reach.tests(edit) == ({"runs"}, {"imports"}) for edit in top)


def test_what_fails_without_any_edit_is_left_out_and_the_rest_still_judges():
    bundle = {"a.py": ["a.py::x", "a.py::y"], "b.py": ["b.py::z"]}
    for test, blamed, left in (
        ("a.py::x", {"a.py": ["a.py::x"]}, {"a.py": ["a.py::y"], "b.py": ["b.py::z"]}),
        ("b.py::z", {"b.py": ["b.py::z"]}, {"a.py": ["a.py::x", "a.py::y"]}),
        ("a.py", {"a.py": [IMPORT]}, {"b.py": ["b.py::z"]}),
        ("collection", {"a.py": [IMPORT], "b.py": [IMPORT]}, {}),
        ("", bundle, {}),
    ):
        assert blamed_for(test, bundle) == blamed and without(bundle, blamed) == left


def test_a_killed_run_leaves_the_tree_and_no_process(toy):
    before = contents(toy)
    command = [
        sys.executable,
        "-m",
        "tests.mutation",
        "--root",
        str(toy),
        "--edits",
        "model/thing.py:10",
        "--jobs",
        "1",
    ]
    environment = {**os.environ, "TMPDIR": str(toy.parent)}
    run = subprocess.Popen(
        [*command, "--jobs", "1", *WARM], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert any("to try" in line for line in run.stdout)  # from here on it edits, and its first edit is an endless loop
    (copy,) = toy.parent.glob("heiretsu-mutate-*")
    deadline = time.monotonic() + 60
    while (copy / "tree/model/thing.py").read_text() == THING:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    while copy.exists():  # the warm process has seen it, has killed the test, and goes
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert contents(toy) == before


SOURCE = '''
def f(a: int, b=0.5, *, deep=True):
    """Text with 1 < 2."""
    if a < 3 and not b:
        raise ValueError(f"{a + 1} is wrong, at least {3}")
    x = [i for i in range(a) if i % 2]
    x[0] = g(a, b, key=-1)
    print("said", a)
    add("--flag", help="text", default=None)
    return "mode" if deep else x
'''


def test_edits_are_of_every_kind_and_leave_texts_alone():
    found = {(edit.line, edit.after) for edit in edits_of("f.py", SOURCE) if edit.is_edit(SOURCE)}
    lines = SOURCE.splitlines()
    for line, after in [
        (2, "def f(a: int, b=1.0, *, deep=True):"),
        (2, "def f(a: int, b=0.5, *, deep=False):"),
        (4, "if a <= 3 and not b:"),
        (4, "if a >= 3 and not b:"),
        (4, "if a < 4 and not b:"),
        (4, "if a < 3 or not b:"),
        (4, "if a < 3 and b:"),
        (4, "if (not (a < 3 and not b)):"),
        (5, "pass"),
        (5, 'raise ValueError(f"{a - 1} is wrong, at least {3}")'),
        (6, "x = [i for i in range(a) if i * 2]"),
        (6, "x = [i for i in range(a) if (not (i % 2))]"),
        (7, "pass"),
        (7, "x[0] = g(b, a, key=-1)"),
        (7, "x[0] = g(a, b)"),
        (7, "x[0] = g(a, b, key=1)"),
        (7, "x[1] = g(a, b, key=-1)"),
        (9, "add('--flagX', help=\"text\", default=None)"),
        (9, 'add("--flag", help="text")'),
        (10, "return 'modeX' if deep else x"),
        (10, 'return "mode" if (not (deep)) else x'),
    ]:
        assert (line, after) in found, f"{lines[line - 1].strip()}  ->  {after}"
    assert not [after for line, after in found if line in (3, 8)]  # a docstring; what is only printed
    assert all(edit.before == lines[edit.line - 1].strip() for edit in edits_of("f.py", SOURCE))


def test_an_equal_edit_needs_a_reason(tmp_path):
    path = tmp_path / "equal.txt"
    path.write_text("f.py\n- if a < 3 and not b:\n+ if a <= 3 and not b:\n")
    with pytest.raises(ValueError, match="has no reason"):
        read_equal(path, edits_of("f.py", SOURCE))


def test_what_is_listed_as_equal_can_be_read():
    read_equal(ROOT / "tests/mutation/equal.txt", [])
