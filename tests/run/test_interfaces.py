"""Which interface gloo is told of. Between real hosts: tests/cluster."""

import pytest

from heiretsu.run import interfaces
from heiretsu.run.interfaces import find_interface, use_interface

FOUND = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.0.2.7"], "ib0": ["198.51.100.7", "2001:db8::7"]}
MASTER = "198.51.100.1"  # of the ranges for documentation, as those above: nothing is sent there


@pytest.fixture
def machine(monkeypatch):
    """A machine with FOUND's interfaces, whose own name is 127.0.1.1 unless `resolves` says otherwise."""
    resolves = {"here": ["127.0.1.1"]}
    monkeypatch.setattr(interfaces, "interfaces", lambda: FOUND)
    monkeypatch.setattr(interfaces.socket, "gethostname", lambda: "here")
    monkeypatch.setattr(interfaces, "addresses_of", lambda name: resolves.get(name, []))
    monkeypatch.setattr(interfaces, "source_address", lambda target: "198.51.100.7" if target == MASTER else None)
    return resolves


def test_a_name_that_others_can_reach_needs_no_interface(machine):
    machine["here"] = ["192.0.2.7"]
    assert find_interface({}) is None


def test_the_interface_on_the_way_to_the_other_hosts_is_taken(machine):
    assert find_interface({}, route_to=MASTER) == "ib0"
    machine["here"] = []
    assert find_interface({}, route_to=MASTER) == "ib0"


def test_one_of_several_is_asked_for_in_a_line_that_names_them(machine):
    with pytest.raises(ValueError) as refusal:
        find_interface({})
    assert "host here: its own name resolves to 127.0.1.1" in str(refusal.value)
    assert "GLOO_SOCKET_IFNAME=eth0 (there are: lo 127.0.0.1 ::1, eth0 192.0.2.7, ib0" in str(refusal.value)
    machine["here"] = []
    with pytest.raises(ValueError, match="its own name resolves to nothing"):
        find_interface({})


@pytest.mark.parametrize(
    "variable, value, good",
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "lo", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=ib0", True),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", False),
        ("NCCL_SOCKET_IFNAME", "bond", False),
    ],
)
def test_an_interface_that_is_asked_for_must_lead_outwards(machine, variable, value, good):
    machine["here"] = ["192.0.2.7"]
    if good:
        assert find_interface({variable: value}) is None
        return
    with pytest.raises(ValueError, match="is no interface that leads to other hosts: lo 127.0.0.1") as refusal:
        find_interface({variable: value})
    assert f"host here: {variable}={value} " in str(refusal.value)


def test_only_gloo_on_several_hosts_is_told(machine):
    for backend, hosts, told in (("gloo", "2", True), ("gloo", "1", False), ("nccl", "2", False)):
        environment = {"GROUP_WORLD_SIZE": hosts, "GROUP_RANK": "1", "MASTER_ADDR": MASTER}
        use_interface(backend, environment)
        assert environment.get("GLOO_SOCKET_IFNAME") == ("ib0" if told else None)


def test_this_machine_has_a_loopback_interface():
    assert "127.0.0.1" in [address for found in interfaces.interfaces().values() for address in found]
