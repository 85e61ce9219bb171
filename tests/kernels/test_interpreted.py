"""Plain `pytest` tests the Triton kernels too: this runs tests/kernels once more, with TRITON_INTERPRET=1, and what
watches the interpreter.

Triton decides at import whether a kernel is interpreted, so that takes a process of its own. To work on a kernel, run
`TRITON_INTERPRET=1 pytest tests/kernels`, which says more.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree

import pytest

from tests.kernels.cases import all_cases
from tests.kernels.parity import dtype_name


def names_of_passed(root, tmp_path, marked, *folders) -> set[str]:
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", *folders, "-m", marked, "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--ignore=tests/kernels/test_mutations.py", f"--junitxml={report}"]  # mutations run in this session
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"TRITON_INTERPRET=1 pytest:\n{run.stdout[-10_000:]}{run.stderr[-2_000:]}"
    print(run.stdout.splitlines()[-1])
    return {test.get("name") for test in xml.etree.ElementTree.parse(report).iter("testcase")}


def test_the_triton_kernels_pass_in_the_interpreter(tmp_path, pytestconfig):
    names = names_of_passed(pytestconfig.rootpath, tmp_path, "not full", "tests/kernels", "tests/offgpu/interpreter")
    rows = {f"{case.op}-{case.name}-{dtype_name(dtype)}" for case in all_cases() for dtype in case.dtypes}
    missing = {row for row in rows if f"test_fused_is_as_exact_as_plain[interpreter-{row}]" not in names}
    assert not missing, f"rows of the parity table that did not run in the interpreter: {sorted(missing)}"


@pytest.mark.full
def test_other_orders_of_programs_and_far_strides_pass_in_the_interpreter(tmp_path, pytestconfig):
    names = names_of_passed(pytestconfig.rootpath, tmp_path, "full", "tests/kernels/interpreter")
    assert {name.partition("[")[0] for name in names} == {
        "test_every_order_of_programs_gives_the_same_bits_and_no_finding",
        "test_far_operands_give_the_bits_of_compact_ones",
    }
