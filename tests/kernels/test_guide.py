"""docs/adding-a-kernel.md is true: its code, put into a copy of the tree where it says, is an op that passes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import forms

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/adding-a-kernel.md").read_text()
# "`kernels/plain.py`", the last file named in the sentence before a block of code.
BLOCKS = re.findall(r"`([\w/]+\.py)`[^`\n]*(?:\n[^`\n]+)*\n\n```python\n(.*?)```", GUIDE, re.S)
AUDIT = re.findall(r"```python\n(import torch\n\nfrom heiretsu\.kernels import fused.*?)```", GUIDE, re.S)
TABLE = dict(re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", GUIDE, re.M))


def test_the_guide_has_code_for_each_file_of_its_table_and_for_no_other():
    assert [file for file, _ in BLOCKS] == [*TABLE] and len(AUDIT) == 1
    for file, code in BLOCKS:
        compile(code, file, "exec")
        assert (ROOT / file).exists() != TABLE[file].startswith("new:"), file


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A tree with the op: copies of kernels/ and tests/, where code was put, and all other folders themselves."""
    folder = tmp_path_factory.mktemp("guide") / "tree"
    for name in ("kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("parallel", "model", "data", "run", "offgpu", "bench", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "tests/kernels" / Path(__file__).name).unlink()
    for file, code in BLOCKS:
        before = (folder / file).read_text() + "\n\n" if (folder / file).exists() else ""
        (folder / file).write_text(before + code)
    return folder


def run(folder, *command, **variables):
    site = folder / "tests/mutation/site"  # makes heiretsu this tree's, in every process
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON_INT"))}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_its_tests_pass(copy, interpreted):
    if interpreted == "1" and not forms.HAS_TRITON:
        pytest.skip("there is no Triton")
    tests = ["tests/kernels", "-k", "squared_relu", "-p", "no:cacheprovider"]
    tests += [f"--ignore=tests/kernels/{name}.py" for name in ("test_mutations", "test_interpreted")]  # see below
    said = run(copy, "-m", "pytest", "-q", *tests, TRITON_INTERPRET=interpreted)
    assert int(re.search(r"(\d+) passed", said)[1]) > 20, said


@pytest.mark.full
@pytest.mark.skipif(not forms.HAS_TRITON, reason="there is no Triton")
def test_its_planted_bugs_are_caught(copy):
    said = run(copy, "-m", "tests.kernels.mutation_runner", "squared_relu")
    assert said.count("caught: squared_relu.py:") == 3, said


@pytest.mark.full
@pytest.mark.skipif(not forms.HAS_TRITON, reason="there is no Triton")
def test_what_it_launches_compiles_without_spilling(copy):
    rows = run(copy, "-c", AUDIT[0]).split("\n")[:-1]
    assert len(rows) == 2
    for row in rows:
        name, registers, spilled, bound = row.split()
        assert name == "squared_relu" and int(registers) < 128 and int(spilled) == 0 and float(bound) > 1.0, row
