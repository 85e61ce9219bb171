"""Which rank sits on which host, and what the log says of it. Between real hosts: tests/cluster."""

import itertools

import pytest

from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import hosts
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
        found = hosts_of(per_host, dp, ep, pp, tp)
        assert all(len(ranks) == per_host for ranks in found.ranks.values())
        assert found.names[0] == "host0"
        if per_host % tp == 0:
            assert "tp" not in found.crossing()
        if per_host % (tp * ep) == 0:
            assert "ep" not in found.crossing()
        if per_host % (tp * ep * pp) == 0:
            assert "pp" not in found.crossing()


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


def test_nothing_is_moved_where_the_launcher_tells_too_little():
    """Process 1 of a mesh whose pipeline would be dealt to two hosts, if it were known that there are two of four."""
    told = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
    assert placed_rank(told, ep=2, pp=4, tp=1) == 4
    for name, other in (("GROUP_WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "8"), ("WORLD_SIZE", "4")):
        assert placed_rank({**told, name: other}, ep=2, pp=4, tp=1) == 1
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        without = {key: value for key, value in told.items() if key != name}
        assert placed_rank(without, ep=2, pp=4, tp=1) == 1
    # Each of several hosts that the launcher does not count holds a process: nothing to go by.
    assert placed_rank({"RANK": "1", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}, ep=2, pp=1, tp=1) == 1
    # One host of two: its own stages.
    assert placed_rank({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ep=1, pp=4, tp=1) == 1
    # Four ranks a host: no whole groups of tp * ep = 6.
    assert [placed(4, 3, ep=3, pp=1, tp=2)[i] for i in (0, 1, 11)] == [0, 1, 11]
    assert placed(6, 2, ep=3, pp=2, tp=2) == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize("sizes, only_dp", [((1, 2, 2), True), ((2, 2, 1), True), ((1, 4, 1), False)])
def test_a_whole_model_on_the_first_host_is_what_only_dp_between_hosts_means(sizes, only_dp):
    dp, pp, tp = sizes
    names = ("a", "a", "a", "a") if dp == 1 and only_dp else ("a", "a", "b", "b")
    assert Hosts(names, {"dp": dp, "ep": 1, "pp": pp, "tp": tp}).only_dp_crosses() is only_dp


def test_several_axes_between_hosts_are_named_and_a_host_of_one_rank_too():
    mixed = Hosts(("a", "b", "b", "a"), {"dp": 2, "ep": 1, "pp": 1, "tp": 2})
    assert mixed.describe() == [
        "hosts: a ranks 0, 3, b ranks 1-2; between hosts: dp, tp",
        "warning: --tp 2 crosses hosts, and every layer waits four times a step for the network: keep tp to the "
        "2 ranks of a host, and raise --pp or --dp instead",
    ]
    alone = Hosts(("a", "b"), {"dp": 1, "ep": 1, "pp": 1, "tp": 2}).describe()
    assert alone[0] == "hosts: a ranks 0, b ranks 1; between hosts: tp" and "to the 1 rank of a host," in alone[1]


@pytest.mark.parametrize(
    "found, names",
    [
        ([("elm", "0"), ("elm", "0"), ("ash", "1")], ("elm", "elm", "ash")),
        ([("box", "0"), ("box", "1"), ("ash", "2")], ("box (node 0)", "box (node 1)", "ash")),
    ],
)
def test_hosts_that_call_themselves_alike_are_told_apart(monkeypatch, found, names):
    mesh, asked = abstract_mesh(dp=3), []
    monkeypatch.setattr(hosts, "gather_objects", lambda mine, axis: asked.append((mine, axis)) or found)
    monkeypatch.setattr(hosts.socket, "gethostname", lambda: "here")
    monkeypatch.delenv("GROUP_RANK", raising=False)
    assert hosts.gather_hosts(mesh) == Hosts(names, {"dp": 3, "ep": 1, "pp": 1, "tp": 1})
    monkeypatch.setenv("GROUP_RANK", "7")
    hosts.gather_hosts(mesh)
    assert asked == [(("here", "0"), mesh.world), (("here", "7"), mesh.world)]
