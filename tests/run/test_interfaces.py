"""Which interface gloo is told of. Between real hosts: tests/cluster."""

from types import SimpleNamespace

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


def test_the_addresses_of_an_interface_are_asked_of_the_kernel_by_its_name(monkeypatch):
    """Linux's answer to an ioctl, and its table of IPv6; an interface without an address is none of those found."""
    names = ["lo", "eth0", "a-name-of-15-ch", "tunnel"]
    numbers = {b"lo": (127, 0, 0, 1), b"eth0": (192, 0, 2, 7), b"a-name-of-15-ch": (198, 51, 100, 9)}

    def ioctl(any_socket, request, asked):
        assert any_socket.type == interfaces.socket.SOCK_DGRAM and request == 0x8915 and len(asked) == 256
        name = asked.rstrip(b"\0")
        if name not in numbers:
            raise OSError("no address")
        return name.ljust(20, b"\0") + bytes(numbers[name]) + bytes(8)

    rows = [
        "00000000000000000000000000000001 01 80 10 80       lo",
        "20010db8000000000000000000000008 02 40 00 80     eth0",
        "fe80000000000000000000fffe000001 02 40 20 80     eth0",
        "20010db8000000000000000000000009 07 40 00 80   tunnel",
    ]
    there = [True]
    table = SimpleNamespace(exists=lambda: there[0], read_text=lambda: "\n".join(rows) + "\n")
    monkeypatch.setattr(interfaces.socket, "if_nameindex", lambda: list(enumerate(names, 1)))
    monkeypatch.setattr(interfaces.fcntl, "ioctl", ioctl)
    monkeypatch.setattr(interfaces, "Path", {"/proc/net/if_inet6": table}.get)
    found = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.0.2.7", "2001:db8::8"], "a-name-of-15-ch": ["198.51.100.9"]}
    assert interfaces.interfaces() == found | {"tunnel": ["2001:db8::9"]}
    there[0] = False
    assert interfaces.interfaces() == {name: addresses[:1] for name, addresses in found.items()}


def test_only_the_first_address_of_the_own_name_counts_for_it_is_the_one_that_gloo_takes(machine):
    machine["here"] = ["127.0.1.1", "192.0.2.7"]
    assert find_interface({}, route_to=MASTER) == "ib0"
    machine["here"] = ["2001:db8::7"]
    assert find_interface({}) is None


def test_an_interface_that_was_asked_for_is_not_looked_for_and_nccls_says_nothing_of_gloo(machine):
    assert find_interface({"GLOO_SOCKET_IFNAME": "eth0"}, route_to=MASTER) is None
    assert find_interface({"NCCL_SOCKET_IFNAME": "eth0"}, route_to=MASTER) == "ib0"


def test_the_only_interface_that_leads_outwards_is_taken_and_one_must_be(machine, monkeypatch):
    monkeypatch.setattr(interfaces, "interfaces", lambda: {"lo": ["127.0.0.1"], "eth1": ["192.0.2.8"], "v6": ["::1"]})
    assert find_interface({}) == "eth1" == find_interface({}, route_to="192.0.2.99")
    monkeypatch.setattr(interfaces, "interfaces", lambda: {"lo": ["127.0.0.1"]})
    machine["here"] = []
    with pytest.raises(ValueError) as refusal:
        find_interface({})
    assert str(refusal.value) == (
        "host here: its own name resolves to nothing, which other hosts cannot reach: say by which interface they can, "
        "as in GLOO_SOCKET_IFNAME=eth0 (there are: lo 127.0.0.1)"
    )


def test_the_first_host_and_one_that_is_not_told_how_many_there_are_look_for_no_route(machine):
    with pytest.raises(ValueError, match="which other hosts cannot reach"):
        use_interface("gloo", {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": MASTER})
    alone = {"GROUP_RANK": "1", "MASTER_ADDR": MASTER}
    use_interface("gloo", alone)
    assert "GLOO_SOCKET_IFNAME" not in alone
    reachable = {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "MASTER_ADDR": MASTER}
    machine["here"] = ["192.0.2.7"]
    use_interface("gloo", reachable)
    assert "GLOO_SOCKET_IFNAME" not in reachable


def test_a_name_has_each_of_its_addresses_once_and_an_unknown_one_none(monkeypatch):
    def getaddrinfo(name, port):
        assert port is None
        if name != "alder":
            raise OSError("unknown")
        return [(2, 1, 6, "", (address, 0)) for address in ("192.0.2.7", "192.0.2.7", "2001:db8::8")]

    monkeypatch.setattr(interfaces.socket, "getaddrinfo", getaddrinfo)
    assert interfaces.addresses_of("alder") == ["192.0.2.7", "2001:db8::8"] and interfaces.addresses_of("elm") == []
    assert [interfaces.is_loopback(a) for a in ("127.0.1.1", "::1", "192.0.2.127", "::2")] == [True, True, False, False]


def test_the_way_to_another_host_is_asked_by_a_datagram_socket_that_sends_nothing(monkeypatch):
    asked = []

    class Probe:
        def __init__(self, family, kind):
            asked.append((family, kind))

        __enter__ = lambda probe: probe  # noqa: E731
        __exit__ = lambda probe, *error: asked.append("closed")  # noqa: E731
        connect = asked.append

        def getsockname(self):
            return ("198.51.100.7", 40000)

    def getaddrinfo(name, port, type):
        if name != "alder":
            raise OSError("unknown")
        asked.append((port, type))
        return [("inet6", "datagrams", 17, "", ("2001:db8::8", port)), ("inet", "datagrams", 17, "", None)]

    monkeypatch.setattr(interfaces.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(interfaces.socket, "socket", Probe)
    assert interfaces.source_address("alder") == "198.51.100.7" and interfaces.source_address("elm") is None
    kind = interfaces.socket.SOCK_DGRAM
    assert asked == [(9, kind), ("inet6", "datagrams"), ("2001:db8::8", 9), "closed"]
