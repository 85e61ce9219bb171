"""Small kernels for the audit's tests, each with one fault that the audit must see, beside sound ones."""

import triton
import triton.language as tl

from heiretsu.kernels.gpu.launch import AuditCase


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


def gemm(name, block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3, flops_factor=2, **bars):
    return AuditCase(
        name=name,
        fn=_gemm,
        signature={"A": "*bf16:16", "B": "*bf16:16", "C": "*bf16:16", "K": "i32:16", "N": "i32:16"},
        constexprs={"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k},
        num_warps=num_warps,
        num_stages=num_stages,
        loop_flops=flops_factor * block_m * block_n * block_k,
        **bars,
    )


def double(name, divisible, **bars):
    signature = {"X": "*fp32" + divisible, "Y": "*fp32" + divisible}
    return AuditCase(name, _double, signature, {"BLOCK": 1024}, num_warps=4, num_stages=1, **bars)


def audit_cases(arch):
    return [
        gemm("sound", min_bound=0.95),
        gemm("spills", num_warps=4),
        gemm("spills within its allowance", num_warps=4, max_spill_bytes=1 << 20),
        gemm("too much shared memory", num_stages=6),
        gemm("wrong expectation", 64, 64, 32, 4, flops_factor=4),
        gemm("slow tensor path", 32, 64, 32, 4),
        gemm("below its bar", 64, 64, 32, 4, min_bound=0.95),
        gemm("does not compile", block_m=96),  # tl.arange takes powers of two
        double("wide accesses", ":16"),
        double("narrow accesses", ""),
    ]
