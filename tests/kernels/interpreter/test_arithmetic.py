"""The mended interpreter's bfloat16 is PyTorch's, each operation computed in float32 and rounded once; and a product's
bits do not depend on where its row and column stand."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from heiretsu.kernels.gpu import launch  # noqa: F401  # mends the interpreter, as for whoever imports a kernel
from heiretsu.kernels.gpu.interpreter_arithmetic import to_bits, to_float32

N = 64


@triton.jit
def _operation(X, Y, OUT, NAME: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at)
    y = tl.load(Y + at)
    if NAME == "add":
        out = x + y
    elif NAME == "subtract":
        out = x - y
    elif NAME == "multiply":
        out = x * y
    elif NAME == "divide":
        out = x / y
    elif NAME == "negate":
        out = -x
    elif NAME == "absolute":
        out = tl.abs(x)
    elif NAME == "maximum":
        out = tl.maximum(x, y)
    elif NAME == "compare":
        out = tl.where(x < y, x * 0.5, y)
    elif NAME == "constant":
        out = x + 1.5
    elif NAME == "full":
        out = tl.full((N,), 1.5, tl.bfloat16) * x
    elif NAME == "fma":
        out = tl.fma(x, y, x)
    elif NAME == "clamp":
        out = tl.clamp(x, -0.5, 0.5)
    elif NAME == "through float64":
        out = x.to(tl.float64).to(tl.bfloat16)
    elif NAME == "through float16":
        out = x.to(tl.float16).to(tl.bfloat16)
    elif NAME == "through int32":
        out = (x * 8).to(tl.int32).to(tl.bfloat16)
    elif NAME == "through bits":
        out = (x.to(tl.int16, bitcast=True) + 1).to(tl.bfloat16, bitcast=True)
    elif NAME == "to nearest":
        out = (x.to(tl.float32) * 1.003).to(tl.bfloat16, fp_downcast_rounding="rtne")
    elif NAME == "to nearest by the store":
        out = x.to(tl.float32) * 1.003
    elif NAME == "sum":
        out = tl.zeros((N,), tl.bfloat16) + tl.sum(x, 0).to(tl.bfloat16)
    elif NAME == "max":
        out = tl.zeros((N,), tl.bfloat16) + tl.max(x, 0)
    elif NAME == "argmax":
        out = tl.zeros((N,), tl.bfloat16) + tl.argmax(x, 0).to(tl.bfloat16)
    elif NAME == "cumsum":
        out = tl.cumsum(x, 0).to(tl.bfloat16)
    tl.store(OUT + at, out)


def _fma(x, y):
    return (x.double() * y.double() + x.double()).bfloat16()


EXPECTED = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y,
    "negate": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "maximum": torch.maximum,
    "compare": lambda x, y: torch.where(x < y, x * 0.5, y),
    "constant": lambda x, y: x + 1.5,
    "full": lambda x, y: x * 1.5,
    "fma": _fma,
    "clamp": lambda x, y: x.clamp(-0.5, 0.5),
    "through float64": lambda x, y: x,
    "through float16": lambda x, y: x.half().bfloat16(),
    "through int32": lambda x, y: (x * 8).int().bfloat16(),
    "through bits": lambda x, y: (x.view(torch.int16) + 1).view(torch.bfloat16),
    "to nearest": lambda x, y: (x.float() * 1.003).bfloat16(),
    "to nearest by the store": lambda x, y: (x.float() * 1.003).bfloat16(),
    "sum": lambda x, y: x.float().sum().bfloat16().expand(N),
    "max": lambda x, y: x.max().expand(N),
    "argmax": lambda x, y: x.argmax().bfloat16().expand(N),
    "cumsum": lambda x, y: x.float().cumsum(0).bfloat16(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_operation_on_bfloat16_rounds_once(name):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(N, generator=generator).bfloat16() for _ in range(2))
    out = torch.zeros(N, dtype=torch.bfloat16)
    _operation[(1,)](x, y, out, name, N)
    assert torch.equal(out, EXPECTED[name](x, y))


@triton.jit
def _dot(A, B, OUT, ACCUMULATE: tl.constexpr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    accumulator = tl.load(OUT + at)
    if ACCUMULATE:
        tl.store(OUT + at, tl.dot(tl.load(A + at), tl.load(B + at), accumulator))
    else:
        tl.store(OUT + at, tl.dot(tl.load(A + at), tl.load(B + at)))


@pytest.mark.parametrize("accumulate", [False, True])
def test_dot_of_bfloat16_accumulates_in_float32(accumulate):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    start = torch.randn(16, 16, generator=generator)
    out = start.clone()
    _dot[(1,)](a, b, out, accumulate)
    torch.testing.assert_close(out, a.float() @ b.float() + start * accumulate, rtol=1e-5, atol=1e-5)


def test_every_float32_rounds_to_the_bfloat16_of_pytorch():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = (np.arange(4096, dtype=np.uint32) << 16) + 0x8000
    numbers = np.concatenate([bits, ties, ties + 1, ties - 1]).view(np.float32)
    ours = torch.from_numpy(to_float32(to_bits(numbers)))
    torch.testing.assert_close(ours, torch.from_numpy(numbers).bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _products(A, B, OUT, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(A + m[:, None] * K + k[None, :]), tl.load(B + n[:, None] * K + k[None, :])
    tl.store(OUT + m[:, None] * N + n[None, :], tl.dot(a, b.T, input_precision="ieee", out_dtype=OUT.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [16, 64, 256])
def test_an_element_of_a_product_has_the_same_bits_in_every_place_and_shape(dtype, K):
    a, b = torch.randn(32, K, dtype=dtype), torch.randn(64, K, dtype=dtype)

    def product(left, right):
        out = torch.empty(len(left), len(right), dtype=dtype)
        _products[(1,)](left, right, out, len(left), len(right), K)
        return out

    found = product(a, b)
    torch.testing.assert_close(found.double(), a.double() @ b.double().T, rtol=0, atol=16 * K * torch.finfo(dtype).eps)
    assert product(a.flip(0), b.roll(5, 0)).roll(-5, 1).flip(0).equal(found)
    assert product(b, a).T.equal(found) and product(a[:16], b[16:48]).equal(found[:16, 16:48])
