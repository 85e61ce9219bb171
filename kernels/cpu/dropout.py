"""dropout on CPU tensors: the mask is drawn a block at a time (see row_blocks) and kept, one byte an element."""

import torch

from heiretsu.kernels import plain
from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.cpu.random import BlockPhilox
from heiretsu.kernels.cpu.row_blocks import row_blocks
from heiretsu.kernels.random import drop_threshold, signed


def keep_mask(shape, p, seed, offset):
    """`random.dropout_keep_mask` bit for bit, (B, T, C) bool, in blocks of a sample that the cache holds."""
    B, T, C = shape
    keep, threshold = torch.empty(shape, dtype=torch.bool, device="cpu"), drop_threshold(p)
    positions, channels = torch.arange(T, device="cpu"), torch.arange(C, device="cpu")
    blocks = row_blocks(T, C)
    random = BlockPhilox(blocks[0].stop * C)
    for b in range(B):
        for block in blocks:
            bits = random.draw(seed, positions[block], channels, head=0, batch=(b + offset) & 0xFFFFFFFF)
            torch.ge(bits, threshold, out=keep[b, block])
    return keep


@torch.library.custom_op("heiretsu::cpu_dropout", mutates_args=())
def _dropout(x: torch.Tensor, p: float, seed: int, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator and not its formula, so that one compiled graph serves every seed. Returns out and the mask."""
    keep = keep_mask(x.shape, p, seed, offset)
    return torch.where(keep, x / (1.0 - p), 0.0).contiguous(), keep


@_dropout.register_fake
def _(x, p, seed, offset):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out, dtype=torch.bool)


def _setup_dropout(ctx, inputs, output):
    ctx.keep_probability = 1.0 - inputs[1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _dropout_backward(ctx, dout, _):
    return torch.where(ctx.saved_tensors[0], dout / ctx.keep_probability, 0.0), None, None, None


_dropout.register_autograd(_dropout_backward, setup_context=_setup_dropout)


@checked
def dropout(x, p, seed, offset=0):
    """`plain.dropout` on CPU tensors; saves the mask, one byte an element. x: (B, T, C)."""
    if p == 0.0 or x.numel() == 0:
        return plain.dropout(x, p, seed, offset)
    reverse_mode_only("dropout", x)
    return _dropout(x, float(p), signed(seed), offset)[0]
