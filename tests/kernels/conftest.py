"""Fixtures of the kernel tests, and which of them this process can run (see forms.py).

Poisoned scratch memory everywhere; int32 overflows raise where TRITON_INTERPRET=1. Tests marked `triton` call Triton
kernels directly: they run here under TRITON_INTERPRET=1 or on a GPU, and are left to test_interpreted.py otherwise.
What concerns no kernel does not run again in the interpreter.
"""

import pytest

from heiretsu.offgpu.scratch import poisoned_scratch
from tests.kernels import forms

MUTATION_LINES = pytest.StashKey[list[str]]()

if forms.INTERPRETED:
    from heiretsu.offgpu.interpreter import watch

    watch()


def pytest_configure(config):
    if config.getoption("emulate") and forms.INTERPRETED:
        raise pytest.UsageError("--emulate runs compiled kernels: unset TRITON_INTERPRET")
    config.addinivalue_line("markers", "triton: calls Triton kernels directly, in the interpreter or on a GPU")


def pytest_ignore_collect(collection_path, config):
    """Collect only what this process can run; None leaves the decision to others."""
    here = {
        "interpreter": forms.INTERPRETED,
        "test_interpreted.py": forms.HAS_TRITON and not forms.INTERPRETED,
        "test_autotune.py": forms.HAS_TRITON and not forms.INTERPRETED,
        "test_launch.py": forms.HAS_TRITON,
        "test_mutations.py": forms.HAS_TRITON,
        "test_exports.py": not forms.INTERPRETED,
        "test_guide.py": not forms.INTERPRETED,
        "test_emulated.py": config.getoption("emulate"),
        "test_stages_on_gpu.py": forms.TRITON_DEVICE == "cuda",
    }
    return None if here.get(collection_path.name, True) else True


def pytest_collection_modifyitems(config, items):
    if config.getoption("emulate"):
        elsewhere = [item for item in items if item.path.name != "test_emulated.py"]
    elif forms.TRITON_DEVICE is None:
        elsewhere = [item for item in items if item.get_closest_marker("triton")]
    elif forms.INTERPRETED:
        elsewhere = [item for item in items if "cpu-form" in item.name]
    else:
        return
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
