"""In which dtype the ops add up: float32 at least."""

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other float."""
    return torch.promote_types(dtype, torch.float32)
