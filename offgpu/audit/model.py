"""Cycles to bounds: what limits a region, how many CTAs fit, and which region is the hot one."""

import re
from dataclasses import replace

from heiretsu.offgpu.audit.lowered_text import warp_specialised
from heiretsu.offgpu.audit.pipes import Region
from heiretsu.offgpu.machines import CTAS_PER_SM, KIB, REGISTERS_PER_SM, THREADS_PER_SM, WARPS_PER_SM, Machine

SUMMED_OVER_PARTITIONS = ("issue", "fma", "alu", "xu", "udp", "lsu")


def bound(region: Region, machine: Machine, warps: int, ctas: int) -> Region:
    """Fill in the limiter and the bounds of a region of which `ctas` copies are resident on an SM."""
    pipes = {pipe: cycles for pipe, cycles in region.pipes.items() if pipe != "smem"}  # a part of lsu
    busiest = max(pipes.values())
    region.limiter = max(pipes, key=lambda pipe: pipes[pipe])
    if region.limiter == "lsu" and region.pipes["smem"] >= pipes["lsu"] - 0.1:
        region.limiter = "smem"
    if region.flops:
        region.tensor_bound = round(region.tensor_ideal / busiest, 3)
        if not machine.is_amd:  # no control words there
            warps_a_quarter = max(1, warps / 4)
            # One warp alone does its vector work, then waits for its share of the tensor work.
            serial = region.stall + pipes["tensor"] / warps_a_quarter
            overlapped = ctas * warps_a_quarter * (region.tensor_ideal / warps_a_quarter) / serial
            region.tensor_bound_serial = round(min(region.tensor_bound, overlapped), 3)
    elif region.bytes:
        region.memory_headroom = round(region.bytes / machine.dram_bytes / busiest, 2)
    return region


def occupancy(registers: int, shared: int, warps: int, machine: Machine) -> tuple[int, float, str]:
    """CTAs that fit on an NVIDIA SM (0: a launch fails), the share of its warps that they fill, what limits them."""
    register_block = (registers * 32 + 255) // 256 * 256  # a warp's registers are handed out in units of 256
    limits = {
        "regs": REGISTERS_PER_SM // (register_block * warps) if registers else CTAS_PER_SM,
        "smem": machine.shared_per_sm // (shared + KIB) if shared <= machine.shared_per_cta else 0,  # 1 KiB is reserved
        "threads": THREADS_PER_SM // (32 * warps),
        "ctas": CTAS_PER_SM,
    }
    ctas, limit = min((count, name) for name, count in limits.items())
    return ctas, round(ctas * warps / WARPS_PER_SM, 3), limit


def wide_share(accesses) -> float:
    """Share of the bytes that move in accesses of 128 bits and more (TMA counts as 128)."""
    sizes = {bits: (128 if bits == "tma" else bits) * count for bits, count in accesses.items()}
    wide = sum(size for bits, size in sizes.items() if bits == "tma" or bits >= 128)
    return round(wide / max(1, sum(sizes.values())), 2)


def hot_region(loops: list[Region], whole: Region) -> Region:
    """The tensor loop with most FLOPs; without one the loop that loads most, if loops carry half of the kernel's loads;
    else the whole kernel. `loops` comes sorted by `by_work`."""
    if loops and loops[0].flops:
        return loops[0]
    if whole.flops:
        return whole
    loading = [loop for loop in loops if loop.load_bytes and loop.memory_headroom]
    if loading and sum(loop.load_bytes for loop in loading) >= 0.5 * whole.load_bytes:
        return min(loading, key=lambda loop: (-loop.load_bytes, loop.memory_headroom))
    return whole


def by_work(region: Region):
    return -region.flops, -region.bytes, region.instructions


def merge_partitions(loops: list[Region], machine: Machine, warps: int, ctas: int) -> Region:
    """Warp specialisation: the tensor loop, plus the other partitions' loops that compute or copy beside it. Rough."""
    beside = [
        loop for loop in loops[1:] if loop.flops == 0 and (loop.pipes["xu"] or loop.loads or loop.pipes["fma"] > 50)
    ]
    parts = [loops[0], *beside]
    pipes = dict(loops[0].pipes)
    for pipe in SUMMED_OVER_PARTITIONS:
        pipes[pipe] = round(sum(part.pipes[pipe] for part in parts), 1)
    merged = replace(
        loops[0],
        where=" + ".join(part.where for part in parts),
        pipes=pipes,
        stall=max(part.stall for part in parts),
        instructions=sum(part.instructions for part in parts),
    )
    return bound(merged, machine, warps, ctas)


def is_warp_specialised(ttgir: str, total_warps: int, warps: int) -> bool:
    return warp_specialised(ttgir) or total_warps != warps


def partition_warps(ttgir: str) -> list[int]:
    return [int(count) for count in re.findall(r"partition\d+\([^)]*\)\s*num_warps\((\d+)\)", ttgir)]
