"""Inverted dropout whose mask is a function of (seed, global position), in Triton.

An element is kept where the Philox bits of its own counters reach p: `random.dropout_keep_mask` bit for bit, whichever
rank, grid or pass asks. No mask is stored: the backward is the same kernel on the gradient. Bytes: 2 values an element
each way, against 2 and a mask byte. Ten Philox rounds cost more than the bytes they come with (static headroom below
1), of which the two first are shared by a row or a column of the tile.

N = B T rows of C channels; row r is position r % T of sample r // T.
"""

import torch
import triton
import triton.language as tl

from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.gpu import launch
from heiretsu.kernels.gpu.launch import Tiles, on_every_gpu
from heiretsu.kernels.gpu.row_tiles import as_rows, contiguous_like, load_tile, store_tile
from heiretsu.kernels.random import drop_threshold, signed

# Bound by Philox's integer arithmetic, whatever the tile: headroom A100 .34, H100 .32, B200 .16, MI300X .36.
TILES = Tiles(
    "dropout",
    on_every_gpu({None: dict(BLOCK_N=4, BLOCK_C=256, num_warps=4, num_stages=1)})
    | {"interpreter": {None: dict(BLOCK_N=8, BLOCK_C=32, num_warps=4, num_stages=1)}},
)


@triton.jit(do_not_specialize=["seed", "offset", "T"])
def _kernel(
    x_ptr,  # (N, C), rows stride_x apart
    out_ptr,  # (N, C)
    N, C, T, stride_x, seed,
    offset,  # global sample of row 0
    THRESHOLD: tl.constexpr, KEEP_PROBABILITY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    col_blocks = tl.cdiv(C, BLOCK_C)
    rows = (tl.program_id(0) // col_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (tl.program_id(0) % col_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    position = (rows % T).to(tl.int32)[:, None]
    sample = (rows // T + offset).to(tl.int32)[:, None]  # the low 32 bits
    bits, _, _, _ = tl.philox(tl.cast(seed, tl.int64), cols[None, :], position, tl.zeros_like(position), sample)
    x = load_tile(x_ptr, rows, stride_x, cols, N, C)
    store_tile(out_ptr, tl.where(bits >= THRESHOLD, x / KEEP_PROBABILITY, 0.0), rows, cols, N, C)


@torch.library.custom_op("heiretsu::dropout", mutates_args=())
def _dropout(x: torch.Tensor, p: float, seed: int, offset: int) -> torch.Tensor:
    out = contiguous_like(x)
    if x.numel() == 0:
        return out
    rows, (_, T, C) = as_rows(x), x.shape
    chosen = TILES.parameters(x.device, itemsize=x.itemsize)
    chosen.launch(
        _kernel, (triton.cdiv(rows.shape[0], chosen["BLOCK_N"]) * triton.cdiv(C, chosen["BLOCK_C"]),),
        rows, out, *rows.shape, T, rows.stride(0), seed, offset,
        THRESHOLD=drop_threshold(p), KEEP_PROBABILITY=1.0 - p,
    )  # fmt: skip
    return out


@_dropout.register_fake
def _(x, p, seed, offset):
    return contiguous_like(x)


def _setup_context(ctx, inputs, output):
    _, *ctx.mask = inputs


def _backward(ctx, dout):
    return _dropout(dout, *ctx.mask), None, None, None


_dropout.register_autograd(_backward, setup_context=_setup_context)


@checked
def dropout(x: torch.Tensor, p: float, seed: int, offset: int = 0) -> torch.Tensor:
    """Inverted dropout in Triton: `plain.dropout`.

    x: (B, T, C) float, any strides. p: drop probability, [0, 1). seed: 64 bits. offset: global sample of x[0].
    Returns (B, T, C); x itself if p is 0.
    """
    if p == 0.0:
        return x
    launch.require_device("dropout", x)
    reverse_mode_only("dropout", x)
    return _dropout(x, float(p), signed(seed), offset)
