"""What data/prepare.py takes on its command line, and that it starts at all."""

import inspect
import subprocess
import sys
import sysconfig
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from heiretsu.data import prepare as script
from heiretsu.data.prepare import prepare

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["prepare.py", "fineweb.py"])
def test_uninstalled_checkout_says_in_one_line_how_to_install(name, tmp_path):
    """`python -S` skips the .pth file of the editable install."""
    environment = {"PYTHONPATH": sysconfig.get_paths()["purelib"], "PATH": ""}
    command = [sys.executable, "-S", ROOT / "data" / name]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "pip install -e ." in done.stderr


def test_no_file_here_hides_a_module_from_the_scripts():
    """`python data/prepare.py` puts data/ first on the path, so data/random.py would be everybody's `random`."""
    ours = {path.stem for path in (ROOT / "data").glob("*.py")} - {"__init__"}
    assert "prepare" in ours
    assert ours & (set(sys.stdlib_module_names) | set(packages_distributions())) == set()


def test_flags_have_their_defaults_and_arrive_as_given(monkeypatch):
    monkeypatch.setattr(script.os, "sched_getaffinity", lambda process: set(range(6 if process == 0 else 7)))
    defaults = vars(script._parse(["a.txt", "b.txt", "--out", "there"]))
    assert defaults == {
        "files": ["a.txt", "b.txt"],
        "out": "there",
        "tokenizer": "gpt2",
        "vocab_dir": None,
        "val_fraction": 0.05,
        "val_files": [],
        "separator": None,
        "shard_tokens": 100_000_000,
        "workers": 6,
        "overwrite": False,
    }
    signature = inspect.signature(prepare).parameters
    for name in ("tokenizer", "vocab_dir", "val_fraction", "separator", "shard_tokens", "overwrite"):
        assert signature[name].default == defaults[name], name
    assert [signature[name].default for name in ("val_files", "workers", "progress")] == [(), 1, False]
    given = (
        "--tokenizer bytes --vocab_dir v --val_fraction 0.5 --val_files c d --separator s --shard_tokens 7 --workers 3"
    )
    assert vars(script._parse(["a", "--out", "o", *given.split(), "--overwrite"])) == {
        "files": ["a"],
        "out": "o",
        "tokenizer": "bytes",
        "vocab_dir": "v",
        "val_fraction": 0.5,
        "val_files": ["c", "d"],
        "separator": "s",
        "shard_tokens": 7,
        "workers": 3,
        "overwrite": True,
    }
    monkeypatch.setattr(script.os, "sched_getaffinity", lambda process: set(range(64)))
    assert script._parse(["a", "--out", "o"]).workers == 32
    monkeypatch.delattr(script.os, "sched_getaffinity")
    for cores, workers in ((5, 5), (None, 1)):
        monkeypatch.setattr(script.os, "cpu_count", lambda cores=cores: cores)
        assert script._parse(["a", "--out", "o"]).workers == workers


@pytest.mark.parametrize("arguments", [["--out", "o"], ["a"], ["a", "--out", "o", "--tokenizer", "words"]])
def test_flags_that_are_missing_or_wrong_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        script._parse(arguments)
    assert "prepare.py: error: " in capsys.readouterr().err


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        script._parse(["--help"])
    assert "(default: 100000000)" in capsys.readouterr().out
