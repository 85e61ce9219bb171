"""Clocks: implementations measured in turns within one run, and the rates that this device reaches at best."""

import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from heiretsu.bench import memory

# wall: what a user waits for. cpu: CPU seconds of this process, for a machine that others use, too; meaningful with one
# thread only, because threads that wait for each other spin.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FLUSH_BYTES = 256 * 2**20  # more than any L2 holds: a kernel should not find its inputs there


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, and the quartiles as its spread."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @staticmethod
    def of(samples: list[float]) -> "Timing":
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        return Timing(median, low, high, tuple(samples))

    def speedup_over(self, other: "Timing") -> float:
        """other's time / this one's, the median over the rounds, so that slow drift of the machine cancels."""
        return statistics.median(b / a for a, b in zip(self.samples, other.samples, strict=True))


def in_turns(
    functions: dict[str, Callable], device: torch.device, seconds: float, rounds=(5, 100), clock=time.perf_counter
) -> dict[str, Timing]:
    """Time every function once a round, until `seconds` are spent and rounds[0] are done, or rounds[1] are.

    The order rotates, so that nobody always runs behind the same neighbour. Call each once before: this is no warm-up.
    clock: of CLOCKS, for a CPU, or a GpuClock; a GPU is timed by its own events whatever it is.
    """
    if not functions:  # none could take the shape
        return {}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    if device.type == "cuda" and not isinstance(clock, GpuClock):
        clock = GpuClock(device)
    measure: Callable[[Callable], float] = functools.partial(_cpu_time, clock=clock)
    now = clock
    if isinstance(clock, GpuClock):
        measure, now = clock, time.perf_counter
    order = list(functions)
    started = now()
    gc.disable()
    try:
        for done in range(rounds[1]):
            if done >= rounds[0] and now() - started > seconds:
                break
            for name in order[done % len(order) :] + order[: done % len(order)]:
                samples[name].append(measure(functions[name]))
    finally:
        gc.enable()
    return {name: Timing.of(values) for name, values in samples.items()}


def _cpu_time(function: Callable, clock: Callable) -> float:
    started = clock()
    result = function()
    elapsed = clock() - started
    del result
    return elapsed


class GpuClock:
    """Time between two events on the stream, after the L2 was overwritten.

    event: torch.cuda.Event, or what stands in for it where there is no GPU.
    """

    def __init__(self, device: torch.device, event: Callable = torch.cuda.Event, flush_bytes: int = FLUSH_BYTES):
        self.event, self.flush = event, torch.empty(flush_bytes // 4, dtype=torch.int32, device=device)

    def __call__(self, function: Callable) -> float:
        begin, end = self.event(enable_timing=True), self.event(enable_timing=True)
        self.flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Roofline:
    """The best that this device does here: bytes/s of a copy (read + write), FLOP/s of a matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, flops: float, bytes_: float) -> float:
        """What no implementation that moves its inputs and outputs once could beat, by these two rates."""
        return max(flops / self.flops_per_s, bytes_ / self.bytes_per_s)


def measure_roofline(device: torch.device, dtype: torch.dtype, clock=time.perf_counter, tiny=False) -> Roofline:
    """Copy bandwidth of a tensor far larger than the caches, and the fastest of a few matrix products.

    tiny: sizes that measure nothing, to rehearse the code.
    """
    gpu = device.type == "cuda"
    source = torch.ones((2**16 if tiny else 2**30 if gpu else 2**28) // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    copy["copy"]()
    best_copy = min(in_turns(copy, device, 0.0 if tiny else 0.5, (5, 20), clock)["copy"].samples)
    bandwidth = 2 * source.numel() * source.element_size() / best_copy
    products, flops = {}, {}
    sizes = ((8192,) * 3, (16384, 4096, 4096)) if gpu else ((2048, 768, 3072), (1024, 1024, 4096))
    for rows, depth, columns in ((32, 32, 32),) if tiny else sizes:
        a = torch.randn(rows, depth, device=device).to(dtype)
        b = torch.randn(depth, columns, device=device).to(dtype)
        name = f"{rows}x{depth}x{columns}"
        products[name], flops[name] = (lambda a=a, b=b: a @ b), 2 * rows * depth * columns
    for product in products.values():
        product()
    times = in_turns(products, device, 0.0 if tiny else 1.0, (5, 40), clock)
    return Roofline(bandwidth, max(flops[name] / min(times[name].samples) for name in products))


def peak_extra_bytes(function: Callable, device: torch.device) -> int | None:
    """Memory that a call needs over what was allocated before it; None where the system does not tell."""
    gc.collect()
    if device.type != "cuda":
        return memory.peak_resident_over(function)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
