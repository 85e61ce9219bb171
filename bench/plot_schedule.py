"""Draw pipeline schedules, as text and as a PNG, without running anything.

    python bench/plot_schedule.py --schedule 1f1b --pp 4 --micro_batches 8 --out timeline.png
    python bench/plot_schedule.py --schedule gpipe 1f1b zero-bubble --pp 4 --micro_batches 8

Several schedules are drawn below each other to one scale. Costs are those of all of a rank's stages, so that
schedules with several stages a rank do the same work as the others.
"""

from __future__ import annotations

import argparse

try:
    from heiretsu.data.terminal import escape_what_cannot_be_printed
    from heiretsu.parallel.schedules import SCHEDULES, Timeline, draw, lower, simulate, validate
    from heiretsu.parallel.schedules.actions import Kind
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}: run `pip install -e .` in the repository, or `make install`") from None

# Blue forwards, warm backwards; darker for each later stage of a rank. Distinct in grey and to the colour-blind.
COLOURS = {
    Kind.FORWARD: ("#a9cbe8", "#6fa3d0", "#427fb3", "#225c8d"),
    Kind.BACKWARD: ("#f3c08b", "#e39a54", "#c97828", "#9c5712"),
    Kind.BACKWARD_INPUT: ("#f2a79a", "#de7d6c", "#c05645", "#923828"),
    Kind.BACKWARD_WEIGHT: ("#c9dfae", "#a3c57b", "#7ba64d", "#567e2c"),
}
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward: input",
    Kind.BACKWARD_WEIGHT: "backward: weights",
}


def main(argv: list[str] | None = None) -> None:
    escape_what_cannot_be_printed()
    args = parse_args(argv)
    timelines = {name: run(name, args) for name in args.schedule}
    for name, timeline in timelines.items():
        print(f"{name}, pp={args.pp}, {args.micro_batches} microbatches\n{draw(timeline)}\n")
    if args.out:
        costs = f"time (a rank's forward takes {args.forward_cost:g}, its backward {args.backward_cost:g})"
        plot(timelines, args.out, costs)
        print(f"wrote {args.out}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw pipeline schedules.")
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=["1f1b"])
    parser.add_argument("--pp", type=int, default=4, help="ranks")
    parser.add_argument("--micro_batches", type=int, default=8)
    parser.add_argument("--virtual_stages", type=int, default=2, help="stages of a rank, for the interleaved schedule")
    parser.add_argument("--forward_cost", type=float, default=1.0, help="of one microbatch through one rank")
    parser.add_argument("--backward_cost", type=float, default=2.0)
    parser.add_argument("--comm_cost", type=float, default=0.0, help="of one message")
    parser.add_argument("--out", help="PNG file; without it, text only")
    args = parser.parse_args(argv)
    for flag in ("pp", "micro_batches", "virtual_stages"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)} must be at least 1")
    for flag in ("forward_cost", "backward_cost"):
        if getattr(args, flag) <= 0:
            parser.error(f"--{flag} {getattr(args, flag)} must be above 0")
    return args


def run(name: str, args: argparse.Namespace) -> Timeline:
    stages = args.virtual_stages if SCHEDULES[name].several_stages else 1
    program = lower(SCHEDULES[name](args.pp, args.micro_batches, stages))
    validate(program)
    return simulate(program, args.forward_cost / stages, args.backward_cost / stages, args.comm_cost)


def plot(timelines: dict[str, Timeline], out: str, xlabel: str) -> None:
    """Write the PNG: a panel for each schedule, a row for each rank, the number of the microbatch in each action."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("--out needs matplotlib: pip install -e '.[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    longest = max(timeline.makespan for timeline in timelines.values())
    ranks = max(len(timeline.spans) for timeline in timelines.values())
    height = (0.42 * ranks + 0.55) * len(timelines) + 0.75
    figure, panels = plt.subplots(len(timelines), 1, figsize=(12, height), squeeze=False, sharex=True)
    used: set[Kind] = set()
    for panel, (name, timeline) in zip(panels[:, 0], timelines.items(), strict=True):
        for rank, spans in enumerate(timeline.spans):
            for action, start, end in spans:
                shades = COLOURS[action.kind]
                used.add(action.kind)
                nth = action.stage // len(timeline.spans)
                colour = shades[min(nth, len(shades) - 1)]
                panel.barh(rank, end - start, left=start, height=0.86, color=colour, edgecolor="white", linewidth=0.8)
                dark = nth >= 2
                label = dict(ha="center", va="center", fontsize=8, color="white" if dark else "#222222")
                panel.text((start + end) / 2, rank, str(action.microbatch), **label)
        held = f"{max(timeline.peak_activations) / timeline.stages_per_rank:g} microbatches' activations held"
        panel.set_title(f"{name}: bubble {timeline.bubble:.1%}, at most {held}", loc="left", fontsize=10)
        panel.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=8)
        panel.set_ylim(ranks - 0.5, -0.5)
        panel.set_xlim(0, longest)
        panel.set_facecolor("#f4f4f4")
        panel.tick_params(length=0)
        for side in panel.spines.values():
            side.set_visible(False)
    panels[-1, 0].set_xlabel(xlabel, fontsize=9)
    handles = [Patch(color=COLOURS[kind][0], label=NAMES[kind]) for kind in COLOURS if kind in used]
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
