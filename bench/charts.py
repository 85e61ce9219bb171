"""Charts of measured results: time against size, speed over plain, and where each op stands under the roofline."""

import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from heiretsu.bench.chart_style import FAINT, INK, MUTED, SERIES, STYLE
from heiretsu.bench.measure import BASELINE, BOTH, COMPILED, OURS, Result
from heiretsu.bench.timing import Roofline

COLORS = {BASELINE: MUTED, COMPILED: SERIES[1], OURS: SERIES[0]}
OTHERS = SERIES[2:]  # alternatives, in the order in which they come


def draw(results: list[Result], roofline: Roofline, facts: dict[str, str], dtype, folder: Path) -> list[Path]:
    """Write time.png, speedup.png and roofline.png into `folder`: their paths. What has no number is left out."""
    timed = [result for result in results if result.timings]
    if not timed:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    machine = facts["cpu"] if facts["device"].startswith("CPU") else facts["device"]
    source = f"{machine} · {str(dtype).split('.')[1]} · torch {facts['torch']} · commit {facts['commit']}"
    colors = palette(timed)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in (
            ("time", time_against_size(timed, colors)),
            ("speedup", speedups(timed, colors)),
            ("roofline", under_the_roofline(timed, roofline, colors)),
        ):
            figure.supxlabel(source, fontsize=7.5, color=FAINT, x=0.01, ha="left")
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], facecolor="white")
    return paths


def palette(results: list[Result]) -> dict[str, str]:
    """{implementation: colour}: fixed for the three that are always there."""
    names = list(dict.fromkeys(result.implementation for result in results))
    others = [name for name in names if name not in COLORS]
    return {name: COLORS.get(name) or OTHERS[others.index(name) % len(OTHERS)] for name in names}


def _groups(results: list[Result], key) -> dict:
    groups: dict = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def _legend(figure: Figure, colors: dict[str, str], title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    lines = [Line2D([], [], color=color, marker="o", markersize=5, lw=2) for color in colors.values()]
    figure.legend(lines, list(colors), loc="outside upper left", ncols=len(lines), fontsize=9.5)


def time_against_size(results: list[Result], colors: dict[str, str]) -> Figure:
    """One panel for each op and series with several sizes; log-log, forward and backward together."""
    panels = _groups(results, lambda r: (r.workload.op, r.workload.series))
    several = {key: group for key, group in panels.items() if len({r.workload.size for r in group}) > 1}
    panels = several or panels
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.1 * columns + 0.4, 2.9 * rows + 0.9))
    _legend(figure, colors, "Forward + backward, ms against size (lower is better)")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for (op, series), group in panels.items():
        axis = next(axes)
        for name, points in _groups(group, lambda r: r.implementation).items():
            points.sort(key=lambda r: r.workload.size)
            x = [r.workload.size for r in points]
            y = [r.timings[BOTH].median * 1e3 for r in points]
            spread = [[m - r.timings[BOTH].low * 1e3 for m, r in zip(y, points, strict=True)],
                      [r.timings[BOTH].high * 1e3 - m for m, r in zip(y, points, strict=True)]]  # fmt: skip
            axis.errorbar(
                x, y, spread, color=colors[name], marker="o", ms=5, lw=2, elinewidth=1, zorder=3 + (name == OURS)
            )
        sizes = sorted({r.workload.size for r in group})
        axis.set(xscale="log", yscale="log", title=op, xlabel=group[0].workload.size_name)
        axis.text(1, 1.03, series, transform=axis.transAxes, ha="right", fontsize=8.5, color=FAINT)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(x=0.12, y=0.15)
        _plain_numbers(axis.yaxis)
    for axis in axes:
        axis.set_axis_off()
    return figure


def _plain_numbers(axis) -> None:
    """0.5, 10, 200 instead of powers; minor ticks get a number only where the axis spans less than a decade."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    few = high / low < 12
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _leading(value) in (2, 5) else "") if few
                             else NullFormatter())  # fmt: skip


def _leading(value: float) -> int:
    return round(value / 10 ** math.floor(math.log10(value) + 1e-9))


def speedups(results: list[Result], colors: dict[str, str]) -> Figure:
    """Bars of speed over plain, a group for each case; what loses is left of the line."""
    rivals = [r for r in results if r.implementation != BASELINE and BOTH in r.speedups]
    cases = _groups(rivals, lambda r: (r.workload.op, r.workload.name))
    height = sum(len(group) + 1.1 for group in cases.values())
    figure = Figure(figsize=(9, 0.19 * height + 1.4))
    shown = {name: color for name, color in colors.items() if name != BASELINE}
    _legend(figure, shown, "Times as fast as plain PyTorch, forward + backward (higher is better)")
    axis = figure.subplots()
    y, ticks = 0.0, []
    for (op, name), group in cases.items():
        top = y
        for result in group:
            speed = result.speedups[BOTH]
            axis.barh(y, speed, height=0.86, color=colors[result.implementation])
            weight = "bold" if result.implementation == OURS else "normal"
            axis.text(speed, y, f" {speed:.2f}", va="center", fontsize=8, color=INK, fontweight=weight)
            y += 1
        ticks.append(((top + y - 1) / 2, f"{op}  {name}"))
        y += 1.1
    axis.axvline(1, color=INK, lw=1)
    axis.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8.5, color=INK)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(y - 0.6, -1)
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, 1.12 * max((r.speedups[BOTH] for r in rivals), default=1.0))
    return figure


def under_the_roofline(results: list[Result], roofline: Roofline, colors: dict[str, str]) -> Figure:
    """FLOP/s against FLOPs a byte (Williams et al. 2009), the largest size of each series; a column is one series."""
    figure = Figure(figsize=(9, 5.4))
    _legend(figure, colors, "Useful FLOP/s under this device's measured roofline")
    axis = figure.subplots()
    largest = {}
    for key, group in _groups(results, lambda r: (r.workload.op, r.workload.series)).items():
        size = max(r.workload.size for r in group)
        largest[key] = [r for r in group if r.workload.size == size]
    intensities: list[float] = []
    for number, ((op, _), group) in enumerate(sorted(largest.items(), key=lambda item: _intensity(item[1][0]))):
        x = _intensity(group[0])
        x *= 1.04 ** sum(
            abs(math.log(x / other)) < 0.03 for other in intensities
        )  # do not hide a column behind another
        intensities.append(x)
        y = [r.work(BOTH)[0] / r.timings[BOTH].median for r in group]
        axis.plot([x, x], [min(y), max(y)], color="#d5dae3", lw=1.2, zorder=1)
        for result, value in zip(group, y, strict=True):
            axis.scatter(x, value, s=42, color=colors[result.implementation], edgecolor="white", lw=0.6,
                         zorder=2 + (result.implementation == OURS))  # fmt: skip
        axis.annotate(op, (x, min(y)), (0, -9 - 11 * (number % 2)), textcoords="offset points", ha="center", fontsize=8,
                      color=FAINT)  # fmt: skip
    low, high = min(intensities) / 2.5, max([*intensities, 4 * roofline.flops_per_s / roofline.bytes_per_s]) * 1.6
    ridge = roofline.flops_per_s / roofline.bytes_per_s
    roof = [low * roofline.bytes_per_s, roofline.flops_per_s, roofline.flops_per_s]
    axis.plot([low, ridge, high], roof, color=INK, lw=1.8)
    axis.annotate(f"copy {roofline.bytes_per_s / 1e9:,.3g} GB/s", (low * 1.2, 1.2 * roof[0]), (4, 14),
                  textcoords="offset points", fontsize=8.5)  # fmt: skip
    axis.annotate(f"matrix product {roofline.flops_per_s / 1e12:,.3g} TFLOP/s", (high, roofline.flops_per_s), (-4, 6),
                  textcoords="offset points", ha="right", fontsize=8.5)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte, forward + backward", ylabel="FLOP/s", xlim=(low, high))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _si(value)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.margins(y=0.14)
    return figure


def _intensity(result: Result) -> float:
    flops, bytes_ = result.work(BOTH)
    return flops / bytes_


def _si(value: float) -> str:
    exponent = min(4, max(0, math.floor(math.log10(value) / 3 + 1e-9)))
    return f"{value / 1000**exponent:g}{['', 'k', 'M', 'G', 'T'][exponent]}"
