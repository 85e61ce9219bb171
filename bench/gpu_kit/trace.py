"""torch.profiler's traces, read as what ran on the device and when.

On a GPU a trace has an event for each kernel. Without one (a rehearsal) PyTorch's own operators stand for kernels.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

# Kernels of NVIDIA's and AMD's matrix libraries by their names, and the operators that call them.
MATRIX_LIBRARY = re.compile(r"gemm|cutlass|cublas|xmma|nvjet|Cijk|splitK|^aten::(mm|bmm|addmm|linear|matmul)$", re.I)
COMMUNICATION = re.compile(r"^nccl|ncclDevKernel|rccl|^gloo:|^c10d::", re.I)
SYNCHRONISATION = {  # the host waits for the device
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize",
    "hipDeviceSynchronize",
}  # fmt: skip
INDUCTOR = re.compile(r"^triton_(poi|red|per|tem)_")


class Span(NamedTuple):
    """One kernel: microseconds since some start."""

    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) * 1e-6


def record(call: Callable[[], object], path: Path, on_gpu: bool) -> list[dict]:
    """The events of a call, which are written to `path` too (gzip, for Perfetto)."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return load(path)


def load(path: Path) -> list[dict]:
    read = gzip.open if path.suffix == ".gz" else open
    with read(path, "rt") as file:
        return json.load(file)["traceEvents"]


def kernels(events: Iterable[dict], on_gpu: bool) -> list[Span]:
    """What ran on the device, in order of time: the outermost operators where there is none."""
    wanted = {"kernel"} if on_gpu else {"cpu_op"}
    found = [e for e in events if e.get("ph") == "X" and e.get("cat") in wanted]
    spans = sorted(Span(e["name"], float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in found)
    spans.sort(key=lambda span: (span.begin, -span.end))
    if on_gpu:
        return spans
    outermost: list[Span] = []
    for span in spans:
        if not outermost or span.begin >= outermost[-1].end:
            outermost.append(span)
    return outermost


def host_waits(events: Iterable[dict], on_gpu: bool) -> dict[str, int]:
    """How often the host waited for the device, by what it called. Without a GPU: how often it read a value."""
    wanted = SYNCHRONISATION if on_gpu else {"aten::_local_scalar_dense"}
    counts: dict[str, int] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("name") in wanted:
            counts[event["name"]] = counts.get(event["name"], 0) + 1
    return counts


def shares(spans: list[Span], ours: set[str]) -> dict[str, float]:
    """Seconds by whose kernels they are: ours (by function name, or our operators), the matrix library's, NCCL's,
    inductor's, PyTorch's other ones."""
    seconds = dict.fromkeys(("ours", "matrix library", "communication", "inductor", "other"), 0.0)
    for span in spans:
        if span.name in ours or span.name.startswith("heiretsu::"):
            seconds["ours"] += span.seconds
        elif COMMUNICATION.search(span.name):
            seconds["communication"] += span.seconds
        elif INDUCTOR.search(span.name):
            seconds["inductor"] += span.seconds
        elif MATRIX_LIBRARY.search(span.name):
            seconds["matrix library"] += span.seconds
        else:
            seconds["other"] += span.seconds
    return seconds


def overlap(spans: list[Span]) -> tuple[float, float]:
    """(seconds of communication, share of them during which a kernel that is none ran beside it)."""
    talking = union([s for s in spans if COMMUNICATION.search(s.name)])
    working = union([s for s in spans if not COMMUNICATION.search(s.name)])
    total = sum(end - begin for begin, end in talking)
    both = sum(max(0.0, min(e, end) - max(b, begin)) for b, e in talking for begin, end in working)
    return total * 1e-6, both / total if total else 0.0


def union(spans: list[Span]) -> list[tuple[float, float]]:
    """Disjoint intervals that cover the same time."""
    merged: list[tuple[float, float]] = []
    for _, begin, end in sorted(spans, key=lambda span: span.begin):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
