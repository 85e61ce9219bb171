"""Counter-based random bits: dropout masks that do not depend on who computes them.

A mask element is a function of a seed and of its own global coordinates, so that a shard, another launch grid or the
recomputation in a backward pass draws the same mask as the whole. The generator is Philox-4x32-10 (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), bit for bit what `triton.language.philox` computes.
"""

import dataclasses

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # Philox multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
_MASK32 = 0xFFFFFFFF


def philox(seed: int, c0, c1, c2, c3, rounds: int = 10):
    """First of the four 32-bit outputs of Philox-4x32, as int64 in [0, 2**32).

    seed: int, 64 bits are used. c0..c3: int64 tensors (or ints), broadcast together, 32 bits of each are used.
    """
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    c0, c1, c2, c3 = (c & _MASK32 for c in (c0, c1, c2, c3))
    for _ in range(rounds):
        # A wrapped int64 product has the right 64 bits; the mask undoes the arithmetic shift.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, p1 & _MASK32, ((p0 >> 32) & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0


def drop_threshold(p: float) -> int:
    """An element is kept where its 32 random bits are >= this number, which happens with probability 1 - p."""
    return int(p * 2**32)


def signed(number: int, bits: int = 64) -> int:
    """The number whose two's complement has the low `bits` bits of `number`: what fits an operator or a kernel."""
    half = 1 << (bits - 1)
    return (number + half) % (2 * half) - half


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of attention probabilities: p, the seed as a signed 64-bit number, global (batch, head) of element 0."""

    p: float
    seed: int = 0
    batch_offset: int = 0
    head_offset: int = 0

    @classmethod
    def of(cls, p: float, seed: int, batch_offset: int, head_offset: int) -> "Dropout":
        """With the low 32 bits of the offsets, all that a counter has, so that a kernel takes them as int32."""
        return cls(p, seed, signed(batch_offset, 32), signed(head_offset, 32))

    @property
    def drop_below(self) -> int:
        """An element is dropped where its random bits are below this number; 0 is no dropout."""
        return drop_threshold(self.p)

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.p)


def attention_keep_mask(shape, p: float, seed: int, offsets=(0, 0), device=None) -> torch.Tensor:
    """Keep mask of attention probabilities, (B, H, T, S) bool, True with probability 1 - p.

    offsets: global (batch, head) of element [0, 0]; counters are (key, query, head, batch).
    """
    B, H, T, S = shape
    b = torch.arange(B, device=device)[:, None, None, None] + offsets[0]
    h = torch.arange(H, device=device)[:, None, None] + offsets[1]
    i = torch.arange(T, device=device)[:, None]
    j = torch.arange(S, device=device)
    return philox(seed, j, i, h, b) >= drop_threshold(p)


def dropout_keep_mask(shape, p: float, seed: int, offset: int = 0, device=None) -> torch.Tensor:
    """Keep mask of an activation, (B, T, C) bool; offset is the global sample index of row 0 of B.

    Counters are (channel, position, 0, sample).
    """
    B, T, C = shape
    b = torch.arange(B, device=device)[:, None, None] + offset
    t = torch.arange(T, device=device)[:, None]
    c = torch.arange(C, device=device)
    return philox(seed, c, t, c * 0, b) >= drop_threshold(p)
