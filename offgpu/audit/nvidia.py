"""Figures of a kernel compiled for NVIDIA: read from its cubin, with what only PTX and TTGIR tell."""

from collections import Counter

from heiretsu.offgpu.audit import model
from heiretsu.offgpu.audit.disassembly import Instruction, disassemble
from heiretsu.offgpu.audit.figures import Figures
from heiretsu.offgpu.audit.loops import natural_loops
from heiretsu.offgpu.audit.lowered_text import bulk_copy_bytes, tcgen05_shapes
from heiretsu.offgpu.audit.pipes import LOADS, STORES, access_bits, charge, is_mma
from heiretsu.offgpu.machines import Machine


def figures(compiled, machine: Machine, warps: int, stages: int) -> Figures:
    """compiled: Triton's CompiledKernel."""
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    program = disassemble(compiled.asm["cubin"])
    instructions = program.instructions
    total_warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    ctas, occupancy, limit = model.occupancy(program.registers, shared, total_warps, machine)
    shapes = tcgen05_shapes(ptx)
    tcgen05 = Counter(shapes).most_common(1)[0][0] if shapes else None
    bulk_bytes = bulk_copy_bytes(ttgir, warps)

    def region(where, body):
        return model.bound(charge(where, body, machine, warps, bulk_bytes, tcgen05), machine, warps, max(1, ctas))

    loops = [
        region(f"loop at {hex(address)}", [instructions[i] for i in sorted(body)])
        for address, body in candidate_loops(instructions, program.labels)
    ]
    loops.sort(key=model.by_work)
    hot = model.hot_region(loops, region("whole kernel", without_padding(instructions)))
    specialised = model.is_warp_specialised(ttgir, total_warps, warps)
    if specialised and len(loops) > 1 and loops[0].flops:
        hot = model.merge_partitions(loops, machine, warps, max(1, ctas))
    loads, stores = _accesses(instructions)
    return Figures(
        arch=machine.arch,
        warps=warps,
        stages=stages,
        total_warps=total_warps,
        registers=program.registers,
        stack_bytes=program.stack_bytes,
        local_bytes=program.local_bytes,
        shared_bytes=shared,
        ctas_per_sm=ctas,
        occupancy=occupancy,
        occupancy_limit=limit,
        instructions=len(instructions),
        mma=dict(Counter(ins.base for ins in instructions if is_mma(ins))),
        loads=loads,
        stores=stores,
        wide_loads=model.wide_share(loads),
        wide_stores=model.wide_share(stores),
        hot=hot,
        loops=loops,
        warp_specialised=specialised,
        partition_warps=model.partition_warps(ttgir) if specialised else [],
    )


def candidate_loops(instructions: list[Instruction], labels: dict[str, int]) -> list[tuple[int, set[int]]]:
    """Innermost loops, and the innermost of those with an MMA even if a loop without one is nested in it."""

    def spins(body):  # waiting on an mbarrier
        return len(body) <= 8 and any(instructions[i].opcode.startswith("SYNCS") for i in body)

    def has_mma(body):
        return any(is_mma(instructions[i]) for i in body)

    loops = [(at, body) for at, body in natural_loops(instructions, labels) if len(body) > 3 and not spins(body)]
    innermost = [loop for loop in loops if not any(other < loop[1] for _, other in loops)]
    return innermost + [
        loop
        for loop in loops
        if loop not in innermost
        and has_mma(loop[1])
        and not any(other < loop[1] and has_mma(other) for _, other in loops)
    ]


def without_padding(instructions: list[Instruction]) -> list[Instruction]:
    """What the assembler appended is left out: NOPs, and the branch to itself after the last EXIT."""
    exits = [i for i, ins in enumerate(instructions) if ins.opcode.startswith("EXIT")]
    last = exits[-1] if exits else len(instructions) - 1
    return [
        ins
        for i, ins in enumerate(instructions)
        if ins.opcode != "NOP" and not (i > last and ins.opcode.startswith("BRA"))
    ]


def _accesses(instructions: list[Instruction]) -> tuple[Counter, Counter]:
    """Global loads and stores of the whole kernel: {bits of a lane's access, or "tma": instructions}."""
    loads: Counter = Counter()
    stores: Counter = Counter()
    for ins in instructions:
        if ins.base in LOADS:
            loads[access_bits(ins.opcode)] += 1
        elif ins.base in STORES:
            stores[access_bits(ins.opcode)] += 1
        elif ins.base in ("UTMALDG", "UTMASTG"):
            (loads if ins.base == "UTMALDG" else stores)["tma"] += 1
    return loads, stores
