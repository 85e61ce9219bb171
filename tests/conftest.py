import signal

import pytest

from tests.ranks import run_ranks


def pytest_addoption(parser):
    parser.addoption(
        "--emulate",
        choices=["sm_80", "sm_90"],
        help="run only the tiny cases of the kernel parity table, compiled for this GPU, on the emulator",
    )


def pytest_configure():
    # A shell lets what it runs in the background ignore Ctrl-C, and the programs under test would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ranks():
    """`ranks(fn, ..., dp=1, ep=1, pp=1, tp=1)`: results of fn(mesh, ...) on every rank of the mesh, by rank."""
    return run_ranks
