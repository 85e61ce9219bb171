"""Fixtures of the kernel tests: poisoned scratch memory everywhere, and a mended interpreter where it is used."""

import pytest

from tests.kernels import forms
from tests.kernels.scratch import poisoned_scratch

if forms.INTERPRETED:
    from tests.kernels.interpreter import mend

    mend()

collect_ignore = [] if forms.INTERPRETED else ["interpreter"]


@pytest.fixture(autouse=True)
def scratch_memory_is_poisoned():
    with poisoned_scratch():
        yield
