"""SASS instructions to cycles per pipe: what one iteration of one CTA costs each unit of the SM."""

import re
from collections import Counter
from dataclasses import dataclass, field

from heiretsu.offgpu.audit.disassembly import Instruction, is_tcgen05_mma
from heiretsu.offgpu.machines import Machine

XU = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"}
FP = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FFMA32I", "FMUL32I", "FADD32I", "FSWZADD"}
FP_PAIRS = {"FFMA2", "FMUL2", "FADD2"}  # Blackwell: two float32 operations in one instruction, at half the rate
LOADS = {"LDG", "LDGSTS", "LD"}
STORES = {"STG", "ST", "RED", "REDG", "ATOM", "ATOMG"}
OTHER_LSU = {"ATOMS", "SHFL", "LDL", "STL", "MATCH", "LDT", "LDTM", "STTM", "REDUX"}
# Control and barriers: an issue slot, and no pipe that could be the bottleneck.
CONTROL = set(
    "BRA BRX BSSY BSYNC EXIT RET CALL NOP WARPSYNC BAR DEPBAR LDGDEPBAR SYNCS WARPGROUP FENCE MEMBAR ERRBAR CCTL "
    "NANOSLEEP YIELD ELECT ENDCOLLECTIVE WARPGROUPSET USETMAXREG ACQBULK PREEXIT BPT RPCMOV BMOV BREAK KILL UTCBAR "
    "UTMACMDFLUSH UTMAREDG UCGABAR_ARV UCGABAR_WAIT ARRIVES COLLECTIVE".split()
)
WARPGROUP_MMA = ("HGMMA", "QGMMA")
_WIDTHS = (("256", 256), ("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("U8", 8), ("S8", 8))
_HMMA_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}


@dataclass
class Region:
    """A loop's body or the whole kernel: cycles per pipe and traffic of one pass of a CTA. model.py adds the bounds."""

    where: str
    pipes: dict[str, float]
    flops: float
    tensor_ideal: float  # cycles of the flops at the fast tensor peak
    instructions: int
    stall: int  # issue cycles of one warp by its control words
    loads: Counter  # {bits of a lane's access or "tma": instructions}
    stores: Counter
    load_bytes: float
    store_bytes: float
    mma: Counter = field(default_factory=Counter)  # {tensor instruction: how many}
    limiter: str = ""
    tensor_bound: float | None = None
    tensor_bound_serial: float | None = None
    memory_headroom: float | None = None

    @property
    def bytes(self) -> float:
        return self.load_bytes + self.store_bytes


def access_bits(opcode: str) -> int:
    """Bits of one lane's access by a memory instruction."""
    parts = opcode.split(".")
    return next((bits for name, bits in _WIDTHS if name in parts), 32)


def mma_shape(opcode: str) -> tuple[int, int, int] | None:
    """(M, N, K) of a warp's (HMMA) or a warp group's (HGMMA) MMA; None for anything else."""
    if match := re.match(r"[HQ]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)", opcode):
        M, N, K = map(int, match.groups())
        return M, N, K
    if match := re.match(r"HMMA\.(\d+)", opcode):
        return _HMMA_SHAPES.get(match[1], (16, 8, 16))
    return None


def is_mma(ins: Instruction) -> bool:
    return mma_shape(ins.opcode) is not None or is_tcgen05_mma(ins)


def charge(where: str, body: list[Instruction], machine: Machine, warps: int, bulk_bytes: float, tcgen05) -> Region:
    """The Region of `body`, each instruction executed by `warps` warps.

    bulk_bytes: what one TMA instruction moves. tcgen05: (M, N, K) for a tcgen05.mma that does not tell its shape.
    """
    tally = _Tally(machine, warps, bulk_bytes, tcgen05 or (128, 128, 16))
    for ins in body:
        if ins.predicate != "@!PT":  # padding of ptxas that never executes, but takes an issue slot
            tally.add(ins)
    loads, stores = tally.loads, tally.stores
    return Region(
        where=where,
        pipes=tally.cycles(len(body)),
        flops=tally.flops,
        tensor_ideal=tally.flops / machine.tensor_flops,
        instructions=len(body),
        stall=sum(ins.stall for ins in body),
        loads=loads,
        stores=stores,
        load_bytes=tally.traffic(loads),
        store_bytes=tally.traffic(stores),
        mma=tally.mma,
    )


class _Tally:
    """Sums of one region: fp .. lsu count a warp's instructions; shared, flops and tensor are the whole CTA's."""

    def __init__(self, machine, warps, bulk_bytes, tcgen05):
        self.machine, self.warps, self.bulk_bytes, self.tcgen05 = machine, warps, bulk_bytes, tcgen05
        self.fp = self.imad = self.alu = self.xu = self.uniform = self.lsu = 0.0
        self.shared = self.flops = self.tensor = 0.0
        self.loads: Counter = Counter()
        self.stores: Counter = Counter()
        self.mma: Counter = Counter()

    def add(self, ins: Instruction) -> None:
        base = ins.base
        if is_mma(ins):
            self._add_mma(ins)
        elif base in FP:
            self.fp += 1
        elif base in FP_PAIRS:
            self.fp += 2
        elif base == "IMAD":
            self.imad += 2 if "WIDE" in ins.opcode or "HI" in ins.opcode else 1
        elif base in XU:
            self.xu += 1
        elif self._add_memory(ins) or base in CONTROL:
            pass
        elif base.startswith("U") or base in ("R2UR", "S2UR"):
            self.uniform += 1
        else:
            self.alu += 0.5 if base in ("MOV", "CS2R") else 1

    def _add_mma(self, ins: Instruction) -> None:
        peak, base = self.machine.tensor_flops, ins.base
        self.mma[base] += 1
        M, N, K = mma_shape(ins.opcode) or self.tcgen05
        if base == "HMMA":
            flops = 2 * M * N * K * self.warps
            self.tensor += flops / peak / self.machine.mma_sync_share
        elif base in WARPGROUP_MMA:
            flops = 2 * M * N * K * self.warps / 4
            self.tensor += flops / peak * max(1.0, 64 / N)
            a_in_registers = re.match(r"R\d+,\s*R\d+,\s*gdesc", ins.operands.replace(".reuse", ""))
            self._read_operands(M, N, K, a_in_registers, self.warps / 4)
        else:
            if shape := re.search(r"shape=(\d+)x(\d+)", ins.operands):
                M, N = int(shape[1]), int(shape[2])
            flops = 2 * M * N * K  # one instruction for the whole CTA
            self.tensor += flops / peak * max(1.0, 128 / M)
            self._read_operands(M, N, K, "tmem" in ins.operands.split(",")[0], 1)
        self.flops += flops

    def _read_operands(self, M, N, K, a_elsewhere, times) -> None:
        """An asynchronous MMA reads B, and A unless it lies elsewhere, from shared memory."""
        self.shared += (N * K * 2 + (0 if a_elsewhere else M * K * 2)) / 128 * times

    def _add_memory(self, ins: Instruction) -> bool:
        base, bits = ins.base, access_bits(ins.opcode)
        if base in LOADS:
            self.loads[bits] += 1
            self.lsu += max(1, bits / 32)
            if base == "LDGSTS":  # cp.async also fills shared memory
                self.shared += bits / 8 * 32 / 128 * self.warps
        elif base in STORES:
            self.stores[bits] += 1
            self.lsu += max(1, bits / 32)
        elif base in ("LDS", "STS"):
            self.shared += bits / 8 * 32 / 128 * self.warps
            self.lsu += 1
        elif base in ("LDSM", "STSM"):
            self.shared += (4 if ins.opcode.endswith(".4") else 2 if ins.opcode.endswith(".2") else 1) * self.warps
            self.lsu += 1
        elif base in ("UTMALDG", "UTMASTG"):
            (self.loads if base == "UTMALDG" else self.stores)["tma"] += 1
            self.shared += self.bulk_bytes / 128
        elif base in OTHER_LSU:
            self.lsu += 1
        else:
            return False
        return True

    def traffic(self, accesses: Counter) -> float:
        """Global bytes of one CTA."""
        return sum(
            (self.bulk_bytes if bits == "tma" else bits / 8 * 32 * self.warps) * count
            for bits, count in accesses.items()
        )

    def cycles(self, issued: int) -> dict[str, float]:
        per_quarter = self.warps / 4  # warps of a sub-partition
        share = (
            64 / self.machine.fp32_lanes
        )  # A100: FP and IMAD share 64 lanes; H100 and B200 have twice as many for FP
        cycles = {
            "issue": issued * per_quarter,
            "fma": max(2 * self.imad, 2 * share * self.fp + 2 * share * self.imad) * per_quarter,
            "alu": 2 * self.alu * per_quarter,
            "xu": 8 * self.xu * per_quarter,
            "udp": 2 * self.uniform * per_quarter,
            "lsu": max(self.lsu * self.warps, self.shared),
            "smem": self.shared,
            "tensor": self.tensor,
        }
        return {pipe: round(value, 1) for pipe, value in cycles.items()}
