"""Scratch memory starts poisoned, whichever way a launcher asks for it, also inside a custom op."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from heiretsu.offgpu.scratch import PATTERN, poisoned_scratch


@pytest.fixture(autouse=True)
def scratch_memory_is_poisoned():
    with poisoned_scratch():
        yield


ALLOCATIONS = {
    "empty": lambda like: torch.empty(3, 5, dtype=like.dtype),
    "empty_like": lambda like: torch.empty_like(like),
    "empty_strided": lambda like: torch.empty_strided((3, 5), (8, 1), dtype=like.dtype),
    "empty_permuted": lambda like: torch.empty_permuted((3, 5), (1, 0), dtype=like.dtype),
    "new_empty": lambda like: like.new_empty(3, 5),
    "new_empty_strided": lambda like: like.new_empty_strided((3, 5), (1, 3)),
}


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floats_start_as_nan(allocate, dtype):
    out = allocate(torch.zeros(3, 5, dtype=dtype))
    assert out.shape == (3, 5) and out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integers_start_as_the_pattern(dtype):
    out = torch.empty(3, 5, dtype=dtype)
    assert (out == PATTERN[dtype.itemsize]).all()


def test_the_gaps_of_a_strided_tensor_are_poisoned_too():
    out = torch.empty_strided((3, 5), (8, 1))
    out.zero_()
    assert int(out.as_strided((21,), (1,)).isnan().sum()) == 6


def test_allocations_inside_a_custom_op_are_poisoned():
    @torch.library.custom_op("heiretsu_test::forgets_a_row", mutates_args=())
    def forgets_a_row(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[1:] = x[1:]
        return out

    assert forgets_a_row(torch.zeros(3, 5)).isnan().any(1).tolist() == [True, False, False]


def test_fake_tensors_are_left_alone():
    with FakeTensorMode():
        assert torch.empty(3, 5).shape == (3, 5)


def test_torch_is_as_before_afterwards():
    before = torch.empty
    with poisoned_scratch():
        assert torch.empty is not before
    assert torch.empty is before
