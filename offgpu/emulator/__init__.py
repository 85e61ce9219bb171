"""Run Triton's compiled NVIDIA code on a CPU: an emulator of PTX for sm_80 and sm_90 on NumPy.

    from heiretsu.offgpu.emulator import installed, run

    with installed(target=90, schedule="random", seed=1) as gpu:      # any launcher, autotuner, custom op, backward
        y = heiretsu.kernels.gpu.layer_norm.layer_norm(x, weight, bias)   # CPU tensors
    assert not gpu.findings, gpu.findings                             # one Report for each launch in gpu.reports

    report = run(kernel, grid, args, dict(BLOCK=128), num_warps=4, target=80)   # one kernel; tensors change in place

Triton compiles as for a GPU; the PTX is then executed, every thread of a batch of CTAs being one lane of NumPy
arrays. So this sees what Triton's interpreter cannot: layouts, masks per vector of elements, shared memory, barriers,
cp.async pipelines, tensor-core instructions, num_warps and num_stages. Checked on the way, each with its source line:

    oob            global access to what is no element of any tensor argument
    misaligned     address not a multiple of the access width (a false multiple_of)
    race-shared    conflicting shared accesses of two warps with no barrier between
    race-global    the same in global memory, and of two CTAs that nothing orders
    uninit-shared  shared memory read before it is written
    cpasync        shared memory read while a cp.async into it is in flight
    divergence     a warp-wide instruction or barrier with lanes missing
    assert         a failed tl.device_assert

oob, misaligned and assert stop the launch (PTXError); the others are collected.

What it does not prove: PTX is not what the hardware runs. Not modelled: SASS and ptxas (register allocation, spills,
its bugs), timing, occupancy, caches, weak memory order, async-proxy fences, wgmma results read before the wait. Not
executed (raises Unsupported): TMA, mbarrier, clusters, warp specialisation, tcgen05, fp8 conversions. ex2, lg2, rcp,
sin and so on are NumPy's, more exact than a GPU's; mma adds in float32 in NumPy's order; fma can round twice. A clean
run is strong evidence; only a run on a GPU is proof.

Files: parser (text -> instructions), translate + operations + arithmetic (instructions -> Python), numerics, batch
(lanes), memory, races (the race model), warp (shuffles, matrices, tensor cores), machine (the scheduler), driver
(Triton's side), report.
"""

import importlib.util

from heiretsu.offgpu.emulator.machine import execute, unsupported
from heiretsu.offgpu.emulator.report import Finding, PTXError, Report, Unsupported

__all__ = ["Finding", "PTXError", "Report", "Unsupported", "execute", "unsupported"]

if importlib.util.find_spec("triton"):  # without it, PTX text still runs
    from heiretsu.offgpu.emulator.driver import EmulatedDriver, installed, run

    __all__ += ["EmulatedDriver", "installed", "run"]
