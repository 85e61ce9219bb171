"""Who is where: the rank formula, the merged axes, and process groups that reach exactly the ranks they name."""

import gc
import itertools

import pytest
import torch
import torch.distributed as dist

from heiretsu.parallel.collectives import all_reduce
from heiretsu.parallel.mesh import AXIS_NAMES, Axis, abstract_mesh, make_mesh, process_groups

LINES = (*AXIS_NAMES, "replica", "ends", "pp_back", "world")


def test_tp_is_fastest_then_pp_then_ep_then_dp():
    sizes = {"dp": 2, "ep": 3, "pp": 2, "tp": 2}
    for rank, place in enumerate(itertools.product(*map(range, sizes.values()))):
        mesh = abstract_mesh(**sizes, rank=rank)
        assert tuple(getattr(mesh, name).index for name in AXIS_NAMES) == place
        dp, ep, pp, tp = place
        assert mesh.tp.ranks == tuple(rank - tp + i for i in range(2))
        assert mesh.pp.ranks == tuple(rank + 2 * (i - pp) for i in range(2))
        assert mesh.replica.index == dp * 3 + ep and mesh.replica.size == 6
        assert mesh.world.index == mesh.rank == rank


@pytest.mark.parametrize("rank, ends", [(0, (0, 3)), (1, (1,)), (2, (2,)), (3, (0, 3))])
def test_ends_are_the_first_and_the_last_stage(rank, ends):
    mesh = abstract_mesh(pp=4, rank=rank)
    assert mesh.ends.ranks == ends


def sums(mesh):
    """Over each line, the sum of 2**rank: the set of the ranks that it reaches."""
    mine = torch.tensor(2.0**mesh.rank)
    assert all((getattr(mesh, name).group is None) == (getattr(mesh, name).size == 1) for name in LINES)
    return {name: (getattr(mesh, name).ranks, all_reduce(mine, getattr(mesh, name)).item()) for name in LINES}


@pytest.mark.parametrize("sizes", [{"dp": 2, "pp": 2}, {"ep": 2, "tp": 2}, {"dp": 2, "ep": 2, "pp": 2}, {"pp": 4}])
def test_each_group_reaches_exactly_its_ranks(ranks, sizes):
    for reached in ranks(sums, **sizes):
        for name, (members, total) in reached.items():
            assert total == sum(2.0**rank for rank in members), name


def test_a_mesh_of_another_size_than_the_world_is_refused():
    with pytest.raises(ValueError, match="--dp 2 x --ep 1 x --pp 1 x --tp 3 = 6 ranks, but the world has 1 processes"):
        make_mesh(dp=2, tp=3)


def test_a_rank_in_words_and_an_axis_of_one():
    assert abstract_mesh(dp=2, ep=3, pp=2, tp=2, rank=23).coordinates() == "rank 23 (dp=1, ep=2, pp=1, tp=1)"
    assert abstract_mesh(pp=2, rank=1).coordinates() == "rank 1 (dp=0, ep=0, pp=1, tp=0)"
    assert (Axis("tp").size, Axis("tp").index, Axis("tp").ranks, Axis("tp").group) == (1, 0, (0,), None)
    mesh = abstract_mesh(dp=2, pp=4, rank=5)
    assert all(getattr(mesh, name).name == name for name in LINES)
    assert mesh.over("dp", "ep") is mesh.replica and mesh.over("tp") is mesh.tp
    assert all(abstract_mesh(pp=4, rank=rank).ends.name == "ends" for rank in range(4))
    alone = make_mesh()
    assert alone.world == Axis("world") and alone.device == torch.device("cpu") and alone.device_mesh is None
    assert make_mesh(device="meta").device == torch.device("meta")
    with torch.device("meta"):  # whatever the default is, ranks are counted here
        assert abstract_mesh(dp=2, rank=1).dp.ranks == (0, 1)


def test_process_groups_end_with_their_block_but_not_with_an_error(monkeypatch):
    """Destroyed after what refers to itself, and to a mesh, is gone; one process has none."""
    calls: list = []
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(gc, "collect", lambda: calls.append("collected"))
    with process_groups("gloo", 1, rank=0):
        calls.append("alone")
    with process_groups("nccl", 2, rank=1, timeout=3):
        calls.append("inside")
    began = (("nccl",), {"world_size": 2, "rank": 1, "timeout": 3})
    assert calls == ["alone", began, "inside", "collected", "destroyed"]
    with pytest.raises(RuntimeError, match="lost"), process_groups("nccl", 2):
        raise RuntimeError("lost")
    assert calls[5:] == [(("nccl",), {"world_size": 2})]
