"""The random bits of `heiretsu.kernels.random`, fast on a CPU: few operations, in place, in blocks the cache holds."""

import torch

from heiretsu.kernels.random import _M0, _M1, _MASK32, _W0, _W1

_ROUNDS = 10


class BlockPhilox:
    """`random.philox` for blocks of up to `size` elements, in scratch memory that is allocated once.

    Five operations a half round: the low half of a product keeps its dirty upper 32 bits until the next mask.
    """

    def __init__(self, size: int):
        self._scratch = torch.empty(6, size, dtype=torch.int64, device="cpu")

    def draw(self, seed: int, rows, columns, head: int, batch: int) -> torch.Tensor:
        """Bits of counters (columns[None, :], rows[:, None], head, batch): (rows, columns) int64 in [0, 2**32).

        rows, columns: int64 (R,) and (C,), from 0 to 2**32 - 1. The result is scratch: use it before the next draw.
        """
        shape = (len(rows), len(columns))
        a, c, p0, p1, q0, q1 = (t[: shape[0] * shape[1]].view(shape) for t in self._scratch)
        keys = [((seed + r * _W0) & _MASK32, ((seed >> 32) + r * _W1) & _MASK32) for r in range(_ROUNDS)]

        # Rounds 1 to 3: the coordinates mix, and only what depends on both has the full shape.
        head_product = (head & _MASK32) * _M1
        row = (rows[:, None] ^ (head_product >> 32) ^ keys[0][0]) & _MASK32
        column_product = columns[None, :] * _M0
        column = ((column_product >> 32) ^ batch ^ keys[0][1]) & _MASK32
        row_product, product = row * _M0, column * _M1
        column = ((product >> 32) ^ head_product ^ keys[1][0]) & _MASK32
        torch.bitwise_xor((row_product >> 32) ^ keys[1][1], column_product, out=c).bitwise_and_(_MASK32)
        torch.mul(c, _M1, out=p1)
        torch.bitwise_right_shift(p1, 32, out=a).bitwise_xor_(product ^ keys[2][0]).bitwise_and_(_MASK32)
        low = column * _M0
        torch.bitwise_xor((low >> 32) ^ keys[2][1], row_product, out=c).bitwise_and_(_MASK32)

        # From here on all is full. The last two rounds leave out what no longer reaches the first word.
        for r, (k0, k1) in enumerate(keys[3:], start=4):
            torch.mul(c, _M1, out=q1)
            if r < _ROUNDS:
                torch.mul(a, _M0, out=q0)
                torch.bitwise_right_shift(q0, 32, out=c).bitwise_xor_(low).bitwise_xor_(k1).bitwise_and_(_MASK32)
            if r != _ROUNDS - 1:
                torch.bitwise_right_shift(q1, 32, out=a).bitwise_xor_(p1).bitwise_xor_(k0).bitwise_and_(_MASK32)
            low, p0, p1, q0, q1 = q0, q0, q1, p0, p1
        return a
