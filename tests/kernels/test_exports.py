"""How others come by the ops: names in heiretsu.kernels, at no cost until they are asked for, with types."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import heiretsu.kernels
from heiretsu.kernels import fused, plain
from tests.kernels.samples import OPS

KERNELS = Path(heiretsu.kernels.__file__).parent


@pytest.mark.parametrize("op", OPS)
def test_the_package_exports_the_fast_forms(op):
    assert getattr(heiretsu.kernels, op) is getattr(fused, op) is not getattr(plain, op)


def test_what_is_no_op_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'heiretsu.kernels' has no attribute 'attentoin'"):
        _ = heiretsu.kernels.attentoin
    with pytest.raises(ImportError):
        from heiretsu.kernels import nothing  # noqa: F401


def test_importing_the_package_imports_neither_torch_nor_triton():
    """Nor does asking it for what Python's own tools ask every module for."""
    program = "import sys, heiretsu.kernels as ours; hasattr(ours, '__wrapped__'); "
    program += "sys.exit(str(len({'torch', 'triton'} & {*sys.modules})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "0", done.stderr


WITHOUT_TRITON = """
import importlib.util, sys

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else find_spec(name, *more)
sys.modules["triton"] = None  # an import of it fails

import torch
from heiretsu.kernels import bias_gelu, fused
from heiretsu.kernels.recording import recording
import heiretsu.run.tuning

x = torch.ones(2, 3, requires_grad=True)
with recording() as record:
    bias_gelu(x, torch.ones(3)).sum().backward()
assert x.grad is not None and len(record.calls) == 1 and not fused.HAS_TRITON
for first in (None, 3):
    try:
        fused.bias_gelu(first, x)
    except ValueError as error:
        print(error)
try:
    bias_gelu(x.to("meta"), torch.ones(3, device="meta"))
except ValueError as error:
    print(error)
"""


def test_the_cpu_forms_run_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "bias_gelu: x is None; it must be a tensor (..., F)",
        "bias_gelu: x is a int; it must be a tensor (..., F)",
        "bias_gelu: meta tensors need Triton; install it, or move them to the CPU",
    ], done.stderr


CALLS = """
from heiretsu.kernels import bias_gelu, fused
fused.attention(1, 2, 3)
bias_gelu(bias=None)
fused.dropout(x=None, p=0.1, sed=3)
gates, experts, more = fused.route(None, 2)
reveal_type(fused.linear_cross_entropy)
"""


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_the_type_checker_sees_the_specification_s_signatures(tmp_path):
    (tmp_path / "heiretsu").mkdir()
    (tmp_path / "heiretsu/kernels").symlink_to(KERNELS)
    (tmp_path / "calls.py").write_text(CALLS)
    command = [sys.executable, "-m", "mypy", "--config-file", KERNELS.parent / "pyproject.toml", "calls.py"]
    environment = os.environ | {"MYPYPATH": str(tmp_path)}
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    for line, words in enumerate(
        (
            'Argument 1 has incompatible type "int"; expected "Tensor"',
            "Too few arguments",
            'Unexpected keyword argument "sed"',
            "Need more than 2 values to unpack (3 expected)",
            "def (x: torch._tensor.Tensor, weight: torch._tensor.Tensor, targets: torch._tensor.Tensor, vocab_start:",
        ),
        start=3,
    ):
        assert any(told.startswith(f"calls.py:{line}: ") and words in told for told in said.splitlines()), said
