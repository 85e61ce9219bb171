"""Parity cases and planted bugs of dropout. The reference draws the mask by itself, so one wrong bit shows.

In the interpreter a tile is 8 rows by 32 channels.
"""

import torch

from tests.kernels.parity import Case, Mutation

ALL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _inputs(*shape, p=0.3, seed=1234, offset=0, grad=True):
    def inputs(generator, dtype):
        x = torch.randn(shape, generator=generator).to(dtype)
        return {"x": x.requires_grad_(grad), "p": p, "seed": seed, "offset": offset}

    return inputs


def _view(generator, dtype):
    x = torch.randn(3, 6, 50, generator=generator).to(dtype).transpose(0, 1)[:, :, 3:40]
    return {"x": x.requires_grad_(), "p": 0.5, "seed": 3, "offset": 2}


CASES = [
    Case("dropout", "one element", "a tile that is nearly all tail", _inputs(1, 1, 1), dtypes=ALL),
    Case("dropout", "whole tiles", "no tail anywhere", _inputs(2, 4, 32), emulate=True),
    Case("dropout", "tails", "3 samples of 11 positions of 65 channels", _inputs(3, 11, 65), dtypes=ALL),
    Case(
        "dropout", "offset", "samples 1000000 on of a larger batch", _inputs(2, 5, 33, offset=1_000_000), emulate=True
    ),
    Case(
        "dropout",
        "far offset",
        "an offset and a seed beyond 32 bits",
        _inputs(2, 3, 9, seed=2**62 + 5, offset=2**32 + 7),
    ),
    Case("dropout", "unsigned seed", "a seed with bit 63", _inputs(2, 3, 9, seed=2**64 - 3)),
    Case("dropout", "negative seed", "Python masks it to 64 bits", _inputs(2, 3, 9, seed=-5)),
    Case("dropout", "seed one", "a 1 that Triton must not fold into the kernel", _inputs(2, 3, 9, seed=1, offset=1)),
    Case("dropout", "rarely", "a small threshold", _inputs(2, 8, 40, p=0.01)),
    Case("dropout", "mostly", "a large threshold", _inputs(2, 8, 40, p=0.99)),
    Case("dropout", "view", "channels sliced, samples and positions transposed", _view),
    Case("dropout", "no dropout", "p = 0 gives x back", _inputs(2, 3, 9, p=0.0)),
    Case("dropout", "no grad", "inference with dropout on", _inputs(2, 3, 9, grad=False)),
    Case("dropout", "no samples", "an empty batch", _inputs(0, 3, 9)),
]

MUTATIONS = [
    Mutation("scale dropped", "x / KEEP_PROBABILITY", "x", "whole tiles", "dropout.py"),
    Mutation("keeps what it should drop", "bits >= THRESHOLD", "bits < THRESHOLD", "whole tiles", "dropout.py"),
    Mutation("offset dropped", "rows // T + offset", "rows // T", "offset", "dropout.py"),
    Mutation("position not taken within the sample", "(rows % T)", "rows", "tails", "dropout.py"),
    Mutation(
        "sample and position swapped",
        "position, tl.zeros_like(position), sample",
        "sample, tl.zeros_like(position), position",
        "tails",
        "dropout.py",
    ),
    Mutation(
        "seed cut to 32 bits",
        "tl.cast(seed, tl.int64)",
        "tl.cast(seed, tl.int64) & 0xFFFFFFFF",
        "far offset",
        "dropout.py",
    ),
    Mutation(
        "backward draws another mask",
        "_dropout(dout, *ctx.mask)",
        "_dropout(dout, ctx.mask[0], ctx.mask[1] + 1, ctx.mask[2])",
        "tails",
        "dropout.py",
    ),
]
