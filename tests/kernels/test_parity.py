"""The parity table, one test for each form x op x case x dtype."""

import pytest

from heiretsu.kernels import fused
from tests.kernels import forms
from tests.kernels.cases import all_cases
from tests.kernels.parity import check, dtype_name

ROWS = [
    pytest.param(form, case, dtype, id=f"{form}-{case.op}-{case.name}-{dtype_name(dtype)}")
    for form in forms.available()
    for case in all_cases()
    for dtype in case.dtypes
]


@pytest.mark.parametrize(("form", "case", "dtype"), ROWS)
def test_fused_is_as_exact_as_plain(form, case, dtype):
    check(case, dtype, getattr(fused, case.op), forms.DEVICE[form])
