"""The report of a run, from its lines alone: also of a run that was cut off, and of one on another machine.

Writes summary.txt (one screen, failures first), report.md (everything) and, where matplotlib is installed, charts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from heiretsu.bench import tables
from heiretsu.bench.gpu_kit import lines as ask
from heiretsu.bench.gpu_kit.plan import PARTS
from heiretsu.bench.gpu_kit.record import read
from heiretsu.bench.gpu_kit.targets import BACKWARD, BOTH, FORWARD, TARGETS, seconds

SHOWN = 12  # failures, findings and so on in the summary; the report has all
WIDTH = 150


@dataclass(frozen=True)
class Summary:
    text: str
    failures: list[dict]


def write(out: Path) -> Summary:
    """Make the report of `out`."""
    lines = read(out)
    summary = summarise(lines)
    (out / "summary.txt").write_text(summary.text + "\n")
    charts, why = draw(lines, out)
    parts = [title(lines), "```text\n" + summary.text + "\n```", *charts_section(charts, why)]
    parts += [section(lines) for section in (failures_section, targets_section, findings_section, *PART_SECTIONS)]
    (out / "report.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    return summary


def summarise(lines: list[dict]) -> Summary:
    failed = ask.failures(lines)
    text = [f"FAILURES: {len(failed)}" if failed else "no failures"]
    text += _some([f"  {line['part']}: {line['name']}: {line['kind']}: {_flat(line['detail'])}" for line in failed])
    unfinished = [line for part in PARTS for line in ask.unfinished(lines, part)]
    if unfinished:
        text += ["out of time:", *_some([f"  {line['part']}: {line['name']}" for line in unfinished])]
    if missing := not_run(lines):
        text.append(f"not run: {', '.join(missing)}")
    text += ["", f"on {machine(lines)}"]
    text += [f"  {part:8} {_part_line(lines, part)}" for part in PARTS if part not in missing]
    rehearsal = bool(ask.facts(lines, "run").get("rehearsal"))
    verdicts = [(target, *target.verdict([] if rehearsal else lines)) for target in TARGETS]
    counts = {
        word: sum(verdict == word for _, verdict, _ in verdicts) for word in ("reached", "missed", "not measured")
    }
    text += ["", "targets: " + ", ".join(f"{count} {word}" for word, count in counts.items())]
    text += [
        f"  missed: {t.name} {value:.2f} ({t.sense} {t.wanted:.2f})"
        for t, verdict, value in verdicts
        if verdict == "missed"
    ]
    findings = ask.of(lines, "finding")
    text.append(f"findings about the proof: {len(findings)}")
    text += _some([f"  {_flat(line['name'])}: {_flat(line['detail'])}" for line in findings], SHOWN // 3)
    left_out = [line for line in ask.of(lines, "absent") if not line["why"].startswith("out of time")]
    if left_out:
        text.append("left out: " + ", ".join(dict.fromkeys(line["name"] for line in left_out)))
    if rehearsal:
        text.append("A REHEARSAL: no figure means anything.")
    return Summary("\n".join(line[:WIDTH] for line in text), failed)


def not_run(lines: list[dict]) -> list[str]:
    """Parts that nothing was heard of."""
    heard = {line["part"] for line in lines}
    return [part for part in PARTS if part not in heard]


def machine(lines: list[dict]) -> str:
    facts = ask.facts(lines, "facts")
    if "device" not in facts:
        return "a machine that was not asked"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "commit"))
    return f"{facts['device']}, {facts['runtime']}, {versions}"


def _part_line(lines: list[dict], part: str) -> str:
    of_part = [line for line in lines if line["part"] == part]
    checks = ask.of(of_part, "check")
    words = [f"{sum(line['ok'] for line in checks)} of {len(checks)} checks hold"] * bool(checks)
    words += [f"{len(ask.of(of_part, 'figure'))} figures"] * bool(ask.of(of_part, "figure"))
    took = ask.facts(lines, part).get("seconds")
    return ", ".join([*words, f"{took} s" if took is not None else "cut off"])


def _some(found: list[str], limit: int = SHOWN) -> list[str]:
    return found[:limit] + [f"  ... and {len(found) - limit} more, in report.md"] * (len(found) > limit)


def _flat(text: object) -> str:
    return " ".join(str(text).split())


# ---- report.md


def title(lines: list[dict]) -> str:
    rehearsal = ask.facts(lines, "run").get("rehearsal")
    return "# A rehearsal without a GPU" if rehearsal else f"# What a GPU says: {machine(lines)}"


def charts_section(charts: list[Path], why: str) -> list[str]:
    return [f"![{chart.stem}]({chart.name})" for chart in charts] or [f"No charts: {why}."]


def failures_section(lines: list[dict]) -> str:
    rows = [[line["part"], line["name"], line["kind"], _flat(line["detail"])] for line in ask.failures(lines)]
    return _table("Failures", ["part", "item", "kind", "what"], rows)


def targets_section(lines: list[dict]) -> str:
    rows = []
    for target in TARGETS:
        verdict, value = target.verdict(lines)
        rows.append(
            [target.name, f"{target.sense} {target.wanted:.2f}", "-" if value is None else f"{value:.2f}", verdict]
        )
    return _table("Targets (set for an H100)", ["target", "wanted", "measured", "verdict"], rows)


def findings_section(lines: list[dict]) -> str:
    rows = [[line["name"], _flat(line["detail"])] for line in ask.of(lines, "finding")]
    return _table("Findings: where the device contradicts what was said beforehand", ["of", "finding"], rows)


def facts_section(lines: list[dict]) -> str:
    rows = [[name, _flat(value)] for name, value in ask.facts(lines, "facts").items()]
    rows += [[line["name"], f"{_engineering(line['value'])}{line['unit']}"] for line in ask.figures(lines, "facts")]
    return _table("Facts and roofs", ["what", "value"], rows)


def right_section(lines: list[dict]) -> str:
    counts: dict[str, list[int]] = {}
    for line in ask.of(lines, "check", "right"):
        count = counts.setdefault(line["name"].partition(" ")[0], [0, 0])
        count[0] += line["ok"]
        count[1] += 1
    for line in ask.of(lines, "failure", "right"):
        counts.setdefault(line["name"].partition(" ")[0], [0, 0])[1] += 1
    rows = [[kind, str(good), str(total)] for kind, (good, total) in counts.items()]
    return _table("Right", ["kind", "hold", "of"], rows)


def proof_section(lines: list[dict]) -> str:
    found = ask.figures(lines, "proof")
    resources = [line for line in found if line["unit"] == "registers"]
    rows = []
    for line in resources:
        driver = [line["value"], line["spill_bytes"], line["shared_bytes"]]
        rows.append([line["name"], *map(_three, (driver, line["read"], line["published"]))])
    parts = [
        _table("Proof: registers / spilled bytes / shared KiB", ["case", "driver", "audit here", "published"], rows)
    ]
    rows = [
        [
            b["name"].removeprefix("bound "),
            f"{1e3 * b['value']:.3f}",
            *(_share(b[k]) for k in ("share_of_peak", "share_of_roof", "bound")),
        ]
        for b in found
        if b["name"].startswith("bound ")
    ]
    head = ["kernel", "ms", "share of data sheet", "share of roof here", "audit's bound"]
    parts.append(_table("Proof: what the bounds allow, and what is reached", head, rows))
    bits = [line for line in found if line["unit"] == "tensors that differ"]
    rows = [
        [b["name"].removeprefix("bits "), str(b["value"]), str(b["of"]), _flat(b["differences"] or "-")] for b in bits
    ]
    parts.append(_table("Proof: the emulator's bits beside the device's", ["row", "differ", "of", "how"], rows))
    launched = [line for line in found if line["unit"] == "warps"]
    rows = [
        [line["name"], str(line["registers"]), str(line["spill_bytes"]), line["case"] or "none"] for line in launched
    ]
    parts.append(_table("Proof: launched by a model", ["kernel", "registers", "spilled bytes", "audit's case"], rows))
    return "\n\n".join(part for part in parts if part)


def fast_section(lines: list[dict]) -> str:
    rows = []
    for line in ask.figures(lines, "fast"):
        passes = line["passes"]
        row = [line["name"], line["implementation"]]
        if BOTH not in passes:
            rows.append([*row, *["-"] * 6, f"no number: {_flat(line['problem'])[:100]}"])
            continue
        row += [f"{1e3 * seconds(line, name):.3f}" for name in (FORWARD, BACKWARD)]
        both = passes[BOTH]
        row += ["-" if both["times_plain"] is None else f"{both['times_plain']:.2f}"]
        row += [_engineering(both["rate"]) + both["rate_unit"], f"{100 * both['share_of_roof']:.0f}"]
        row += ["-" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 2**20:.0f}", ""]
        rows.append(row)
    head = ["case", "implementation", "fwd ms", "bwd ms", "x plain", "rate", "% roof", "peak MiB", "note"]
    return _table("Fast", head, rows)


def train_section(lines: list[dict]) -> str:
    return _plain_figures("Train", lines, "train")


def several_section(lines: list[dict]) -> str:
    return _plain_figures("Several GPUs", lines, "several")


def left_out_section(lines: list[dict]) -> str:
    rows = [[line["part"], line["name"], line["why"]] for line in ask.of(lines, "absent")]
    return _table("Left out", ["part", "what", "why"], rows)


PART_SECTIONS = (
    facts_section,
    right_section,
    proof_section,
    fast_section,
    train_section,
    several_section,
    left_out_section,
)


def _plain_figures(heading: str, lines: list[dict], part: str) -> str:
    """Every figure, check and fact of a part, with whatever belongs to it."""
    known = {"part", "group", "worker", "time", "what", "name", "value", "unit", "item", "detail", "ok"}
    rows = []
    for line in lines:
        if line["part"] != part or line["what"] not in ("figure", "check", "fact") or line["group"] == "runner":
            continue
        more = ", ".join(
            f"{key} {_number(value)}" for key, value in line.items() if key not in known and value is not None
        )
        value = (
            "holds"
            if line.get("ok")
            else "FAILS"
            if "ok" in line
            else f"{_number(line['value'])} {line.get('unit', '')}"
        )
        rows.append([line["name"], value, _flat(f"{more} {line.get('detail', '')}")])
    return _table(heading, ["what", "value", "more"], rows)


def _number(value: object) -> str:
    if isinstance(value, float):
        return _engineering(value) if abs(value) >= 1e6 else f"{value:,.4g}"
    return _flat(value)


def _table(heading: str, headers: list[str], rows: list[list[str]]) -> str:
    return f"## {heading}\n\n{tables.markdown(headers, rows)}" if rows else ""


def _three(values: list | None) -> str:
    return "-" if values is None else f"{values[0]}/{values[1]}/{values[2] / 1024:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _engineering(value: float | None) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value is not None and abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}"
    return "-" if value is None else f"{value:.3g} "


# ---- charts


def draw(lines: list[dict], out: Path) -> tuple[list[Path], str]:
    """(files, why there are none). The charts are those of bench/kernels.py."""
    found = [line for line in ask.figures(lines, "fast") if line["passes"]]
    roofs = {line["name"]: line["value"] for line in ask.figures(lines, "facts")}
    if not found or {"copy bandwidth", "matrix rate"} - roofs.keys():
        return [], "nothing was timed, or no roof was measured"
    try:
        from heiretsu.bench import charts
    except ImportError as error:
        return [], f"{error.name} is not installed"
    import torch

    from heiretsu.bench.timing import Roofline

    facts = {name: str(value) for name, value in ask.facts(lines, "facts").items()}
    roofline = Roofline(roofs["copy bandwidth"], roofs["matrix rate"])
    return charts.draw([as_result(line) for line in found], roofline, facts, torch.bfloat16, out), ""


def as_result(line: dict):
    """The Result that a figure of `fast` was written from, without what made its inputs."""
    from heiretsu.bench.measure import Result
    from heiretsu.bench.timing import Timing
    from heiretsu.bench.workloads import Workload

    shape = Workload(
        line["op"],
        line["series"],
        line["size_name"],
        line["size"],
        None,
        None,
        tuple(line["flops"]),
        tuple(line["elements"]),
    )
    passes = line["passes"]
    timings = {name: Timing(p["median_s"], p["low_s"], p["high_s"], (p["median_s"],)) for name, p in passes.items()}
    speedups = {name: p["times_plain"] for name, p in passes.items() if p["times_plain"] is not None}
    shares = {name: p["share_of_roof"] for name, p in passes.items()}
    return Result(shape, line["implementation"], timings, speedups, shares, 2, line["peak_bytes"])
