"""Initial values and seeds: functions of what they belong to, the same from one release to the next."""

import pytest
import torch

from heiretsu.model.seeding import fold, initial_value
from heiretsu.parallel.mesh import REPLICAS, abstract_mesh
from heiretsu.parallel.placement import Placement, Spec


def test_a_seed_is_63_bits_of_everything_on_its_path():
    seeds = [fold(0), fold(1), fold(0, 1), fold(0, "1"), fold(0, 1, 2), fold(0, 2, 1), fold(12, 3), fold(1, 23)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert max(fold(0, i) for i in range(100)) > 2**62
    assert fold(1337, "init", "wte.weight") == 8269824979950689453  # a resumed run draws on


def test_initial_values_are_float32_on_the_cpu_whatever_is_the_default():
    spec = Spec((6, 3), partial_over=REPLICAS, std=0.5, rows=4)
    place = Placement("x", spec, abstract_mesh())
    whole = initial_value(place, 7)
    assert whole.dtype == torch.float32 and (whole[4:] == 0).all() and (whole[:4] != 0).all()
    by_hand = torch.empty(6, 3).normal_(0.0, 0.5, generator=torch.Generator().manual_seed(fold(7, "init", "x")))
    assert torch.equal(whole[:4], by_hand[:4])
    constant = Placement("y", Spec((2,), partial_over=REPLICAS, fill=3.0), abstract_mesh())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again, filled = initial_value(place, 7), initial_value(constant, 7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, whole) and again.dtype == filled.dtype == torch.float32
    assert filled.tolist() == [3.0, 3.0]
    assert not torch.equal(initial_value(place, 8), whole)
    assert not torch.equal(initial_value(Placement("z", spec, abstract_mesh()), 7), whole)


def test_initial_values_are_normal_with_the_deviation_asked_for():
    values = initial_value(Placement("x", Spec((200, 500), partial_over=REPLICAS, std=0.02), abstract_mesh()), 1)
    assert values.std().item() == pytest.approx(0.02, rel=0.01) and values.mean().item() == pytest.approx(0, abs=3e-4)
