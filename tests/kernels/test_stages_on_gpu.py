"""On a GPU: software pipelining changes no result. Each case with one stage, against the shipped number of stages.

The arithmetic and its order are the same, so the rule applies with a plain that makes no error: a few ulps. No CPU-only
way to run a kernel sees what ptxas and the hardware make of a pipeline. Collected only where there is a GPU.
"""

import pytest

from heiretsu.kernels.gpu import launch
from tests.kernels import forms
from tests.kernels.cases import all_cases
from tests.kernels.parity import check, compare, dtype_name, run

ROWS = [
    pytest.param(case, dtype, id=f"gpu-{case.op}-{case.name}-{dtype_name(dtype)}")
    for case in all_cases()
    for dtype in case.dtypes
]


@pytest.mark.parametrize(("case", "dtype"), ROWS)
def test_one_stage_gives_what_the_shipped_stages_give(case, dtype):
    kernel = forms.triton_form(case.op)
    shipped = run(case, dtype, kernel, "cuda")
    with launch.override(num_stages=1):
        check(case, dtype, kernel, "cuda")
        one_stage = run(case, dtype, kernel, "cuda")
    for name, tensor in one_stage.items():
        if tensor is None:
            assert shipped[name] is None
        else:
            assert not (message := compare(tensor, shipped[name], shipped[name]).message), f"{name}: {message}"
