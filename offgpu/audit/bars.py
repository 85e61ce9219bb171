"""What a shipped configuration must reach: the figures of the best public kernels, or what DRAM allows.

A configuration that falls below is not shipped. None may spill, but for what SPILLS allows it.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from heiretsu.offgpu.audit.calls import Configuration
from heiretsu.offgpu.audit.figures import Figures
from heiretsu.offgpu.machines import KIB, MACHINES, Machine

SLOW_MMA = "HMMA"  # mma.sync: the only tensor instruction of Ampere, a slow path on later machines
NVIDIA = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Bar:
    """For configurations whose whole name matches `pattern`, a regular expression, on the machines `archs`.

    min_bound: the least share of the tensor cores' (or, without a dot, of DRAM's) peak that the hot loop's other pipes
    leave possible. min_wide: the least share of the bytes loaded, and stored, in accesses of 128 bits. loop_flops: what
    an iteration of the hot loop computes, from the launch's constants: it shows that the audit read the right loop.
    """

    pattern: str
    archs: tuple[str, ...] = tuple(MACHINES)
    min_bound: float = 0.0
    min_wide: float = 0.0
    loop_flops: Callable[[Mapping], int] | None = None

    def covers(self, name: str, arch: str) -> bool:
        return arch in self.archs and re.fullmatch(self.pattern, name) is not None


def _products(*sizes: str, times: int = 1) -> Callable[[Mapping], int]:
    return lambda constants: 2 * times * math.prod(constants[size] for size in sizes)


_VARIANT = "( dropout| groups of 4| dropout, groups of 4)?"
_GEMM = r"expert_mlp (hidden|output|dhidden|dx) \(.+\)"
_WEIGHT_GRADIENT = r"expert_mlp dW[12] \(.+\)"
_CROSS_ENTROPY = "linear_cross_entropy (lse|dlogits|dx|dweight)(, whole block|, first block)?"
# What Philox leaves of the tensor cores' peak for one matrix product of D = 64, less a tenth.
_DROPOUT = {"sm_80": 0.075, "sm_90": 0.045, "sm_100": 0.02, "gfx942": 0.045}
_PRODUCTS = {"forward": 2, "dkdv": 4, "dq": 3}  # matrix products of an attention kernel's block

BARS: tuple[Bar, ...] = (
    # FlashAttention-2 forward: the tensor bound of the best public Triton kernels.
    Bar("attention_forward D64", ("sm_90",), 0.94),
    Bar("attention_forward D128", ("sm_90",), 1.00),
    # Its backward: above the best public kernels as they ship (0.67 to 0.76).
    Bar("attention_(dkdv|dq) D64", ("sm_90",), 0.88),
    Bar("attention_(dkdv|dq) D128", ("sm_90",), 0.90),
    Bar("attention_dkdv D64 groups of 4", ("sm_90",), 0.88),
    Bar("attention_dkdv D128 groups of 4", ("sm_90",), 0.90),
    *(
        Bar(f"attention_{kernel} D{D} dropout(, groups of 4)?", (arch,), least * products * D / 64)
        for kernel, products in _PRODUCTS.items()
        for D in (64, 128)
        for arch, least in _DROPOUT.items()
    ),
    # Beyond D = 128 some compute a product twice, which the closed form does not know.
    *(
        Bar(
            f"attention_{kernel} D(64|128){_VARIANT}",
            loop_flops=_products("BLOCK_M", "BLOCK_N", "BLOCK_D", times=times),
        )
        for kernel, times in _PRODUCTS.items()
    ),
    # Grouped GEMM, forward, dx and dW: 128 x 256 tiles reach this.
    *(
        Bar(f"{_GEMM}|{_WEIGHT_GRADIENT}", (arch,), least)
        for arch, least in (("sm_80", 0.95), ("sm_90", 0.95), ("sm_100", 0.65), ("gfx942", 0.95))
    ),
    # float32 has no tensor cores without TF32: no closed form of its loops here or below.
    Bar(f"{_GEMM}( odd sizes)?", loop_flops=_products("BLOCK_M", "BLOCK_N", "BLOCK_K")),
    Bar(f"{_WEIGHT_GRADIENT}( odd sizes)?", loop_flops=_products("BLOCK_A", "BLOCK_B", "BLOCK_R")),
    Bar(_CROSS_ENTROPY, min_bound=0.5),
    Bar("linear_cross_entropy combine", min_bound=1.0),
    Bar("linear_cross_entropy (lse|dlogits)(, whole block)?", loop_flops=_products("BLOCK_N", "BLOCK_V", "BLOCK_C")),
    Bar("linear_cross_entropy (dx|dweight)(, first block)?", loop_flops=_products("BLOCK_M", "BLOCK_C", "BLOCK_K")),
    # Bandwidth-bound: wide accesses, and pipes that leave DRAM the bottleneck (tanh through exp2 does, erf does not).
    *(
        Bar("bias_gelu_(forward|backward)", (arch,), least, 1.0)
        for arch, least in (("sm_80", 1.0), ("sm_90", 2.2), ("sm_100", 1.15))
    ),
    Bar("bias_gelu_(forward|backward)", ("gfx942",), 1.0),
    # Beside x and y a row has two statistics, of one lane each, which count as whole 32-bit instructions here.
    Bar("layer_norm_.*", NVIDIA, 1.0, 0.8),
    Bar("layer_norm_.*", ("gfx942",), 1.0),
)

# Bytes that a thread may spill, where any: {(machine, configuration): bytes}.
SPILLS: dict[tuple[str, str], int] = {
    # D = 256 is not what the tiles are made for.
    ("sm_90", "attention_dkdv D256"): 248,
    ("sm_90", "attention_dkdv D256 groups of 4"): 256,
    ("sm_90", "attention_dq D256"): 32,
    ("sm_90", "attention_dkdv D256 dropout"): 176,
    ("sm_90", "attention_dq D256 dropout"): 128,
    ("sm_100", "attention_forward D256 fp32"): 32,
    # Outside the hot loop, once a tile: what the larger tiles cost.
    ("sm_80", "linear_cross_entropy lse"): 24,
    ("sm_80", "linear_cross_entropy dlogits"): 16,
    ("sm_80", "linear_cross_entropy dlogits, whole block"): 8,
    ("sm_80", "linear_cross_entropy dx"): 64,
    ("sm_90", "linear_cross_entropy dlogits"): 8,
    ("sm_100", "linear_cross_entropy dx"): 264,
    ("sm_100", "linear_cross_entropy dx, first block"): 160,
    ("sm_100", "linear_cross_entropy dweight"): 160,
}


def failures(
    case: Configuration,
    figures: Figures,
    machine: Machine,
    bars: Sequence[Bar] = BARS,
    spills: Mapping[tuple[str, str], int] = SPILLS,
) -> list[str]:
    """What keeps a configuration from shipping on this machine, a sentence each; [] passes."""
    bars = [bar for bar in bars if bar.covers(case.name, machine.arch)]
    flops = {bar.loop_flops(case.constexprs) for bar in bars if bar.loop_flops}
    checks = (
        _fit(figures, machine),
        _spills(figures, spills.get((machine.arch, case.name), 0)),
        _reading(figures, flops),
        _tensor_path(figures, machine, has_dot=any(flops)),
        _bound(figures, max([0.0, *(bar.min_bound for bar in bars)])),
        _widths(figures, max([0.0, *(bar.min_wide for bar in bars)])),
    )
    return [text for check in checks for text in check]


def unused(
    names: Collection[str],
    arch: str,
    bars: Sequence[Bar] = BARS,
    spills: Mapping[tuple[str, str], int] = SPILLS,
) -> list[str]:
    """A bar that no configuration answers to protects nothing: one sentence for each."""
    patterns = [bar.pattern for bar in bars if arch in bar.archs and not any(bar.covers(name, arch) for name in names)]
    patterns += [name for of, name in spills if of == arch and name not in names]
    return [f"no configuration on {arch} is called {pattern}, which has a bar" for pattern in patterns]


def _fit(figures: Figures, machine: Machine) -> Iterator[str]:
    if figures.shared_bytes > machine.shared_per_cta:
        yield (
            f"does not fit: {figures.shared_bytes / KIB:.0f} KiB of shared memory, a CTA has "
            f"{machine.shared_per_cta / KIB:.0f}"
        )
    elif figures.ctas_per_sm < 1:
        yield f"does not fit: {figures.registers} registers x {figures.total_warps} warps"


def _spills(figures: Figures, allowed: int) -> Iterator[str]:
    if figures.spill_bytes > allowed:
        yield f"spills {figures.spill_bytes} bytes a thread, {allowed} allowed"


def _reading(figures: Figures, expected: Collection[int]) -> Iterator[str]:
    for flops in expected:
        if figures.hot.flops != flops:
            yield f"{figures.hot.flops:.0f} FLOP an iteration of the hot loop, closed form {flops}"


def _tensor_path(figures: Figures, machine: Machine, has_dot: bool) -> Iterator[str]:
    slow = figures.hot.mma.get(SLOW_MMA, 0)
    if machine.fast_mma != SLOW_MMA and slow:
        yield f"{slow} mma.sync in the hot loop, where {machine.fast_mma} is this machine's fast path"
    elif has_dot and not any(name.startswith(machine.fast_mma) for name in figures.mma):
        yield f"has a dot but no {machine.fast_mma} instruction"


def _bound(figures: Figures, least: float) -> Iterator[str]:
    if least and (figures.bound is None or figures.bound < least):
        yield f"{'tensor bound' if figures.hot.flops else 'DRAM headroom'} {figures.bound}, at least {least} wanted"


def _widths(figures: Figures, least: float) -> Iterator[str]:
    if least and min(figures.wide_loads, figures.wide_stores) < least:
        yield (
            f"{figures.wide_loads:.0%} of the loaded and {figures.wide_stores:.0%} of the stored bytes move in 128-bit "
            f"accesses, at least {least:.0%} wanted"
        )
