"""Charts of measured results: time against size, speed over plain, and where each op stands under the roofline."""

import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from heiretsu.bench.chart_style import FAINT, INK, MUTED, SERIES, STYLE
from heiretsu.bench.measure import BASELINE, BOTH, COMPILED, OURS, Result
from heiretsu.bench.result_tables import engineering
from heiretsu.bench.timing import Roofline

COLORS = {BASELINE: MUTED, OURS: SERIES[0], COMPILED: SERIES[1]}
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
    fixed = {name: color for name, color in COLORS.items() if name in names}
    others = [name for name in names if name not in COLORS]
    return fixed | {name: OTHERS[index % len(OTHERS)] for index, name in enumerate(others)}


def _groups(results: list[Result], key) -> dict:
    groups: dict = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def _legend(figure: Figure, colors: dict[str, str], title: str) -> None:
    """The heading, and one mark for each implementation, above the axes."""
    lines = [Line2D([], [], color=color, marker="o", markersize=5, lw=2) for color in colors.values()]
    legend = figure.legend(lines, list(colors), loc="outside upper left", ncols=len(lines), fontsize=9.5, title=title)
    legend.set_alignment("left")
    legend.get_title().set(fontsize=12.5, fontweight="bold")


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
        _plain_numbers(axis)
    for axis in axes:
        axis.set_axis_off()
    return figure


def _plain_numbers(axes) -> None:
    """0.5, 10, 200 instead of powers; with 2, (3,) and 5 between where the axis spans little more than a decade."""
    axes.autoscale_view()
    low, high = axes.get_ylim()
    between = (2, 3, 5) if high / low < 8 else (2, 5) if high / low < 100 else ()
    number = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(number)
    axes.yaxis.set_minor_locator(LogLocator(subs=between, numticks=99) if between else NullLocator())
    axes.yaxis.set_minor_formatter(number)


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
    axis.annotate("plain", (1, -0.9), (0, 3), textcoords="offset points", ha="center", fontsize=8.5)
    axis.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8.5, color=INK)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(y - 0.6, -1)
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, 1.12 * max((r.speedups[BOTH] for r in rivals), default=1.0))
    return figure


def under_the_roofline(results: list[Result], roofline: Roofline, colors: dict[str, str]) -> Figure:
    """FLOP/s against FLOPs a byte (Williams et al. 2009), the largest size of each series; a column is one series."""
    columns = sorted(_largest_of_each_series(results), key=lambda group: _intensity(group[0]))
    figure = Figure(figsize=(11, max(5.4, 0.36 * len(columns) + 1.4)))
    _legend(figure, colors, "Useful FLOP/s under this device's measured roofline, forward + backward")
    axis, key = figure.subplots(1, 2, width_ratios=(3.4, 1))
    placed: list[float] = []
    for number, group in enumerate(columns, start=1):
        x = _intensity(group[0])
        while any(abs(math.log(x / other)) < 0.12 for other in placed):  # beside a column, not on top of it
            x *= 1.13
        placed.append(x)
        y = [r.work(BOTH)[0] / r.timings[BOTH].median for r in group]
        axis.plot([x, x], [min(y), max(y)], color="#d5dae3", lw=1.2, zorder=1)
        for result, value in zip(group, y, strict=True):
            front = 2 + (result.implementation == OURS)
            axis.scatter(x, value, s=42, color=colors[result.implementation], edgecolor="white", lw=0.6, zorder=front)
        axis.annotate(f"{number}", (x, min(y)), (0, -13), textcoords="offset points", ha="center", fontsize=8.5)
    _draw_roof(axis, roofline, min(placed) / 3, max(*placed, 4 * roofline.flops_per_s / roofline.bytes_per_s) * 2)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: engineering(value)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.margins(y=0.14)
    key.set_axis_off()
    for number, group in enumerate(columns, start=1):
        workload, top = group[0].workload, 1 - (number - 1) / max(12, len(columns))
        key.text(0, top, f"{number}", fontsize=8.5, va="top", ha="right", transform=key.transAxes)
        key.text(0.05, top, f"{workload.op}", fontsize=8.5, va="top", transform=key.transAxes)
        key.annotate(
            workload.name, (0.05, top), (0, -11), textcoords="offset points", fontsize=7.5, color=FAINT, va="top"
        )
    return figure


def _largest_of_each_series(results: list[Result]) -> list[list[Result]]:
    groups = _groups(results, lambda r: (r.workload.op, r.workload.series)).values()
    return [[r for r in group if r.workload.size == max(other.workload.size for other in group)] for group in groups]


def _draw_roof(axis, roofline: Roofline, low: float, high: float) -> None:
    ridge = roofline.flops_per_s / roofline.bytes_per_s
    roof = [low * roofline.bytes_per_s, roofline.flops_per_s, roofline.flops_per_s]
    axis.plot([low, ridge, high], roof, color=INK, lw=1.8)
    axis.set_xlim(low, high)
    middle = math.sqrt(low * ridge)
    text = {"textcoords": "offset points", "fontsize": 8.5}
    axis.annotate(f"copy {engineering(roofline.bytes_per_s)}B/s", (middle, middle * roofline.bytes_per_s), (-6, 6),
                  ha="right", **text)  # fmt: skip
    axis.annotate(f"matrix product {engineering(roofline.flops_per_s)}FLOP/s", (high, roofline.flops_per_s), (-4, 6),
                  ha="right", **text)  # fmt: skip


def _intensity(result: Result) -> float:
    flops, bytes_ = result.work(BOTH)
    return flops / bytes_
