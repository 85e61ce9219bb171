"""Copies compared: the digest as its formula says, and which of several differences is named, in which words."""

import pytest
import torch

from heiretsu.parallel import replicas
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.placement import Piece, Placement, Spec


def by_hand(bits: list[int]) -> int:
    """Of integers of Python's, which have no length, cut to 64 bits at the end."""
    total = sum((part ^ (part >> 29)) * (2 * 0x1000003 * index + 1) for index, part in enumerate(bits))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("at_once", [1, 3, 7, 2**24])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_the_digest_is_what_its_formula_says_however_it_is_cut(monkeypatch, dtype, at_once):
    monkeypatch.setattr(replicas, "_AT_ONCE", at_once)
    span = torch.iinfo(dtype)
    ends = torch.tensor([span.min, span.max, -1, 0, 1])
    middle = torch.randint(span.min, span.max, (9,), generator=torch.Generator().manual_seed(1))
    bits = torch.cat([ends, middle]).to(dtype).view(7, 2)
    assert replicas.digest(bits).item() == by_hand(bits.flatten().tolist())
    assert replicas.digest(bits.T).item() == by_hand(bits.T.flatten().tolist())  # by place, not by memory
    assert replicas.digest(bits[:0]).item() == 0


def test_floats_are_taken_by_their_bits():
    for dtype, same in ((torch.float64, torch.int64), (torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        x = torch.randn(6, generator=torch.Generator().manual_seed(2)).to(dtype)
        with torch.device("meta"):  # a default device is none of its business
            assert replicas.digest(x).item() == by_hand(x.view(same).tolist())


def difference(monkeypatch, *by_rank):
    """first_difference where each rank tells (stage, [(key, digest), ...])."""
    monkeypatch.setattr(replicas, "gather_objects", lambda mine, axis: list(by_rank))
    place = Placement("a", Spec((2,), partial_over=()), abstract_mesh())
    return replicas.first_difference({"model/a": Piece(torch.zeros(2), place)}, abstract_mesh())


def test_the_first_difference_in_the_models_order_is_named_with_who_holds_what(monkeypatch):
    a, b, c, half = ("model/a", ((0, 2),)), ("model/b", ((0, 2),)), ("exp_avg/b", ((0, 2),)), ("model/a", ((2, 4),))
    same = (0, [(a, 1), (b, 2), (c, 3)])
    assert difference(monkeypatch, same, same) == ""
    assert difference(monkeypatch, same, (0, [(half, 5), (b, 2), (c, 3)])) == ""  # another shard is no copy
    assert (
        difference(monkeypatch, same, (0, [(a, 1), (b, 9), (c, 8)]), same) == "b differs between rank 0, 2 and rank 1"
    )
    said = "b (exp_avg) differs between rank 0 and rank 1 and rank 2, 3"
    others = [(0, [(a, 1), (b, 2), (c, value)]) for value in (4, 5, 5)]
    assert difference(monkeypatch, same, *others) == said
    # Of two stages, the lower comes first, whichever rank tells of it first.
    upper = [(1, [(b, 1)]), (1, [(b, 2)])]
    lower = [(0, [(c, 3), (a, 1)]), (0, [(c, 3), (a, 2)])]
    assert difference(monkeypatch, *upper, *lower) == "a differs between rank 2 and rank 3"
    assert difference(monkeypatch, *upper, lower[0]) == "b differs between rank 0 and rank 1"


def test_a_rank_tells_its_stage_and_for_each_piece_where_it_stands_and_its_digest(monkeypatch):
    told = []
    monkeypatch.setattr(replicas, "gather_objects", lambda mine, axis: told.append((mine, axis.name)) or [mine])
    mesh = abstract_mesh(pp=3, tp=2, rank=5)
    sharded = Placement("w", Spec((4, 3), ((0, "tp"),), partial_over=()), mesh)
    pieces = {"model/w": Piece(torch.ones(2, 3), sharded), "exp_avg/w": Piece(torch.zeros(2, 3), sharded)}
    assert replicas.first_difference(pieces, mesh) == ""
    where = ((2, 4), (0, 3))
    ones = replicas.digest(torch.ones(2, 3)).item()
    assert told == [((2, [(("model/w", where), ones), (("exp_avg/w", where), 0)]), "world")]
