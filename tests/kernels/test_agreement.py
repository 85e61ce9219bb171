"""What autotune, the benchmark and the GPU kit call the same: both sides of each bound, and what is said else."""

import torch

from heiretsu.kernels.agreement import disagreements, largest

EPS = 2.0**-23  # of float32


def off_by(error, dtype=torch.float32, **options):
    """What is said of a tensor whose largest element is 2, and one of whose elements is off by `error`."""
    expected = torch.tensor([2.0, -1.0, 0.5], dtype=dtype)
    found = expected.clone()
    found[2] += error
    return disagreements({"y": found}, {"y": expected}, **options)


def test_an_element_may_be_off_by_four_ulps_of_the_largest():
    assert off_by(8 * EPS) == []
    assert off_by(9 * EPS) == ["y is off by 1.1e-06, 9.5e-07 allowed"]
    assert off_by(-9 * EPS) != []
    assert off_by(4 * EPS, ulps=2) == [] != off_by(5 * EPS, ulps=2)


def test_the_least_and_what_the_accepted_way_is_off_by_are_allowed_as_well():
    assert off_by(2 * 0.01, least=0.01) == []
    assert off_by(2 * 0.0101, least=0.01) == ["y is off by 0.02, 0.02 allowed"]
    assert off_by(0.25, own_errors={"y": 0.125}) == []
    assert off_by(0.2500100, own_errors={"y": 0.125}) == ["y is off by 0.25, 0.25 allowed"]


def test_the_coarsest_dtype_found_decides_for_all():
    expected = {"y": torch.ones(3), "h": torch.ones(3).bfloat16()}
    found = {"y": torch.ones(3) + 4 * 2.0**-7, "h": expected["h"]}
    assert disagreements(found, expected) == []
    assert disagreements({"y": found["y"]}, {"y": expected["y"]}) == ["y is off by 0.031, 4.8e-07 allowed"]


def test_what_is_not_finite_is_off_and_float64_is_not_narrowed():
    assert off_by(float("nan")) == ["y is off by nan, 9.5e-07 allowed"]
    assert off_by(float("inf")) == ["y is off by inf, 9.5e-07 allowed"]
    assert off_by(9 * 2.0**-52, torch.float64) != [] == off_by(8 * 2.0**-52, torch.float64)


def test_integers_must_be_equal():
    y = torch.arange(6)
    assert disagreements({"i": y.clone()}, {"i": y}) == []
    other = y.clone()
    other[[1, 4]] += 1
    assert disagreements({"i": other}, {"i": y}) == ["i differs in 2 of 6 elements"]
    assert disagreements({"i": y[:5]}, {"i": y}) == ["i differs in 6 of 6 elements"]


def test_nothing_has_no_largest_element():
    assert largest(torch.empty(0)) == 0.0 and largest(torch.tensor([1.0, -3.0])) == 3.0
