"""Small kernels for the audit's tests, each with one fault that the audit must see, beside sound ones."""

from functools import partial

import torch
import triton
import triton.language as tl

from heiretsu.kernels.gpu.launch import Tiles, on_every_gpu
from heiretsu.offgpu.audit.bars import Bar
from heiretsu.offgpu.audit.calls import Call

DEVICE = torch.device("cpu")


@triton.jit
def _gemm(A, B, C, K, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, cols, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(A + rows[:, None] * K + (k + depth)[None, :])
        b = tl.load(B + (k + depth)[:, None] * N + cols[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(C + rows[:, None] * N + cols[None, :], acc.to(tl.bfloat16))


@triton.jit
def _double(X, Y, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + index, tl.load(X + index) * 2.0)


def gemm(block_m: int = 128, block_n: int = 256, block_k: int = 64, num_warps: int = 8, num_stages: int = 3) -> None:
    tile = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages)
    a, b, c = (torch.empty(256, 256, dtype=torch.bfloat16) for _ in range(3))
    Tiles("gemm", on_every_gpu({None: tile})).parameters(DEVICE).launch(_gemm, (1,), a, b, c, 256, 256)


def double(first: int = 0) -> None:
    """first: the element at which the arrays begin; 16 bytes are four of them."""
    x, y = (torch.empty(1024 + first)[first:] for _ in range(2))
    tile = dict(BLOCK=1024, num_warps=4, num_stages=1)
    Tiles("double", on_every_gpu({None: tile})).parameters(DEVICE).launch(_double, (1,), x, y)


CALLS = [
    Call("sound", gemm),
    Call("spills", partial(gemm, num_warps=4)),
    # A constant more, so that it is not the same code under two names.
    Call("spills within its allowance", partial(gemm, num_warps=4, num_stages=2), quick=False),
    Call("too much shared memory", partial(gemm, num_stages=6)),
    Call("wrong expectation", partial(gemm, 64, 64, 32, 4)),
    Call("slow tensor path", partial(gemm, 32, 64, 32, 4)),
    Call("below its bar", partial(gemm, 64, 64, 64, 4)),
    Call("does not compile", partial(gemm, block_m=96)),  # tl.arange takes powers of two
    Call("wide accesses", partial(double, 0)),
    Call("narrow accesses", partial(double, 1)),
]


def _flops(constants) -> int:
    return 2 * constants["BLOCK_M"] * constants["BLOCK_N"] * constants["BLOCK_K"]


BARS = [
    Bar("audit_kernels_gemm (sound|below its bar)", min_bound=0.95),
    Bar("audit_kernels_gemm (sound|spills.*|too much shared memory|slow tensor path|below its bar)", loop_flops=_flops),
    Bar("audit_kernels_gemm wrong expectation", loop_flops=lambda constants: 2 * _flops(constants)),
]
SPILLS = {("sm_90", "audit_kernels_gemm spills within its allowance"): 1 << 20}
