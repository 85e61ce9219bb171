"""Fixtures of the kernel tests, and which of them this process can run (see forms.py).

Poisoned scratch memory everywhere; a mended interpreter where TRITON_INTERPRET=1. Tests marked `triton` call Triton
kernels directly: they run here under TRITON_INTERPRET=1 or on a GPU, and are left to test_interpreted.py otherwise.
"""

import pytest

from tests.kernels import forms
from tests.kernels.scratch import poisoned_scratch

MUTATION_LINES = pytest.StashKey[list[str]]()

if forms.INTERPRETED:
    from tests.kernels.interpreter import mend

    mend()


def pytest_configure(config):
    config.addinivalue_line("markers", "triton: calls Triton kernels directly, in the interpreter or on a GPU")


def pytest_ignore_collect(collection_path):
    """Collect only what this process can run; None leaves the decision to others."""
    if collection_path.name == "test_interpreted.py" and (forms.INTERPRETED or not forms.HAS_TRITON):
        return True
    if collection_path.name == "test_mutations.py" and not forms.HAS_TRITON:
        return True
    if collection_path.name == "interpreter" and not forms.INTERPRETED:
        return True
    return None


def pytest_collection_modifyitems(config, items):
    if forms.TRITON_DEVICE is None:
        elsewhere = [item for item in items if item.get_closest_marker("triton")]
        if elsewhere:
            config.hook.pytest_deselected(items=elsewhere)
            items[:] = [item for item in items if item not in elsewhere]


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(MUTATION_LINES, []):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def scratch_memory_is_poisoned():
    with poisoned_scratch():
        yield


@pytest.fixture
def triton_device():
    """Where Triton kernels run in this process: "cuda", or "cpu" in the interpreter. For tests marked `triton`."""
    return forms.TRITON_DEVICE
