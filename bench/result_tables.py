"""Tables and JSON of measured results."""

from heiretsu.bench import tables
from heiretsu.bench.measure import BOTH, PASSES, Result
from heiretsu.bench.timing import Roofline, Timing

HEADERS = ["case", "implementation", "fwd ms", "x plain", "fwd+bwd ms", "x plain", "rate", "% roof", "peak MiB", "note"]
LEGEND = """\
Median of alternating runs, ± half the distance of the quartiles. fwd: as in training, saving for the backward.
x plain: how many times as fast as plain PyTorch, the median over the rounds. rate, % roof and peak: of fwd+bwd. rate
counts the work that the algorithm needs, nothing recomputed; % roof is against the copy and matrix-product rates above
(an input that fits in the caches can pass 100%); peak: memory over what was there before the call."""


def table(results: list[Result], render=tables.aligned) -> str:
    return render(HEADERS, [_row(result) for result in results])


def _row(result: Result) -> list[str]:
    row = [result.workload.name, result.implementation]
    if not result.timings:
        return row + ["-"] * 7 + [f"no number: {result.problem}"]
    value, unit = result.rate(BOTH)
    for pass_name in PASSES:
        row += [milliseconds(result.timings[pass_name]), _times(result.speedups.get(pass_name))]
    row += [engineering(value) + unit, f"{100 * result.shares[BOTH]:.0f}"]
    return row + ["-" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}", ""]


def milliseconds(timing: Timing) -> str:
    digits = 3 if timing.median < 1e-3 else 2 if timing.median < 1e-2 else 1
    return f"{timing.median * 1e3:.{digits}f} ±{(timing.high - timing.low) / 2e-3:.{digits}f}"


def _times(speedup: float | None) -> str:
    return "-" if speedup is None else f"{speedup:.2f}"


def engineering(value: float) -> str:
    """1.23e12 -> "1.23 T"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def roofline_text(roofline: Roofline, dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return (
        f"copy {engineering(roofline.bytes_per_s)}B/s, {name} matrix product {engineering(roofline.flops_per_s)}FLOP/s"
    )


def as_json(results: list[Result], facts: dict[str, str], roofline: Roofline, dtype) -> dict:
    rows = []
    for result in results:
        row: dict[str, object] = {
            "op": result.workload.op,
            "series": result.workload.series,
            "case": result.workload.name,
            "size": result.workload.size,
            "implementation": result.implementation,
            "problem": result.problem,
            "peak_bytes": result.peak_bytes,
        }
        for pass_name, timing in result.timings.items():
            flops, bytes_ = result.work(pass_name)
            row[pass_name] = {
                "median_ms": timing.median * 1e3,
                "low_ms": timing.low * 1e3,
                "high_ms": timing.high * 1e3,
                "rounds": len(timing.samples),
                "times_plain": result.speedups.get(pass_name),
                "flops": flops,
                "bytes": bytes_,
                "roofline_share": result.shares[pass_name],
            }
        rows.append(row)
    rates = {"copy_bytes_per_s": roofline.bytes_per_s, "flops_per_s": roofline.flops_per_s}
    return {"machine": facts, "dtype": str(dtype).removeprefix("torch."), "roofline": rates, "results": rows}


def markdown(results: list[Result], facts, roofline: Roofline, dtype, command: str) -> str:
    ops = list(dict.fromkeys(result.workload.op for result in results))
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    name = str(dtype).removeprefix("torch.")
    parts = [f"# Kernels on {facts['device']}, {name}\n\nWritten by `{command}`.\n", head]
    parts += [f"- roofline: {roofline_text(roofline, dtype)}\n\n{LEGEND}"]
    for op in ops:
        parts.append(f"\n## {op}\n\n" + table([r for r in results if r.workload.op == op], tables.markdown))
    return "\n".join(parts) + "\n"
