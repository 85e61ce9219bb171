"""An int32 offset that overflows is an error in the mended interpreter; one in int64 is not."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _far_offset(X, stride, WIDE: tl.constexpr):
    row = tl.program_id(0) + 3
    if WIDE:
        row = row.to(tl.int64)
    offset = row * stride
    tl.store(X + offset, 1.0, mask=offset < 0)


def test_int32_overflow_raises():
    with pytest.raises(InterpreterError, match="int32 overflow"):
        _far_offset[(1,)](torch.zeros(1), 2**30, False)


def test_int64_offsets_pass():
    _far_offset[(1,)](torch.zeros(1), 2**30, True)
