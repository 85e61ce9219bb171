"""What a terminal's encoding lacks is printed as an escape: by every script that prints text of the user's."""

import ast
import io
import sys
from pathlib import Path

import pytest

from heiretsu.data.terminal import escape_what_cannot_be_printed

ROOT = Path(__file__).parents[2]
SCRIPTS = ["train.py", "sample.py", "data/prepare.py", "data/fineweb.py", "bench/kernels.py", "bench/train.py"]
SCRIPTS += ["bench/plot_run.py", "bench/plot_schedule.py"]


@pytest.mark.parametrize("encoding, written", [("ascii", r"\xe9\u4e26\udcff"), ("latin-1", r"é\u4e26\udcff")])
def test_a_character_that_the_terminal_lacks_is_escaped(monkeypatch, encoding, written):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    escape_what_cannot_be_printed()
    print("é並\udcff", end="", flush=True)  # the last: a byte of a file's name that is no UTF-8
    assert raw.getvalue() == written.encode(encoding)


def test_what_stands_in_for_standard_output_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    escape_what_cannot_be_printed()
    print("並", end="")
    assert sys.stdout.getvalue() == "並"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_does_so_before_it_prints(script):
    (main,) = (node for node in ast.parse((ROOT / script).read_text(encoding="utf-8")).body if is_main(node))
    calls = [node.func.id for node in ast.walk(main) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    ours, prints = calls.index("escape_what_cannot_be_printed"), [i for i, name in enumerate(calls) if name == "print"]
    assert all(ours < i for i in prints)


def is_main(node) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "main"
