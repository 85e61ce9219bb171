"""The compile audit sees what it is there to see: each planted fault by name, and nothing in the sound kernels.

Everything is compiled ahead of time for machines that are not here; nothing runs. The compiling happens in a process of
its own, because with TRITON_INTERPRET=1 this one has nothing to compile.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KERNELS = Path(__file__).with_name("audit_kernels.py")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


def audit(*arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "bench" / "kernels.py"), "--audit", "--jobs", "1", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    files = {"--json": folder / "audit.json", "--output": folder / "audit.md"}
    arguments = [text for pair in files.items() for text in pair]
    done = audit("--arch", "sm_90", "--audit-file", KERNELS, *arguments)
    assert files["--json"].exists(), done.stderr
    rows = json.loads(files["--json"].read_text())["cases"]
    rows = {row["case"].removeprefix("audit_kernels_gemm ").removeprefix("audit_kernels_double "): row for row in rows}
    return done, rows, files["--output"].read_text()


FAULTS = {
    "spills": "bytes a thread, 0 allowed",
    "too much shared memory": "does not fit: 288 KiB",
    "wrong expectation": "closed form 524288",
    "slow tensor path": "mma.sync in the hot loop",
    "below its bar": "at least 0.95 wanted",
    "does not compile": "does not compile",
}
SOUND = ("sound", "spills within its allowance", "wide accesses", "narrow accesses")


def test_audit_with_failures_exits_with_one(audited):
    done, rows, _ = audited
    assert done.returncode == 1, done.stderr
    assert set(rows) == {*FAULTS, *SOUND}
    assert f"{len(FAULTS)} failures" in done.stdout


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_is_named(audited, case):
    _, rows, _ = audited
    assert len(rows[case]["failures"]) == 1, rows[case]["failures"]
    assert FAULTS[case] in rows[case]["failures"][0]


@pytest.mark.parametrize("case", SOUND)
def test_sound_kernels_pass(audited, case):
    assert audited[1][case]["failures"] == []


def test_figures_of_a_known_gemm(audited):
    row = audited[1]["sound"]
    assert (row["flops"], row["bytes"]) == (2 * 128 * 256 * 64, (128 + 256) * 64 * 2)
    assert row["shared_bytes"] == 3 * (128 + 256) * 64 * 2  # three stages of a tile of A and one of B
    assert row["mma"] == {"HGMMA": 4}  # 64 deep in steps of 16; each of 2 warp groups takes 64 rows, all 256 columns
    assert row["pipes"]["tensor"] == row["flops"] / 4096
    assert row["ctas_per_sm"] == 1 and row["occupancy"] == 8 / 64
    assert row["bound"] == 1.0


def test_narrow_accesses_are_seen(audited):
    wide, narrow = audited[1]["wide accesses"], audited[1]["narrow accesses"]
    assert (wide["wide_loads"], wide["wide_stores"]) == (1.0, 1.0)
    assert (narrow["wide_loads"], narrow["wide_stores"]) == (0.0, 0.0)


def test_report_is_markdown_with_a_row_for_each_case(audited):
    _, rows, text = audited
    assert all(re.search(rf"^\| audit_kernels_(gemm|double) {case} ", text, re.M) for case in rows)
    assert "nothing here was run on a GPU" in text
    assert "FAIL sm_90 audit_kernels_gemm spills: " in text


def test_unknown_machine_is_refused():
    done = audit("--arch", "sm_75")
    assert done.returncode == 2
    assert "sm_80, sm_90, sm_100, gfx942" in done.stderr
