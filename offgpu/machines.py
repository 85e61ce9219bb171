"""The four GPUs that the audit knows: what one SM (AMD: one CU) can hold, and do in a clock."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from heiretsu.run.data_sheets import data_sheet

KIB = 1024

# Alike on every NVIDIA machine below.
REGISTERS_PER_SM, THREADS_PER_SM, CTAS_PER_SM, WARPS_PER_SM = 65536, 2048, 32, 64


@dataclass(frozen=True)
class Machine:
    """One SM of a GPU, in units a clock. Sources: vendor data sheets (peak FLOP/s, DRAM bytes/s, SMs, boost clock)."""

    arch: str
    name: str
    kernel_class: str  # architecture class: of heiretsu.kernels.control.GPUS
    target: GPUTarget
    shared_per_sm: int  # bytes
    shared_per_cta: int  # bytes; a launch that asks for more fails
    tensor_flops: int  # dense bf16 FLOP a clock
    dram_bytes: float  # bytes a clock
    fast_mma: str  # prefix of the SASS (AMD: ISA) name of the fast tensor instruction
    fp32_lanes: int = 128
    mma_sync_share: float = 1.0  # rate of mma.sync / rate of the fast tensor instruction

    @property
    def is_amd(self) -> bool:
        return self.target.backend == "hip"


def _dram_bytes(name: str, sms: int, clock_hz: float) -> float:
    return data_sheet(name).dram_bytes / sms / clock_hz


MACHINES = {
    machine.arch: machine
    for machine in (
        Machine(
            "sm_80", "A100", "ampere", GPUTarget("cuda", 80, 32), 164 * KIB, 163 * KIB, 2048,
            _dram_bytes("A100", 108, 1.41e9), "HMMA", fp32_lanes=64,
        ),
        Machine(
            "sm_90", "H100", "hopper", GPUTarget("cuda", 90, 32), 228 * KIB, 227 * KIB, 4096,
            _dram_bytes("H100", 132, 1.755e9), "HGMMA", mma_sync_share=0.63,
        ),
        Machine(
            "sm_100", "B200", "blackwell", GPUTarget("cuda", 100, 32), 228 * KIB, 227 * KIB, 8192,
            _dram_bytes("B200", 148, 1.85e9), "UTC", mma_sync_share=0.25,
        ),
        Machine(
            "gfx942", "MI300X", "cdna3", GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, 2048,
            _dram_bytes("MI300X", 304, 2.1e9), "MFMA",
        ),
    )
}  # fmt: skip


def machine(arch: str) -> Machine:
    """The Machine called `arch`; ValueError names the known ones."""
    if arch not in MACHINES:
        raise ValueError(f"--arch {arch}: the audit knows {', '.join(MACHINES)}")
    return MACHINES[arch]
