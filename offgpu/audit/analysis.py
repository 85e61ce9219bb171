"""From source to figures; and the same for GEMMs whose FLOPs and bytes an iteration are known: is the reading right?"""

import triton
import triton.language as tl

from heiretsu.offgpu.audit import amd, nvidia
from heiretsu.offgpu.audit.compiling import compile_kernel
from heiretsu.offgpu.audit.figures import Figures
from heiretsu.offgpu.machines import Machine

TILES = ((128, 128, 64, 8), (128, 256, 64, 8), (64, 64, 32, 4))  # BLOCK_M, BLOCK_N, BLOCK_K, warps


@triton.jit
def _gemm_kernel(A, B, C, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """C = A @ B, row-major bf16, sizes that the tiles divide: the simplest loop with a dot."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(A + rows[:, None] * K + (k + depth)[None, :])
        b = tl.load(B + (k + depth)[:, None] * N + cols[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(C + rows[:, None] * N + cols[None, :], acc.to(tl.bfloat16))


SIGNATURE = {"A": "*bf16:16", "B": "*bf16:16", "C": "*bf16:16", "M": "i32:16", "N": "i32:16", "K": "i32:16"}


def analyze(machine: Machine, fn, signature, constexprs, num_warps, num_stages, **options) -> Figures:
    """Compile one kernel for `machine` and read its figures."""
    compiled = compile_kernel(machine, fn, signature, constexprs, num_warps, num_stages, **options)
    return (amd if machine.is_amd else nvidia).figures(compiled, machine, num_warps, num_stages)


def check_reading(machine: Machine) -> list[str]:
    """One line for each GEMM of which the audit reads other FLOPs or bytes than the closed form says; [] is right."""
    wrong = []
    for block_m, block_n, block_k, warps in TILES:
        if machine.is_amd and block_n > 128:
            continue  # its three stages do not fit in 64 KiB of LDS
        blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
        hot = analyze(machine, _gemm_kernel, SIGNATURE, blocks, warps, 3).hot
        flops, read = 2 * block_m * block_n * block_k, (block_m + block_n) * block_k * 2
        if (hot.flops, hot.load_bytes) != (flops, read):
            wrong.append(
                f"{machine.arch} GEMM {block_m}x{block_n}x{block_k}: read {hot.flops:.0f} FLOP and "
                f"{hot.load_bytes:.0f} bytes an iteration, closed form {flops} and {read}"
            )
    return wrong
