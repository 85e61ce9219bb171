"""What a shipped configuration must reach: each case's own bars, and the library's for the kernels that carry it.

A case states its bars beside its configuration (launch.AuditCase). The ones here hold besides, whatever the case says:
the figures of the best public kernels, or what DRAM allows. A configuration that falls below is not shipped.
"""

import re
from dataclasses import dataclass

from heiretsu.kernels.gpu.launch import AuditCase
from heiretsu.offgpu.audit.figures import Figures
from heiretsu.offgpu.machines import KIB, Machine

SLOW_MMA = "HMMA"  # mma.sync: the only tensor instruction of Ampere, a slow path on later machines


@dataclass(frozen=True)
class Bar:
    """For cases whose name matches `pattern` (whole, a regular expression), on machine `arch`."""

    pattern: str
    arch: str
    max_spill_bytes: int | None = None
    min_bound: float = 0.0
    min_wide: float = 0.0  # share of the bytes loaded, and stored, in accesses of 128 bits

    def covers(self, name: str, arch: str) -> bool:
        return arch == self.arch and re.fullmatch(self.pattern, name) is not None


_VARIANT = "(dropout|groups of 4|dropout, groups of 4)"
_GROUPED_GEMM = r"expert_mlp (hidden|output|dhidden|dx|dW1|dW2)\b.*"
BARS: tuple[Bar, ...] = (
    # FlashAttention-2 forward: the tensor bound of the best public Triton kernels.
    Bar("attention_forward D64", "sm_80", max_spill_bytes=64),
    Bar("attention_forward D64", "sm_90", max_spill_bytes=0, min_bound=0.94),
    Bar("attention_forward D64", "sm_100", max_spill_bytes=0),
    Bar("attention_forward D128", "sm_80", max_spill_bytes=64),
    Bar("attention_forward D128", "sm_90", max_spill_bytes=0, min_bound=1.00),
    Bar("attention_forward D128", "sm_100", max_spill_bytes=0),
    # Its backward: above the best public kernels as they ship (0.67 to 0.76).
    Bar("attention_(dkdv|dq) D64", "sm_80", max_spill_bytes=64),
    Bar("attention_(dkdv|dq) D64", "sm_90", max_spill_bytes=0, min_bound=0.88),
    Bar("attention_(dkdv|dq) D64", "sm_100", max_spill_bytes=0),
    Bar("attention_(dkdv|dq) D128", "sm_80", max_spill_bytes=64),
    Bar("attention_(dkdv|dq) D128", "sm_90", max_spill_bytes=64, min_bound=0.90),
    Bar("attention_(dkdv|dq) D128", "sm_100", max_spill_bytes=64),
    # Attention with dropout, and dk and dv of grouped queries: no more spills than without.
    *(Bar(f"attention_(forward|dkdv|dq) D(64|128) {_VARIANT}", arch, max_spill_bytes=64)
      for arch in ("sm_80", "gfx942")),
    *(Bar(f"attention_(forward D64|forward D128|dkdv D64|dq D64) {_VARIANT}", arch, max_spill_bytes=0)
      for arch in ("sm_90", "sm_100")),
    *(Bar(f"attention_(dkdv|dq) D128 {_VARIANT}", arch, max_spill_bytes=64) for arch in ("sm_90", "sm_100")),
    Bar("attention_dkdv D64 groups of 4", "sm_90", min_bound=0.88),
    Bar("attention_dkdv D128 groups of 4", "sm_90", min_bound=0.90),
    # Grouped GEMM, forward, dx and dW: 128 x 256 tiles reach this.
    Bar(_GROUPED_GEMM, "sm_90", max_spill_bytes=0, min_bound=0.95),
    Bar(_GROUPED_GEMM, "sm_100", max_spill_bytes=0, min_bound=0.65),
    # Bandwidth-bound: wide accesses, and pipes that leave DRAM the bottleneck (tanh through exp2 does, erf does not).
    *(Bar("bias_gelu_.*", arch, max_spill_bytes=0, min_bound=bound, min_wide=1.0)
      for arch, bound in (("sm_80", 1.0), ("sm_90", 2.2), ("sm_100", 1.15))),
    # Beside x and y a row has two statistics, of one lane each, which count as whole 32-bit instructions here.
    *(Bar("layer_norm_.*", arch, max_spill_bytes=0, min_bound=1.0, min_wide=0.8)
      for arch in ("sm_80", "sm_90", "sm_100")),
)  # fmt: skip


def failures(case: AuditCase, figures: Figures, machine: Machine, bars: tuple[Bar, ...] = BARS) -> list[str]:
    """What keeps the case from shipping on this machine, a sentence each; [] passes."""
    bars = tuple(bar for bar in bars if bar.covers(case.name, machine.arch))
    checks = (
        _fit(figures, machine),
        _spills(case, figures, bars),
        _reading(case, figures),
        _tensor_path(case, figures, machine),
        _bound(case, figures, bars),
        _widths(figures, bars),
    )
    return [text for check in checks for text in check]


def unused(case_names, arch: str, bars: tuple[Bar, ...] = BARS) -> list[str]:
    """A bar that no case answers to protects nothing: one sentence for each."""
    return [
        f"no case on {arch} is called {bar.pattern}, which bars.py states a bar for"
        for bar in bars
        if bar.arch == arch and not any(bar.covers(name, arch) for name in case_names)
    ]


def _fit(figures, machine):
    if figures.shared_bytes > machine.shared_per_cta:
        yield (
            f"does not fit: {figures.shared_bytes / KIB:.0f} KiB of shared memory, a CTA has "
            f"{machine.shared_per_cta / KIB:.0f}"
        )
    elif figures.ctas_per_sm < 1:
        yield f"does not fit: {figures.registers} registers x {figures.total_warps} warps"


def _spills(case, figures, bars):
    allowed = min([case.max_spill_bytes, *(bar.max_spill_bytes for bar in bars if bar.max_spill_bytes is not None)])
    if figures.spill_bytes > allowed:
        yield f"spills {figures.spill_bytes} bytes a thread, {allowed} allowed"


def _reading(case, figures):
    if case.loop_flops is not None and figures.hot.flops != case.loop_flops:
        yield f"{figures.hot.flops:.0f} FLOP an iteration of the hot loop, closed form {case.loop_flops}"


def _tensor_path(case, figures, machine):
    slow = figures.hot.mma.get(SLOW_MMA, 0)
    if machine.fast_mma != SLOW_MMA and slow:
        yield f"{slow} mma.sync in the hot loop, where {machine.fast_mma} is this machine's fast path"
    elif case.loop_flops and not any(name.startswith(machine.fast_mma) for name in figures.mma):
        yield f"has a dot but no {machine.fast_mma} instruction"


def _bound(case, figures, bars):
    least = max([case.min_bound, *(bar.min_bound for bar in bars)])
    if least and (figures.bound is None or figures.bound < least):
        yield f"{'tensor bound' if figures.hot.flops else 'DRAM headroom'} {figures.bound}, at least {least} wanted"


def _widths(figures, bars):
    least = max([0.0, *(bar.min_wide for bar in bars)])
    if least and min(figures.wide_loads, figures.wide_stores) < least:
        yield (
            f"{figures.wide_loads:.0%} of the loaded and {figures.wide_stores:.0%} of the stored bytes move in 128-bit "
            f"accesses, at least {least:.0%} wanted"
        )
