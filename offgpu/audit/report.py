"""`python bench/kernels.py --audit`: choose what to compile, compile it, print the tables, say what falls short."""

import json
import sys
from pathlib import Path

from heiretsu.bench import environment, tables
from heiretsu.offgpu.audit import bars, runner
from heiretsu.offgpu.audit.calls import configurations
from heiretsu.offgpu.audit.pipes import Region
from heiretsu.offgpu.audit.runner import Job, Subject, Verdict
from heiretsu.offgpu.machines import KIB, MACHINES, machine

QUICK_ARCHS = ("sm_90",)  # everything quick there, and on the other machines the first of each kernel file
RESOURCES = ["case", "w/s", "regs", "spill B", "shared KiB", "CTA/SM", "occ", "tensor instr", "wide ld/st", "bound",
             "serial", "limit"]  # fmt: skip
NVIDIA_PIPES = ["issue", "fma", "alu", "xu", "udp", "lsu", "smem", "tensor"]
AMD_PIPES = ["issue", "valu", "lds", "tensor"]
LEGEND = """\
w/s: warps and pipeline stages. regs and spill: of a thread. wide: share of the bytes in accesses of 128 bits and more.
bound: with a dot, the share of the tensor peak that the hot loop's other pipes leave possible (1.00: all of it);
without one, DRAM cycles / busiest pipe (2.00: the pipes need half of DRAM's time). serial: the bound if a warp's tensor
and vector work do not overlap. Pipes: SM cycles an iteration and CTA. The model: offgpu/audit/__init__.py."""


def audit(
    archs: list[str],
    quick: bool,
    output: str | None,
    json_file: str | None,
    source: str | None,
    jobs: int,
    fit_only: bool = False,
) -> int:
    """The exit code: 0, or 1 where a configuration may not ship. source: a file whose CALLS to audit instead of ours.

    fit_only: for Triton releases that the table was not tuned with, whose code differs: all must compile and fit.
    """
    subject = runner.subject_of(source) if source else Subject()
    work = choose(subject, archs, quick)
    facts = environment.describe()
    print(environment.as_text(facts), end="\n\n")
    results = runner.run(work, archs, jobs)
    problems = [problem for _ in archs for problem in next(results)]
    print(
        f"closed form: {'FLOPs and bytes of known GEMMs read right' if not problems else 'WRONG'} on {', '.join(archs)}"
    )
    if fit_only:
        problems = []
    verdicts = []
    for verdict in results:
        runner.judge(verdict, subject)
        if fit_only:
            verdict.failures = [text for text in verdict.failures if text.startswith("does not")]
        verdicts.append(verdict)
        _show_progress(len(verdicts), len(work), verdict)
    problems += [f"{v.job.arch} {v.job.name}: {text}" for v in verdicts for text in v.failures]
    if not quick and not fit_only:
        for arch in archs:
            names = [v.job.name for v in verdicts if v.job.arch == arch]
            problems += bars.unused(names, arch, subject.bars, subject.spills)
    print("\n" + as_text(verdicts, tables.aligned) + "\n\n" + LEGEND)
    if output:
        Path(output).write_text(as_markdown(verdicts, problems, facts, archs), encoding="utf-8")
    if json_file:
        Path(json_file).write_text(json.dumps(as_json(verdicts, problems, facts), indent=1) + "\n")
    print("\n" + "\n".join(f"FAIL  {problem}" for problem in problems))
    outcome = f"{len(problems)} failures" if problems else "all pass"
    print(f"{len(verdicts)} configurations on {', '.join(archs)}: {outcome}")
    return 1 if problems else 0


def choose(subject: Subject, archs: list[str], quick: bool) -> list[Job]:
    """All that the calls launch; quick: of quick calls, on QUICK_ARCHS everything, elsewhere the first of each file.

    ValueError where the calls launch nothing.
    """
    work = []
    for arch in archs:
        found = configurations(machine(arch), subject.calls)
        if not found:
            raise ValueError("the calls launch no kernel: each must call one with CPU tensors")
        if quick:
            found = [case for case in found if case.quick]
            if arch not in QUICK_ARCHS:
                found = list({case.fn.__module__: case for case in reversed(found)}.values())[::-1]
        work += [Job(arch, case) for case in found]
    return work


def _show_progress(done: int, total: int, verdict: Verdict) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\033[K{done}/{total}  {verdict.job.arch}  {verdict.job.name}", end=end, file=sys.stderr)


def as_text(verdicts: list[Verdict], render) -> str:
    """Two tables for each machine. render: tables.aligned or tables.markdown."""
    parts = []
    for arch in MACHINES:
        of_arch = [verdict for verdict in verdicts if verdict.job.arch == arch]
        if of_arch:
            pipes = AMD_PIPES if machine(arch).is_amd else NVIDIA_PIPES
            parts += [
                f"### {machine(arch).name} ({arch})",
                render(RESOURCES, [resource_row(verdict) for verdict in of_arch]),
                render(
                    ["hot loop of", "instr", "FLOP", "bytes", *pipes],
                    [pipe_row(v.job.name, v.figures.hot, pipes) for v in of_arch if v.figures],
                ),
            ]
    return "\n\n".join(parts)


def resource_row(verdict: Verdict) -> list[str]:
    figures, name = verdict.figures, verdict.job.name + (" FAIL" if verdict.failures else "")
    if figures is None:
        return [name, *["-"] * (len(RESOURCES) - 1)]
    return [
        name,
        f"{figures.warps}/{figures.stages}",
        str(figures.registers),
        str(figures.spill_bytes),
        f"{figures.shared_bytes / KIB:.1f}",
        str(figures.ctas_per_sm),
        f"{figures.occupancy:.2f}",
        " ".join(f"{count} {kind}" for kind, count in figures.mma.items()) or "-",
        f"{figures.wide_loads:.2f}/{figures.wide_stores:.2f}",
        _ratio(figures.bound),
        _ratio(figures.hot.tensor_bound_serial),
        figures.hot.limiter + (" (ws)" if figures.warp_specialised else ""),
    ]


def pipe_row(name: str, hot: Region, pipes: list[str]) -> list[str]:
    name += " (whole kernel)" if hot.where == "whole kernel" else ""
    counts = [hot.instructions, hot.flops, hot.bytes, *(hot.pipes[pipe] for pipe in pipes)]
    return [name, *(f"{count:.0f}" for count in counts)]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def as_markdown(verdicts, problems, facts, archs) -> str:
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items() if name not in ("device", "load"))
    outcome = "\n".join(f"- FAIL {problem}" for problem in problems) or "All configurations pass."
    return f"""# Compile audit

Compiled ahead of time on a CPU, for {", ".join(machine(arch).name for arch in archs)}; nothing here was run on a GPU.
Written by `python bench/kernels.py --audit --arch {",".join(archs)} --output bench/results/audit.md`.

{head}

{LEGEND}

What the public ops launch, forward and backward, at the shapes of offgpu/audit/calls.py. Checked by closed form: FLOPs
and bytes an iteration of GEMMs that are known, and the FLOPs of the hot loops whose tiles say them (bars.py).

{outcome}

{as_text(verdicts, tables.markdown)}
"""


def as_json(verdicts, problems, facts) -> dict:
    rows = []
    for verdict in verdicts:
        row = {"case": verdict.job.name, "arch": verdict.job.arch, "failures": verdict.failures}
        if figures := verdict.figures:
            row |= {
                "warps": figures.warps,
                "stages": figures.stages,
                "registers": figures.registers,
                "spill_bytes": figures.spill_bytes,
                "shared_bytes": figures.shared_bytes,
                "ctas_per_sm": figures.ctas_per_sm,
                "occupancy": figures.occupancy,
                "mma": figures.mma,
                "wide_loads": figures.wide_loads,
                "wide_stores": figures.wide_stores,
                "bound": figures.bound,
                "serial": figures.hot.tensor_bound_serial,
                "limiter": figures.hot.limiter,
                "flops": figures.hot.flops,
                "bytes": figures.hot.bytes,
                "pipes": figures.hot.pipes,
            }
        rows.append(row)
    return {"machine": facts, "failures": problems, "cases": rows}
