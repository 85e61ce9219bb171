"""Bugs planted into one of our kernels, in its source or its compiled code: the emulator must report them."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from heiretsu.kernels.gpu.bias_gelu import bias_gelu
from heiretsu.offgpu.emulator import driver, installed

REPOSITORY = pathlib.Path(__file__).parents[3]
ROWS, COLUMNS = 70, 63  # two blocks of rows share one sum; no tile is whole

RUN = f"""
import sys, torch
from heiretsu.kernels.gpu import bias_gelu
from heiretsu.offgpu.emulator import PTXError, installed
assert bias_gelu.__file__.startswith(sys.argv[1]), bias_gelu.__file__
x, bias = torch.randn({ROWS}, {COLUMNS}, requires_grad=True), torch.randn({COLUMNS}, requires_grad=True)
with installed(target=int(sys.argv[2])) as gpu:
    try:
        bias_gelu.bias_gelu(x, bias).sum().backward()
    except PTXError:
        pass
print("kinds:", *sorted({{finding.kind for finding in gpu.findings}}))
"""

EDITS = {  # name: (text, replacement, finding)
    "nothing": ("", "", ""),
    "unmasked tail": ("tl.sum(total, 0), mask=cols < F)", "tl.sum(total, 0))", "oob"),
    "lost update": ("partial_ptr + row_block * F", "partial_ptr + row_block // 2 * F", "race-global"),
}


@pytest.mark.emulate_full
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("edit", EDITS)
def test_planted_in_the_source(edit, target, tmp_path):
    """A process of its own imports a copy of kernels/ with the edit: custom ops are registered once in a process."""
    text, replacement, kind = EDITS[edit]
    copy = tmp_path / "heiretsu" / "kernels"
    shutil.copytree(REPOSITORY / "kernels", copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / "gpu" / "bias_gelu.py").read_text()
    assert not text or source.count(text) == 1
    (copy / "gpu" / "bias_gelu.py").write_text(source.replace(text, replacement) if text else source)
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), str(target)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"kinds: {kind}".strip()


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_planted_missing_barriers_in_the_compiled_code(target, schedule, monkeypatch):
    """The sum over rows crosses warps through shared memory; without its barriers nothing orders them."""
    x, bias = torch.randn(ROWS, COLUMNS, requires_grad=True), torch.randn(COLUMNS, requires_grad=True)

    def kinds():
        with installed(target, schedule=schedule) as gpu:
            bias_gelu(x, bias).sum().backward()
        return {finding.kind for finding in gpu.findings}

    assert kinds() == set()
    find_ptx = driver._find_ptx
    monkeypatch.setattr(driver, "_find_ptx", lambda metadata: find_ptx(metadata).replace("bar.sync \t0;", ""))
    assert "race-shared" in kinds()
