"""Draw what train.py wrote with --log_file: loss, gradient norm, tokens per second.

    python bench/plot_run.py run.jsonl --out run.png
    python bench/plot_run.py plain.jsonl fused.jsonl --out compare.png       # one colour a run, same axes

A log has one JSON object a line and step; see FIELDS for the names that are read. Missing ones are left out.
"""

import argparse
import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

if importlib.util.find_spec("heiretsu") is None:
    sys.exit("heiretsu is not installed: run `pip install -e '.[bench]'` in the repository, or `make bench`")

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from heiretsu.bench.chart_style import FAINT, SERIES, STYLE
from heiretsu.data.terminal import escape_what_cannot_be_printed

FIELDS = ("step", "loss", "eval_loss", "aux_loss", "grad_norm", "lr", "tokens_per_s")
SMOOTHED_OVER = 50  # the line averages over a fiftieth of the run; the raw values stay visible behind it


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """{field: [(step, value)]} of one log, in step order.

    Where a step was logged twice (a run resumed from an older checkpoint) the later line wins. A last line that a
    killed run left unfinished is dropped; any other broken line is a ValueError that names it.
    """
    lines = path.read_text().splitlines()
    by_step: dict[int, dict] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            by_step[int(record["step"])] = record
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} is not a JSON object with a step: {line[:60]!r}") from error
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, record in sorted(by_step.items()):
        for field in FIELDS[1:]:
            value = record.get(field)
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(field, []).append((step, value))
    if "loss" not in curves:
        raise ValueError(f"{path} has no step with a finite loss")
    return curves


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over about `window` values around each one; the window shrinks towards both ends, so nothing lags."""
    sums = [0.0, *itertools.accumulate(values)]
    out = []
    for i in range(len(values)):
        reach = min(window // 2, i, len(values) - 1 - i)
        out.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return out


def draw(runs: dict[str, dict[str, list[tuple[int, float]]]]) -> Figure:
    """runs: {label: curves of read_log}. Loss on the left; what explains it on the right."""
    panels = [("grad_norm", "Gradient norm"), ("tokens_per_s", "Tokens per second"), ("lr", "Learning rate")]
    panels += [("aux_loss", "MoE balance loss")]
    # A dense model's balance loss is 0 throughout, and is not drawn.
    drawn = {field for curves in runs.values() for field, curve in curves.items() if any(value for _, value in curve)}
    panels = [(field, title) for field, title in panels if field in drawn]
    colors = {label: SERIES[index % len(SERIES)] for index, label in enumerate(runs)}
    rows = max(2, len(panels))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, max(4.6, 1.75 * rows + 0.6)))
        grid = figure.add_gridspec(rows, 2, width_ratios=(1.6, 1))
        loss = figure.add_subplot(grid[:, 0])
        _draw_loss(loss, runs, colors)
        for row, (field, title) in enumerate(panels):
            axis = figure.add_subplot(grid[row, 1], sharex=loss)
            axis.set_title(title)
            for index, (label, curves) in enumerate(runs.items()):
                _draw_curve(axis, curves.get(field, []), colors[label], _width(index), field != "lr")
            if field == "tokens_per_s":
                axis.set_ylim(bottom=0)
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.tick_params(labelbottom=row == len(panels) - 1)
        if panels:
            axis.set_xlabel("step")
    return figure


def _width(index: int) -> float:
    """Later runs are drawn thinner, so that curves that coincide, as they should, all stay visible."""
    return max(1.2, 3.2 - index)


def _draw_loss(axis, runs, colors) -> None:
    axis.set(title="Loss", xlabel="step")
    lines = []
    for index, (label, curves) in enumerate(runs.items()):
        _draw_curve(axis, curves["loss"], colors[label], _width(index))
        tail = [value for _, value in curves["loss"][-max(1, len(curves["loss"]) // SMOOTHED_OVER) :]]
        text = f"{label}  train {sum(tail) / len(tail):.3f}"
        if held_out := curves.get("eval_loss"):
            axis.plot(*zip(*held_out, strict=True), color=colors[label], marker="o", ms=5, lw=1.2, ls="--", mec="white")
            text += f"  eval {held_out[-1][1]:.3f}"
        lines.append(Line2D([], [], color=colors[label], lw=_width(index), label=text))
    if any("eval_loss" in curves for curves in runs.values()):
        lines.append(Line2D([], [], color=FAINT, lw=1.2, ls="--", marker="o", ms=5, label="eval loss"))
    axis.legend(handles=lines, loc="upper right")


def _draw_curve(axis, points, color, width, smoothed=True) -> None:
    """The raw values faint, their running mean on top."""
    if not points:
        return
    steps, values = zip(*points, strict=True)
    window = len(values) // SMOOTHED_OVER
    if smoothed and window > 1:
        axis.plot(steps, values, color=color, lw=0.7, alpha=0.3)
        values = tuple(smooth(list(values), window))
    axis.plot(steps, values, color=color, lw=width)


def labels_for(paths: list[Path]) -> list[str]:
    """File names without the ending; whole paths where two are alike."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", nargs="+", type=Path, metavar="run.jsonl", help="logs of train.py --log_file")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    escape_what_cannot_be_printed()
    args = parser.parse_args()
    try:
        runs = {label: read_log(path) for label, path in zip(labels_for(args.logs), args.logs, strict=True)}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(runs).savefig(args.out, facecolor="white")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
