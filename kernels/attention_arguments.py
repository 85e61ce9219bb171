"""What every form of attention accepts: one check, so that the Triton and the CPU form refuse the same inputs."""

import dataclasses
import math

from heiretsu.kernels.random import drop_threshold

LARGEST_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of attention probabilities: p, the seed as a signed 64-bit number, global (batch, head) of element 0."""

    p: float
    seed: int = 0
    batch_offset: int = 0
    head_offset: int = 0

    @property
    def drop_below(self) -> int:
        """An element is dropped where its random bits are below this number; 0 is no dropout."""
        return drop_threshold(self.p)

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.p)


def check(op: str, q, k, v, scale, dropout_p, seed, offsets) -> tuple[float, Dropout]:
    """Raise ValueError for what attention does not take; return the scale and the dropout to use."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; it must be (batch, heads, length, head dim)")
    if k.shape != v.shape:
        raise ValueError(f"{op}: k {tuple(k.shape)} and v {tuple(v.shape)} must have the same shape")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: q {tuple(q.shape)} and k {tuple(k.shape)} must have the same batch and head dim")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: {k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if not 1 <= q.shape[3] <= LARGEST_HEAD_DIM:
        raise ValueError(f"{op}: head dim {q.shape[3]} is outside 1..{LARGEST_HEAD_DIM}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"{op}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must have one floating dtype")
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"{op}: scale={scale} must be finite and not negative")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p={dropout_p} is outside [0, 1)")
    if seed >= 2**63:
        seed -= 2**64  # the same 64 bits, signed
    return scale, Dropout(float(dropout_p), seed, *offsets)
