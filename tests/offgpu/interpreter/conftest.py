"""These tests need a process of Triton's interpreter: TRITON_INTERPRET=1 pytest tests/offgpu/interpreter.

Plain `pytest` runs them in the second process that tests/kernels/test_interpreted.py starts.
"""

import pytest

from heiretsu.offgpu.scratch import poisoned_scratch
from tests.kernels import forms

collect_ignore_glob = [] if forms.INTERPRETED else ["test_*.py"]

if forms.INTERPRETED:
    from heiretsu.offgpu.interpreter import watch

    watch()


@pytest.fixture(autouse=True)
def scratch_memory_is_poisoned():
    with poisoned_scratch():
        yield
