"""What the kernels ought to reach on an H100, and whether a run's figures do: reached, missed or not measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from heiretsu.bench.gpu_kit.lines import figures

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


@dataclass(frozen=True)
class Target:
    """value(lines) -> the figure, None where it was not measured. sense: ">=" or "<="."""

    name: str
    value: Callable[[list[dict]], float | None]
    sense: str
    wanted: float

    def verdict(self, lines: list[dict]) -> tuple[str, float | None]:
        value = self.value(lines)
        if value is None:
            return "not measured", None
        reached = value >= self.wanted if self.sense == ">=" else value <= self.wanted
        return ("reached" if reached else "missed"), value


def seconds(line: dict | None, pass_name: str) -> float | None:
    """Of a figure of `fast`; a backward pass is what it adds to the forward."""
    passes = (line or {}).get("passes") or {}
    if BOTH not in passes or FORWARD not in passes:
        return None
    forward, both = passes[FORWARD]["median_s"], passes[BOTH]["median_s"]
    return {FORWARD: forward, BOTH: both, BACKWARD: both - forward}[pass_name]


def one(lines: list[dict], op: str, series: str, size: int, implementation: str) -> dict | None:
    """The figure of an implementation at one shape. series: its beginning."""
    for line in figures(lines, "fast"):
        shape = line.get("op") == op and line.get("size") == size and line.get("series", "").startswith(series)
        if shape and line["implementation"] == implementation:
            return line
    return None


def times(op: str, series: str, size: int, rival: str, pass_name: str) -> Callable[[list[dict]], float | None]:
    """How many times as fast as a rival."""

    def value(lines):
        ours, theirs = (seconds(one(lines, op, series, size, name), pass_name) for name in ("fused", rival))
        return theirs / ours if ours and theirs else None

    return value


def share(op: str, size: int) -> Callable[[list[dict]], float | None]:
    """Of the copy bandwidth, in the forward and backward pass together."""

    def value(lines):
        line = one(lines, op, "", size, "fused")
        return ((line or {}).get("passes") or {}).get(BOTH, {}).get("share_of_roof")

    return value


def memory(op: str, series: str, size: int, rival: str) -> Callable[[list[dict]], float | None]:
    def value(lines):
        ours, theirs = ((one(lines, op, series, size, n) or {}).get("peak_bytes") for n in ("fused", rival))
        return ours / theirs if ours is not None and theirs else None

    return value


def whole_step(lines: list[dict]) -> float | None:
    """tokens/s of the fused GPT-2 over those of the compiled plain one; compiled or not, whichever is faster."""
    rates = {line["name"]: line["value"] for line in figures(lines, "train") if line["unit"] == "tokens/s"}
    ours = [rate for name, rate in rates.items() if name.startswith("GPT-2: fused+bf16") and rate]
    theirs = rates.get("GPT-2: plain+bf16+compile")
    return max(ours) / theirs if ours and theirs else None


_LCE = ("linear_cross_entropy", "C=768", 8192)
_MIXTURE = ("expert_mlp", "C=768 F=3072 E=8 balanced", 8192)
_ATTENTION = ((FORWARD, "SDPA flash", 1.0), (FORWARD, "SDPA cuDNN", 0.75), (BACKWARD, "SDPA flash", 0.9))


def _attention(D: int) -> list[Target]:
    at = ("attention", f"H=16 D={D}", 4096)
    return [
        Target(f"attention {what} D={D} 4k: x {rival}", times(*at, rival, what), ">=", wanted)
        for what, rival, wanted in _ATTENTION
    ]


TARGETS = [
    *_attention(64),
    *_attention(128),
    *(Target(f"expert_mlp {what}: x grouped_mm", times(*_MIXTURE, "grouped_mm", what), ">=", 1.3)
      for what in (FORWARD, BACKWARD)),
    Target("layer_norm: share of copy bandwidth", share("layer_norm", 768), ">=", 0.85),
    Target("bias_gelu: share of copy bandwidth", share("bias_gelu", 3072), ">=", 0.85),
    Target("linear_cross_entropy: x compiled chunks", times(*_LCE, "compiled chunks", BOTH), ">=", 1.0),
    # A tenth of what the form that keeps the logits takes: chunks, too, are there to save that memory.
    Target("linear_cross_entropy: memory / compiled plain", memory(*_LCE, "compiled plain"), "<=", 0.1),
    Target("GPT-2 step: x plain compiled", whole_step, ">=", 1.15),
]  # fmt: skip
