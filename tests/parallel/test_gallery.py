"""Each planted fault is caught by the check that it names, and without the fault that check is silent."""

import pytest

from tests.gallery import FAULTS, check


@pytest.mark.full
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught_by_its_check(ranks, name):
    fault = FAULTS[name]
    found = check(name, fault, ranks)
    assert fault.caught_by in found, f"the {fault.caught_by!r} check missed it; found: {found}"
    assert check(None, fault, ranks) == {}
    print(f"{name}: caught by {', '.join(sorted(found))}")
