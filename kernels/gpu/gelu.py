"""GELU and its derivative for Triton kernels, tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415).

With z = 2 sqrt(2/pi) (u + 0.044715 u^3), 0.5 (1 + tanh(z / 2)) is s = sigmoid(z), so

    gelu(u) = u s,   gelu'(u) = s + u s (1 - s) dz/du.

sigmoid is one exp2 and one reciprocal; a tanh would cost more, and instructions, not bytes, could bound what calls
this. Device functions only, inlined into the kernels, for float32 or float64.
"""

import math

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(math.log2(math.e))
_LINEAR = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))
_CUBIC = tl.constexpr(0.044715 * 2.0 * math.sqrt(2.0 / math.pi))
# From here on the derivative is 0 or 1 to 36 places, while e^z (2^126), z and all products are finite in float32.
_EDGE = tl.constexpr(10.0)


@triton.jit
def gelu(u):
    """u sigmoid(z)."""
    return u / (1.0 + tl.exp2(u * (-_LOG2_E * _LINEAR - _LOG2_E * _CUBIC * u * u)))


@triton.jit
def gelu_and_derivative(u):
    """(gelu(u), d gelu(u) / du), where s = 1 / (1 + e) and 1 - s = e s without cancellation.

    Both are right up to infinity, and NaN for a NaN.
    """
    low = tl.maximum(u, -_EDGE, propagate_nan=tl.PropagateNan.ALL)
    v = tl.minimum(low, _EDGE, propagate_nan=tl.PropagateNan.ALL)
    square = v * v
    e = tl.exp2(v * (-_LOG2_E * _LINEAR - _LOG2_E * _CUBIC * square))
    root = tl.rsqrt(1.0 + e)  # its square takes 4 instructions fewer than a division
    s = root * root
    return low * s, s * (1.0 + v * (_LINEAR + 3.0 * _CUBIC * square) * (e * s))
