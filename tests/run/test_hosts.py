"""Which rank sits on which host, and what the log says of it. Between real hosts: tests/cluster."""

import itertools

import pytest

from heiretsu.run.hosts import Hosts, placed_rank

SIZES = [(dp, ep, pp, tp) for dp, ep, pp, tp in itertools.product((1, 2, 4), repeat=4)]


def placed(per_host: int, hosts: int, ep: int, pp: int, tp: int) -> list[int]:
    """The mesh's rank of each process, in the order in which a launcher starts them, host by host."""
    world = {"WORLD_SIZE": str(per_host * hosts), "LOCAL_WORLD_SIZE": str(per_host), "GROUP_WORLD_SIZE": str(hosts)}
    return [placed_rank({**world, "RANK": str(rank)}, ep, pp, tp) for rank in range(per_host * hosts)]


def hosts_of(per_host: int, dp: int, ep: int, pp: int, tp: int) -> Hosts:
    number = dp * ep * pp * tp // per_host
    names = [""] * (per_host * number)
    for process, rank in enumerate(placed(per_host, number, ep, pp, tp)):
        names[rank] = f"host{process // per_host}"
    return Hosts(tuple(names), {"dp": dp, "ep": ep, "pp": pp, "tp": tp})


@pytest.mark.parametrize("dp, ep, pp, tp", [sizes for sizes in SIZES if sizes[0] * sizes[1] * sizes[2] * sizes[3] >= 8])
def test_tp_and_ep_stay_on_a_host_wherever_a_host_holds_them(dp, ep, pp, tp):
    for per_host in (1, 2, 4, 8):
        hosts = hosts_of(per_host, dp, ep, pp, tp)
        assert all(len(ranks) == per_host for ranks in hosts.ranks.values())
        assert hosts.names[0] == "host0"
        if per_host % tp == 0:
            assert "tp" not in hosts.crossing()
        if per_host % (tp * ep) == 0:
            assert "ep" not in hosts.crossing()
        if per_host % (tp * ep * pp) == 0:
            assert "pp" not in hosts.crossing()


def test_the_mesh_is_left_as_it_is_where_hosts_hold_whole_blocks_or_are_unequal():
    assert placed(4, 2, ep=1, pp=4, tp=1) == placed(4, 2, ep=2, pp=2, tp=1) == list(range(8))
    assert placed(4, 2, ep=2, pp=4, tp=1) == [0, 4, 1, 5, 2, 6, 3, 7]
    unequal = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2", "RANK": "1"}
    assert placed_rank(unequal, ep=2, pp=4, tp=1) == 1
    assert placed_rank({}, ep=1, pp=1, tp=1) == 0


def test_header_says_who_sits_where_and_warns_of_tp_between_hosts():
    assert Hosts(("a", "a"), {"dp": 2, "ep": 1, "pp": 1, "tp": 1}).describe() == []
    two = hosts_of(4, dp=2, ep=2, pp=2, tp=1)
    assert two.describe() == ["hosts: host0 ranks 0-3, host1 ranks 4-7; between hosts: dp"]
    moved = hosts_of(4, dp=1, ep=2, pp=4, tp=1)
    assert moved.describe() == ["hosts: host0 ranks 0-1, 4-5, host1 ranks 2-3, 6-7; between hosts: pp"]
    line, warning = hosts_of(2, dp=1, ep=1, pp=1, tp=4).describe()
    assert line == "hosts: host0 ranks 0-1, host1 ranks 2-3; between hosts: tp"
    assert warning.startswith("warning: --tp 4 crosses hosts") and "keep tp to the 2 ranks of a host" in warning
