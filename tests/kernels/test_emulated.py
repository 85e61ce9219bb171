"""`pytest --emulate sm_80` (sm_90): tiny cases of the parity table, compiled by Triton and run by the emulator.

The emulator's reports (stray or misaligned accesses, races, unwritten shared memory, divergence) must be empty, forward
and backward, with warps in step and in random order. offgpu/emulator/__init__.py says what that does not prove.
"""

from heiretsu.offgpu.emulator import installed
from tests.kernels import forms
from tests.kernels.cases import all_cases
from tests.kernels.parity import check, dtype_name


def pytest_generate_tests(metafunc):
    target = metafunc.config.getoption("emulate")
    rows = {
        f"{target}-{schedule}-{case.op}-{case.name}-{dtype_name(dtype)}": (int(target[3:]), schedule, case, dtype)
        for case in all_cases()
        if case.emulate
        for dtype in case.dtypes
        for schedule in ("lockstep", "random")
    }
    metafunc.parametrize(("target", "schedule", "case", "dtype"), list(rows.values()), ids=list(rows))


def test_compiled_kernel_is_as_exact_as_plain(target, schedule, case, dtype):
    with installed(target=target, schedule=schedule, seed=1) as gpu:
        check(case, dtype, forms.triton_form(case.op))
    assert gpu.reports, "no kernel was launched"
    assert not gpu.findings, "\n".join(map(str, gpu.findings))
