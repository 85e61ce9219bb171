"""Small cases of the parity table, sanitized in every order of programs: no stray access, no race, the same bits."""

import pytest
import torch

from heiretsu.offgpu.interpreter.sanitizer import ORDERS, sanitize
from tests.kernels.cases import all_cases
from tests.kernels.forms import triton_form
from tests.kernels.parity import Case, build, dtype_name, run, same_bits

SMALL = 1 << 13  # elements of all inputs together; the sanitizer looks at every access, so larger ones take long


def _is_small(case):
    return (
        sum(value.numel() for value in build(case, case.dtypes[0]).values() if isinstance(value, torch.Tensor)) <= SMALL
    )


ROWS = [
    pytest.param(c, id=f"interpreter-{c.op}-{c.name}-{dtype_name(c.dtypes[0])}") for c in all_cases() if _is_small(c)
]


@pytest.mark.full
@pytest.mark.parametrize("case", ROWS)
def test_every_order_of_programs_gives_the_same_bits_and_no_finding(case: Case):
    results = {}
    for order in ORDERS:
        with sanitize(order, seed=len(case.name)):
            results[order] = run(case, case.dtypes[0], triton_form(case.op))
    for order in ORDERS[1:]:
        for name, tensor in results["forward"].items():
            same = same_bits(tensor, results[order][name])
            assert same, f"{name} depends on the order of programs: {order} differs from forward"
