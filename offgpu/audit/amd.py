"""Figures of a kernel compiled for AMD CDNA3: read from its assembly text, by a coarser model."""

import re
from collections import Counter, defaultdict

from heiretsu.offgpu.audit import model
from heiretsu.offgpu.audit.disassembly import parse_amd
from heiretsu.offgpu.audit.figures import Figures
from heiretsu.offgpu.audit.pipes import Region
from heiretsu.offgpu.machines import Machine

_MFMA = re.compile(r"v_mfma_f32_(\d+)x(\d+)x(\d+)")
_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_f32")
_GLOBAL = re.compile(r"(buffer|global|flat)_(load|store|atomic)")
_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "ubyte": 8}
_LANES, _REGISTERS, _MAX_WAVES, _WAVES_PER_CU = 64, 512, 8, 32  # a SIMD holds at most 8 waves; a CU has 4 SIMDs


def figures(compiled, machine: Machine, warps: int, stages: int) -> Figures:
    """compiled: Triton's CompiledKernel. local_bytes holds the number of spilled vector registers."""
    assembly, shared = compiled.asm["amdgcn"], compiled.metadata.shared

    def stated(key: str) -> int:
        return int((re.findall(rf"\.{key}:\s*(\d+)", assembly) or ["0"])[-1])

    registers = stated("vgpr_count")  # VGPR and AGPR: one file since gfx90a, handed out in units of 8
    waves = min(_MAX_WAVES, _REGISTERS // ((max(registers, 1) + 7) // 8 * 8))
    by_shared = machine.shared_per_sm // shared if shared else 99
    ctas = min(waves * 4 // warps, by_shared)
    instructions, labels = parse_amd(assembly)

    def region(where, body):
        return model.bound(_charge(where, body, machine, warps), machine, warps, max(1, ctas))

    loops = [
        region(f"loop at {start}", instructions[start : end + 1]) for start, end in _innermost(instructions, labels)
    ]
    loops.sort(key=model.by_work)
    whole = region("whole kernel", instructions)
    return Figures(
        arch=machine.arch,
        warps=warps,
        stages=stages,
        total_warps=warps,
        registers=registers,
        stack_bytes=stated("private_segment_fixed_size"),
        local_bytes=stated("vgpr_spill_count"),
        shared_bytes=shared,
        ctas_per_sm=ctas,
        occupancy=round(min(ctas * warps, _WAVES_PER_CU) / _WAVES_PER_CU, 3),
        occupancy_limit="lds" if by_shared * warps < waves * 4 else "vgpr",
        instructions=len(instructions),
        mma={"MFMA": whole.mma["MFMA"]} if whole.mma else {},
        loads=whole.loads,
        stores=whole.stores,
        wide_loads=model.wide_share(whole.loads),
        wide_stores=model.wide_share(whole.stores),
        hot=model.hot_region(loops, whole),
        loops=loops,
    )


def _innermost(instructions, labels) -> list[tuple[int, int]]:
    """(first, last) instruction of each backward branch's span that holds no other such span."""
    spans = [
        (labels[operands], i)
        for i, (opcode, operands) in enumerate(instructions)
        if opcode.startswith(("s_cbranch", "s_branch")) and labels.get(operands, i + 1) <= i
    ]
    return [
        (start, end)
        for start, end in spans
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in spans)
    ]


def _charge(where: str, body, machine: Machine, warps: int) -> Region:
    cycles: dict[str, float] = defaultdict(float)
    loads: Counter = Counter()
    stores: Counter = Counter()
    mma: Counter = Counter()
    flops = 0
    for opcode, _ in body:
        if match := _MFMA.match(opcode):
            per_wave = 2 * int(match[1]) * int(match[2]) * int(match[3])
            flops += per_wave * warps
            mma["MFMA"] += 1
            cycles["tensor"] += per_wave / (machine.tensor_flops / 4) * warps / 4
        elif opcode.startswith("v_"):
            cycles["valu"] += (16 if _TRANSCENDENTAL.match(opcode) else 4) * warps / 4
        elif opcode.startswith("ds_"):
            bits = int((re.findall(r"b(\d+)", opcode) or ["32"])[0]) * (2 if "2" in opcode.split("_")[1] else 1)
            cycles["lds"] += bits / 8 * _LANES / 128 * warps
        elif match := _GLOBAL.match(opcode):
            bits = _BITS.get(opcode.split("_")[2], 32)
            (loads if match[2] == "load" else stores)[bits] += 1
    cycles["issue"] = len(body) * warps / 4

    def traffic(accesses):
        return sum(bits / 8 * _LANES * warps * count for bits, count in accesses.items())

    return Region(
        where=where,
        pipes={pipe: round(cycles[pipe], 1) for pipe in ("issue", "valu", "lds", "tensor")},
        flops=flops,
        tensor_ideal=flops / machine.tensor_flops,
        instructions=len(body),
        stall=0,
        loads=loads,
        stores=stores,
        load_bytes=traffic(loads),
        store_bytes=traffic(stores),
        mma=mma,
    )
