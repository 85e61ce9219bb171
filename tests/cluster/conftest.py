"""The hosts that these tests share, and the table of what was shown. `make cluster` runs them; `make test` does not."""

import signal

import pytest

from heiretsu.bench import network as networks
from tests.cluster import slurm as slurms
from tests.cluster.table import ROWS, markdown


def pytest_configure():
    # An end by SIGTERM takes everything down as an end by Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter):
    shown = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name in ROWS:
                shown[name] = value
    if shown:
        terminalreporter.section("several machines")
        terminalreporter.write_line(markdown(shown))


@pytest.fixture(scope="session")
def session_network():
    if lacking := networks.lacking():
        pytest.skip(lacking)
    with networks.network() as net:
        yield net


@pytest.fixture
def net(session_network):
    """Two hosts with nothing running on them, a cable without a limit, and names that lead to each other."""
    yield session_network
    for host in session_network.hosts:
        host.stop_processes()
        host.names(networks.ADDRESSES)
    session_network.plug()
    session_network.rate(None)


@pytest.fixture(scope="module")
def slurm():
    """A Slurm on two hosts of its own, for the tests of a file."""
    if lacking := networks.lacking() or slurms.lacking():
        pytest.skip(lacking)
    with networks.network() as net:
        yield slurms.Slurm(net)


@pytest.fixture
def row(record_property):
    """row(name, result): what a row of the table shows, once the test has passed."""

    def fill(name: str, result: str) -> None:
        assert name in ROWS, f"{name} is no row of the table"
        record_property(name, result)

    return fill
