"""Which part of a parameter each rank holds, who counts it, and where its gradient is summed."""

import pytest
import torch
from torch import nn

from heiretsu.kernels import plain
from heiretsu.parallel.mesh import REPLICAS, Axis, abstract_mesh
from heiretsu.parallel.placement import Placement, Spec, declare, placement_table, shard_bounds
from heiretsu.run.building import build_engine
from tests.training import MIXTURE, run_config


def test_a_dim_is_dealt_out_as_torch_chunk_and_so_a_checkpoint_deals_it_out():
    """Where the ranks do not divide it, too: 5 of them share the 384 rows of the bytes' embedding."""
    for size in (1, 2, 5, 7, 12, 384):
        for ranks in range(1, 9):
            parts = list(torch.arange(size).chunk(ranks))
            parts += [torch.arange(0)] * (ranks - len(parts))
            bounds = [shard_bounds(size, Axis("tp", ranks, index)) for index in range(ranks)]
            assert [list(range(*bound)) for bound in bounds] == [part.tolist() for part in parts], (size, ranks)


SIZES = {"dp": 2, "ep": 2, "pp": 2, "tp": 2}
SPECS = {
    "replicated": Spec((3,), partial_over=REPLICAS),
    "split over tp": Spec((5, 4), ((1, "tp"),), partial_over=REPLICAS),
    "an expert's": Spec((4, 6, 2), ((0, "ep"), (1, "tp")), partial_over=("dp",)),
    "an expert's, whole over tp": Spec((4, 2), ((0, "ep"),), partial_over=("dp",)),
    "shared": Spec((8, 2), ((0, "tp"),), partial_over=REPLICAS, shared_over="ends"),
}


@pytest.mark.parametrize("name", SPECS)
def test_each_element_of_a_stage_has_one_owner(name):
    """Of a shared parameter, in both stages that hold it together."""
    spec = SPECS[name]
    owners = {stage: torch.zeros(spec.shape, dtype=torch.int) for stage in (0, 1)}
    for rank in range(16):
        mesh = abstract_mesh(**SIZES, rank=rank)
        place = Placement(name, spec, mesh)
        assert place.local(owners[0]).shape == owners[0][place.local_slices].shape
        if place.is_owner:
            owners[mesh.pp.index][place.local_slices] += 1
    together = [owners[0] + owners[1]] if spec.shared_over else owners.values()
    assert all((count == 1).all() for count in together)
    if spec.shared_over:
        assert (owners[0] == 1).all()


def test_gradients_are_summed_where_other_tokens_are_and_divided_by_all_replicas():
    mesh = abstract_mesh(**SIZES, rank=5)
    dense, expert, shared = (Placement("x", SPECS[name], mesh) for name in ("replicated", "an expert's", "shared"))
    assert (dense.reduce_axis, expert.reduce_axis) == (mesh.replica, mesh.dp)
    assert dense.divisor == expert.divisor == 4
    assert (dense.shared_axis, shared.shared_axis) == (None, mesh.ends)
    assert Placement("x", SPECS["shared"], abstract_mesh(dp=2, tp=2)).shared_axis.size == 1


def test_a_spec_says_no_more_than_it_was_told():
    spec = Spec((1,), partial_over=("dp",))
    assert (spec.shards, spec.shared_over, spec.std, spec.fill, spec.decay, spec.rows) == (
        (),
        None,
        None,
        0.0,
        False,
        None,
    )
    with pytest.raises(TypeError, match="partial_over"):
        Spec((1,))


def test_declared_parameters_have_the_shape_of_the_shard_and_their_constant():
    module = nn.Module()
    mesh = abstract_mesh(tp=2, rank=1)
    one, zero = Spec((3, 5), ((1, "tp"),), partial_over=REPLICAS, fill=1.0), Spec((2,), partial_over=REPLICAS)
    declare(module, mesh, torch.float64, one=one, zero=zero)
    assert torch.equal(module.one, torch.ones(3, 2, dtype=torch.float64)) and module.one.requires_grad
    assert torch.equal(module.zero, torch.zeros(2, dtype=torch.float64))
    outer = nn.Module()
    outer.inner = module
    assert list(placement_table(outer, mesh)) == ["inner.one", "inner.zero"]
    table = placement_table(module, mesh)
    assert list(table) == ["one", "zero"] and table["one"] == Placement("one", module.specs["one"], mesh)
    module.register_parameter("forgotten", nn.Parameter(torch.zeros(1)))
    with pytest.raises(AssertionError, match="parameters without a placement: .*forgotten"):
        placement_table(module, mesh)


def test_matrices_and_embeddings_decay_and_biases_and_norms_do_not():
    table = build_engine(run_config(MIXTURE), abstract_mesh(), plain).table
    kept = {name for name, place in table.items() if not place.spec.decay}
    assert kept == {
        name for name in table if name.endswith((".bias", ".b1", ".b2")) or ".ln_" in name or name.startswith("ln_f")
    }
    assert {name.rpartition(".")[2] for name in table.keys() - kept} == {"weight", "w1", "w2"}
