"""GELU and its derivative on CPU tensors."""

import math

import torch

from heiretsu.kernels.cpu.row_blocks import block_rows, slices

# GELU's tanh form without a tanh: 0.5 (1 + tanh(s)) = sigmoid(2 s), with 2 s = u (GELU_LINEAR + GELU_CUBIC u**2).
GELU_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715 * GELU_LINEAR


class Gelu:
    """GELU of up to `rows` rows of `width`, computed in `dtype`, a block of rows at a time (see row_blocks)."""

    def __init__(self, rows, width, dtype):
        self.step = block_rows(width)
        self.scratch = torch.empty(5, min(rows, self.step), width, dtype=dtype, device="cpu")
        self.scratch[4] = GELU_LINEAR

    def __call__(self, x, bias, out, derivative):
        """out = GELU(x + bias) and derivative = GELU'(x + bias), in their dtypes; None for no bias or derivative."""
        exact = out.dtype == self.scratch.dtype  # 1 - s loses to cancellation what bf16 and fp16 cannot show
        for block in slices(len(x), self.step):
            u, q, s, r, linear = self.scratch[:, : block.stop - block.start]
            u.copy_(x[block])
            if bias is not None:
                u += bias
            torch.addcmul(linear, u, u, value=GELU_CUBIC, out=q)
            torch.mul(u, q, out=s)
            if derivative is not None and exact:
                torch.neg(s, out=r).sigmoid_()
            s.sigmoid_()
            out[block] = u.mul_(s)  # u sigmoid(u q)
            if derivative is not None:  # s + u s (1 - s) d(u q)/du, and d(u q)/du = 3 q - 2 GELU_LINEAR
                u.mul_(r) if exact else u.addcmul_(u, s, value=-1.0)
                derivative[block] = s.addcmul_(u, q, value=3.0).add_(u, alpha=-2.0 * GELU_LINEAR)
