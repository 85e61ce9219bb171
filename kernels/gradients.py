"""What a backward writes into."""

import torch


def gradient_buffers(inputs, needs):
    """An unwritten contiguous tensor for the gradient of each input that needs one; an empty one for the others."""
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else inputs[0].new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )
