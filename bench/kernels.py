"""Measure the kernels against their alternatives, or audit what the compiler makes of them.

    python bench/kernels.py --quick                     # what is here: a GPU, or the CPU forms
    python bench/kernels.py --op attention --plot charts --json attention.json
    python bench/kernels.py --audit                     # no GPU needed: compile for A100, H100, B200 and MI300X

Parity comes first: an implementation that is wrong gets no number. Cases that lose are printed, too.
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__" and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # this folder's file names are not names for `import`: others publish modules of those names
if importlib.util.find_spec("heiretsu") is None:
    sys.exit("heiretsu is not installed: run `pip install -e '.[bench]'` in the repository, or `make bench`")

from heiretsu.data.terminal import escape_what_cannot_be_printed


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats: minutes, for a first look")
    parser.add_argument("--device", default=None, help="cuda or cpu (default: the GPU if there is one)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: CPU time, on a busy machine")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of plain out")
    parser.add_argument("--json", metavar="FILE", help="also write every figure there")
    parser.add_argument("--plot", metavar="DIR", help="also draw time against size, speed-ups and the roofline there")
    parser.add_argument("--output", metavar="FILE", help="also write the tables there, as Markdown")
    audit = parser.add_argument_group("compile audit")
    audit.add_argument("--audit", action="store_true", help="compile ahead of time and check, instead of measuring")
    audit.add_argument("--arch", default="sm_80,sm_90,sm_100,gfx942", help="machines to compile for (%(default)s)")
    audit.add_argument("--audit-file", metavar="FILE", help="audit what this file's CALLS launch, not the library's")
    audit.add_argument("--fit-only", action="store_true", help="no bars: only that everything compiles and fits")
    audit.add_argument("--jobs", type=int, default=2, help="compile so many cases at a time (%(default)s)")
    return parser


def run_audit(args) -> int:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("--audit needs Triton's compiler, which is published for Linux: pip install triton")
    from heiretsu.offgpu.audit import report

    return report.audit(
        args.arch.split(","), args.quick, args.output, args.json, args.audit_file, args.jobs, args.fit_only
    )


def run_measurements(args) -> int:
    """The exit code: 1 where one of our own ops has no number."""
    import torch

    from heiretsu.bench import environment, measure, result_tables, timing, workloads

    if args.clock == "cpu" and args.threads != 1:
        raise ValueError("--clock cpu also counts threads that wait for each other: use it with --threads 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = timing.CLOCKS[args.clock]
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, args.dtype)
    chosen = choose(workloads.on_gpu(args.quick) if device.type == "cuda" else workloads.on_cpu(args.quick), args.op)
    facts = environment.describe(device)
    if args.clock == "cpu":
        facts["clock"] = "CPU seconds of this process, because others used the machine, too"
    roofline = timing.measure_roofline(device, dtype, clock)
    print(environment.as_text(facts))
    print(f"roof    {result_tables.roofline_text(roofline, dtype)}\n\n{result_tables.LEGEND}")
    found: list[measure.Result] = []
    for op in dict.fromkeys(workload.op for workload in chosen):
        of_op = []
        for workload in (workload for workload in chosen if workload.op == op):
            of_op += measure.measure(workload, device, dtype, roofline, args.quick, not args.no_compile, clock)
        print(f"\n{op}\n{result_tables.table(of_op)}", flush=True)
        found += of_op
    if args.json:
        Path(args.json).write_text(json.dumps(result_tables.as_json(found, facts, roofline, dtype), indent=1) + "\n")
    if args.output:
        page = result_tables.markdown(found, facts, roofline, dtype, command_line(args))
        Path(args.output).write_text(page, encoding="utf-8")
    if args.plot:
        from heiretsu.bench import charts

        for path in charts.draw(found, roofline, facts, dtype, Path(args.plot)):
            print(f"wrote {path}")
    failed = [result for result in found if result.implementation == measure.OURS and result.problem]
    for result in failed:
        print(f"FAIL  {result.workload.op} {result.workload.name}: {result.problem}")
    return 1 if failed else 0


def command_line(args) -> str:
    """The command that makes these figures again: what decides them, without the files that they go to."""
    flags = [f"--op {op}" for op in args.op or ()] + ["--quick"] * args.quick + ["--no-compile"] * args.no_compile
    flags += [f"--{name} {value}" for name in ("device", "threads") if (value := getattr(args, name))]
    flags += [f"--dtype {args.dtype}"] * (args.dtype != "bfloat16") + [f"--clock {args.clock}"] * (args.clock != "wall")
    return " ".join(["python bench/kernels.py", *flags, "--output FILE"])


def choose(workloads, ops: list[str] | None):
    known = list(dict.fromkeys(workload.op for workload in workloads))
    unknown = sorted(set(ops or ()) - set(known))
    if unknown:
        raise ValueError(f"--op {unknown[0]}: the ops are {', '.join(known)}")
    return [workload for workload in workloads if not ops or workload.op in ops]


def main() -> int:
    parser = build_parser()
    escape_what_cannot_be_printed()
    args = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):  # before Triton is imported
        print("TRITON_INTERPRET is ignored: nothing is compiled in the interpreter, and its speed means nothing")
    try:
        return run_audit(args) if args.audit else run_measurements(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
