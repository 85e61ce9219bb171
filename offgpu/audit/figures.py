"""The figures of one compiled kernel, alike for every machine."""

from collections import Counter
from dataclasses import dataclass, field

from heiretsu.offgpu.audit.pipes import Region


@dataclass
class Figures:
    """registers, stack_bytes and local_bytes are per thread (spills live in the last two); shared_bytes per CTA."""

    arch: str
    warps: int
    stages: int
    total_warps: int  # more than `warps` where the compiler added specialised warps
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    ctas_per_sm: int
    occupancy: float
    occupancy_limit: str
    instructions: int
    mma: dict[str, int]  # tensor instructions in the whole kernel
    loads: Counter
    stores: Counter
    wide_loads: float  # share of the bytes in accesses of 128 bits and more
    wide_stores: float
    hot: Region
    loops: list[Region]
    warp_specialised: bool = False
    partition_warps: list[int] = field(default_factory=list)

    @property
    def spill_bytes(self) -> int:
        return self.stack_bytes + self.local_bytes

    @property
    def bound(self) -> float | None:
        """The figure that the bars are stated in: tensor bound of a kernel with dots, DRAM headroom of one without."""
        return self.hot.tensor_bound if self.hot.flops else self.hot.memory_headroom
