"""Which tests of the emulator run: those marked `emulate_full` only with `-m emulate_full` or `--emulate`.

Tests that compile a kernel need Triton, and a process in which it compiles rather than interprets.
"""

import importlib.util
import os

import pytest
import torch

COMPILES = importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET", "0") != "1"
collect_ignore = (
    [] if COMPILES else ["test_planted.py", "test_planted_in_kernels.py", "test_triton_language.py", "test_driver.py"]
)


def pytest_configure(config):
    config.addinivalue_line("markers", "emulate_full: a longer test of the emulator, left to `make emulate`")


def pytest_collection_modifyitems(config, items):
    if "emulate_full" in config.option.markexpr or config.getoption("emulate", None):
        return
    longer = [item for item in items if item.get_closest_marker("emulate_full")]
    if longer:
        config.hook.pytest_deselected(items=longer)
        items[:] = [item for item in items if item not in longer]


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)
