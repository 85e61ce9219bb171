"""One workload, every implementation: prepared, checked, and timed in turns."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from heiretsu.bench import rivals
from heiretsu.bench.parity import Judge, cotangents_for, gradients_of
from heiretsu.bench.timing import Roofline, Timing, in_turns, peak_extra_bytes
from heiretsu.bench.workloads import Inputs, Workload
from heiretsu.kernels import fused, plain

FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)
OURS, BASELINE, COMPILED = "fused", "plain", "compiled plain"


@dataclass
class Result:
    """One implementation on one workload. problem: why it has no number; then timings is empty."""

    workload: Workload
    implementation: str
    timings: dict[str, Timing]
    speedups: dict[str, float]  # over plain; empty where plain has no number
    shares: dict[str, float]  # of the roofline
    itemsize: int
    peak_bytes: int | None = None
    problem: str = ""

    def rate(self, pass_name: str) -> tuple[float, str]:
        """(value, unit) that the useful work was done at: FLOP/s of an op with products, bytes/s of one without."""
        flops, bytes_ = self.work(pass_name)
        seconds = self.timings[pass_name].median
        return (flops / seconds, "FLOP/s") if self.workload.counts_flops else (bytes_ / seconds, "B/s")

    def work(self, pass_name: str) -> tuple[float, float]:
        """(FLOPs, bytes) of a pass."""
        return _work(self.workload, self.itemsize)[pass_name]


def _work(workload: Workload, itemsize: int) -> dict[str, tuple[float, float]]:
    (forward, backward), (read, reread) = workload.flops, workload.elements
    return {FORWARD: (forward, read * itemsize), BOTH: (forward + backward, (read + reread) * itemsize)}


def implementations(workload: Workload, device: torch.device, compiled: bool) -> dict[str, Callable[[Inputs], tuple]]:
    """Plain first, then ours, then the alternatives."""

    def run_plain(inputs):
        return workload.call(plain, inputs)

    found = {BASELINE: run_plain, OURS: lambda inputs: workload.call(fused, inputs)}
    if compiled:
        found[COMPILED] = torch.compile(run_plain, dynamic=False)
    return found | rivals.for_workload(workload, device)


def measure(
    workload: Workload,
    device: torch.device,
    dtype: torch.dtype,
    roofline: Roofline,
    quick: bool,
    compiled: bool = True,
    clock: Callable = time.perf_counter,
    tiny: bool = False,
) -> list[Result]:
    """Results in the order of `implementations`; each pass is timed for seconds, or half of one.

    tiny: three rounds, and the rivals of a GPU whatever the device: to rehearse the code.
    """
    torch.compiler.reset()
    inputs = place(workload.inputs(torch.Generator().manual_seed(0), dtype), device)
    candidates = implementations(workload, device, compiled) | (rivals.on_gpu(workload) if tiny else {})
    judge = Judge(workload, inputs, dtype)
    seconds, rounds = (0.0, (3, 3)) if tiny else (0.4, (3, 50)) if quick else (2.0, (7, 200))
    cotangents = None
    results, sound = [], {}
    for name, call in candidates.items():
        result = Result(workload, name, {}, {}, {}, dtype.itemsize)
        results.append(result)
        try:
            result.problem = judge.problem(call)
            if result.problem:
                continue
            if cotangents is None:
                outputs = tuple(out.detach() for out in call(inputs))
                cotangents = cotangents_for(outputs, torch.Generator().manual_seed(1))
            passes = _passes(call, inputs, cotangents)
            if judge.inputs is not inputs:
                passes[BOTH]()  # warm: the judge has compiled and allocated for a part of this shape only
            result.peak_bytes = peak_extra_bytes(passes[BOTH], device)
        except Exception as error:  # a rival that cannot take the shape, or runs out of memory: said in its row
            result.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            continue
        sound[name] = passes
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what a failed or a large implementation left behind
    for pass_name in PASSES:
        timings = in_turns({name: passes[pass_name] for name, passes in sound.items()}, device, seconds, rounds, clock)
        ideal = _ideal_seconds(workload, dtype.itemsize, roofline)[pass_name]
        for result in results:
            if timing := timings.get(result.implementation):
                result.timings[pass_name] = timing
                result.shares[pass_name] = ideal / timing.median
                if BASELINE in timings:
                    result.speedups[pass_name] = timing.speedup_over(timings[BASELINE])
    return results


def place(inputs: Inputs, device: torch.device) -> Inputs:
    return {
        name: x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for name, x in inputs.items()
    }


def _ideal_seconds(workload, itemsize, roofline) -> dict[str, float]:
    """The backward starts when the forward has ended: their times add."""
    forward, backward = (
        roofline.seconds(flops, elements * itemsize)
        for flops, elements in zip(workload.flops, workload.elements, strict=True)
    )
    return {FORWARD: forward, BOTH: forward + backward}


def _passes(call, inputs, cotangents) -> dict[str, Callable]:
    """Both as a training step makes them: the forward saves what its backward needs."""

    def both():
        return gradients_of(call(inputs), inputs, cotangents)

    return {FORWARD: lambda: call(inputs), BOTH: both}
