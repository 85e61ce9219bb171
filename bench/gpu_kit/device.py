"""What the kit asks of a GPU, through torch.cuda or, in a rehearsal, through what stands in for it.

Also the one place for what differs between releases: of torch (2.11 and later) and of what Triton (3.6 and later) says
about a compiled kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from heiretsu.bench.timing import GpuClock


class Device:
    """cuda: torch.cuda, or an object with the same functions. torch_device: where tensors go. arch: of offgpu.machines,
    None where the audit knows no such machine."""

    def __init__(self, cuda: ModuleType | SimpleNamespace, torch_device: torch.device, flush_bytes: int):
        self.cuda, self.torch_device, self.flush_bytes = cuda, torch_device, flush_bytes
        self.properties = cuda.get_device_properties(0)
        self.name: str = self.properties.name
        self.arch = _audited_arch(self.properties, cuda.get_device_capability(0))

    def clock(self) -> GpuClock:
        return GpuClock(self.torch_device, self.cuda.Event, self.flush_bytes)

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def is_well(self) -> bool:
        """Whether the device still answers: after an illegal access, every call of the process fails."""
        try:
            answer = torch.ones(1, device=self.torch_device).add_(1).item()
            self.cuda.synchronize()
        except Exception:  # of whatever kind: torch names it anew in every release
            return False
        return answer == 2.0

    def release_memory(self) -> None:
        self.cuda.empty_cache()

    def free_bytes(self) -> int:
        return self.cuda.mem_get_info()[0]


def _audited_arch(properties, capability: tuple[int, int]) -> str | None:
    from heiretsu.offgpu.machines import MACHINES  # Triton, which facts about a machine can do without

    named = getattr(properties, "gcnArchName", "").partition(":")[0]
    arch = named if torch.version.hip else f"sm_{capability[0]}{capability[1]}"
    return arch if arch in MACHINES else None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


@dataclass(frozen=True)
class Resources:
    """Of a compiled kernel, as the driver tells once it is loaded: registers and spilled bytes of a thread."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spill_bytes} spilled bytes, {self.shared_bytes / 1024:.1f} KiB"


def resources(compiled: Any) -> Resources:
    """Load Triton's CompiledKernel into the driver and ask. Raises what the driver raises if it does not fit.

    n_regs and n_spills are there after loading only (a launch loads, too), and n_spills counts words of four bytes.
    """
    compiled._init_handles()
    return Resources(compiled.n_regs, 4 * compiled.n_spills, compiled.metadata.shared, compiled.metadata.num_warps)


def compiled_variants(fn) -> list[tuple[dict[str, object], Any]]:
    """(constexprs by name, CompiledKernel) of all that this process has launched of a @triton.jit function."""
    found = []
    for caches in fn.device_caches.values():
        for compiled in caches[0].values():
            constants = {fn.arg_names[key[0]]: value for key, value in compiled.src.constants.items()}
            found.append((constants, compiled))
    return found
