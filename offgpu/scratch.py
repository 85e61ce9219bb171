"""Poison for memory that nobody has written: NaN in floats, a huge number in integers, one bit pattern for each size.

Under `poisoned_scratch` every tensor from torch.empty and its relatives starts full of it, so that an unwritten tile
shows as NaN in the output. The exact pattern tells the sanitizer that an element which is read was never written.
"""

import contextlib
import functools

import torch

# Read as floats, these are quiet NaNs with a payload that no arithmetic makes. One byte is too small for that.
PATTERN = {1: 0x5A, 2: 0x7FED, 4: 0x7FEDBEEF, 8: 0x7FFDBEEF7FEDBEEF}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ALLOCATORS = [
    *((torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")),
    *((torch.Tensor, name) for name in ("new_empty", "new_empty_strided")),
]


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill the tensor's whole memory, gaps between strides included; fake and meta tensors have none."""
    if type(tensor) is torch.Tensor and tensor.device.type in ("cpu", "cuda") and tensor.numel():
        size = tensor.element_size()
        if tensor.dtype == torch.bool:
            tensor.fill_(True)
        elif size in PATTERN:
            bits = torch.zeros(0, dtype=_BITS[size], device=tensor.device).set_(tensor.untyped_storage())
            bits.fill_(PATTERN[size])
    return tensor


@contextlib.contextmanager
def poisoned_scratch():
    """Inside, torch.empty, empty_like, empty_strided, empty_permuted, new_empty and new_empty_strided return poison.

    (torch.utils.deterministic.fill_uninitialized_memory would do it below Python as well, but comes only with
    use_deterministic_algorithms, which sends PyTorch's own ops down paths that users do not run.)
    """
    originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    for owner, name, allocate in originals:
        setattr(owner, name, _poisoning(allocate))
    try:
        yield
    finally:
        for owner, name, allocate in originals:
            setattr(owner, name, allocate)


def _poisoning(allocate):
    @functools.wraps(allocate)
    def poisoned(*args, **kwargs):
        return poison_(allocate(*args, **kwargs))

    return poisoned
