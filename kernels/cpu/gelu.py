"""GELU and its derivative on a block of a CPU tensor, in place."""

import math

import torch

# GELU's tanh form without a tanh: 0.5 (1 + tanh(s)) = sigmoid(2 s), with 2 s = u (GELU_LINEAR + GELU_CUBIC u**2).
GELU_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715 * GELU_LINEAR


def gelu_block(u, out, derivative, q, s, r, linear):
    """out = GELU(u) and, unless it is None, derivative = GELU'(u), in their dtypes; u and scratch q, s, r are lost.

    u, q, s, r, linear: of one shape, float32 or float64, small enough for the cache. linear: filled with GELU_LINEAR.
    """
    torch.addcmul(linear, u, u, value=GELU_CUBIC, out=q)
    torch.mul(u, q, out=s)
    exact = out.dtype == u.dtype  # 1 - s loses to cancellation what bf16 and fp16 cannot show
    if derivative is not None and exact:
        torch.neg(s, out=r).sigmoid_()
    s.sigmoid_()
    out.copy_(u.mul_(s))  # u sigmoid(u q)
    if derivative is not None:  # s + u s (1 - s) d(u q)/du, and d(u q)/du = 3 q - 2 GELU_LINEAR
        u.mul_(r) if exact else u.addcmul_(u, s, value=-1.0)
        derivative.copy_(s.addcmul_(u, q, value=3.0).add_(u, alpha=-2.0 * GELU_LINEAR))
