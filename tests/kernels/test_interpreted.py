"""Plain `pytest` tests the Triton kernels too: this runs tests/kernels once more, with TRITON_INTERPRET=1, and what
watches the interpreter.

Triton decides at import whether a kernel is interpreted, so that takes a process of its own. To work on a kernel, run
`TRITON_INTERPRET=1 pytest tests/kernels`, which says more.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree

from tests.kernels.cases import all_cases
from tests.kernels.parity import dtype_name


def test_the_triton_kernels_pass_in_the_interpreter(tmp_path, pytestconfig):
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels",
        "tests/offgpu/interpreter",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    command += ["--ignore=tests/kernels/test_mutations.py", f"--junitxml={report}"]  # mutations run in this session
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True)
    summary = run.stdout[-10_000:] + run.stderr[-2_000:]
    assert run.returncode == 0, f"TRITON_INTERPRET=1 pytest tests/kernels:\n{summary}"

    names = {test.get("name") for test in xml.etree.ElementTree.parse(report).iter("testcase")}
    rows = {f"{case.op}-{case.name}-{dtype_name(dtype)}" for case in all_cases() for dtype in case.dtypes}
    missing = {row for row in rows if f"test_fused_is_as_exact_as_plain[interpreter-{row}]" not in names}
    assert not missing, f"rows of the parity table that did not run in the interpreter: {sorted(missing)}"
    print(run.stdout.splitlines()[-1])
