"""Say what a GPU says about this library: is it right, was the proof of it true, how fast is it, does it train.

    python bench/gpu.py --out DIR                         # on a machine with a GPU: eight minutes, nothing downloaded
    python bench/gpu.py --out DIR --parts right,fast --minutes 5
    python bench/gpu.py --out DIR --rehearse              # the same code without a GPU; its figures mean nothing
    python bench/gpu.py --report DIR                      # write the report of a run again, cut off or not

Every figure is in DIR/figures.jsonl as soon as it is known. At the end DIR holds report.md, charts, log.txt, and
summary.txt, which is printed too, failures first. Exit status: 0, 1 if anything failed, 2 for a wrong command line.
The parts and what they do: bench/gpu_kit/__init__.py; how to read the report: docs/on-a-gpu.md.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__" and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # this folder's file names are not names for `import`
if importlib.util.find_spec("heiretsu") is None:
    sys.exit(
        "heiretsu is not installed: run `pip install -e .` in the repository (with --no-deps --no-build-isolation if "
        "it has no network), or `make gpu`"
    )
if importlib.util.find_spec("torch") is None:
    sys.exit(f"{sys.executable} has no torch: run this with the Python that has it, or `make gpu PYTHON=...`")

from heiretsu.bench.gpu_kit import report
from heiretsu.bench.gpu_kit.plan import PARTS
from heiretsu.bench.gpu_kit.record import FILE, Record
from heiretsu.bench.gpu_kit.runner import Runner

REHEARSAL_MINUTES = 30.0  # a limit, not a plan: the machine may be anybody's


class Stopped(Exception):
    """By SIGTERM or Ctrl-C."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for everything that is found")
    parser.add_argument("--minutes", type=float, help="for the whole run (default: 8)")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="NAMES", help="of %(default)s, with commas")
    parser.add_argument("--rehearse", action="store_true", help="run the same code without a GPU, at tiny sizes")
    parser.add_argument("--report", type=Path, metavar="DIR", help="only write the report of what is in DIR")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.report:
        if not (args.report / FILE).exists():
            parser.error(f"--report {args.report}: there is no {FILE} in it, which every run writes")
        return finish(args.report)
    parts = check(parser, args)
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="heiretsu-gpu-"))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    minutes = args.minutes or (REHEARSAL_MINUTES if args.rehearse else 8.0)
    runner = Runner(args.out, scratch, minutes, args.rehearse, say=lambda line: print(line, flush=True))
    writer = Record(args.out, "run")
    writer.write("fact", "command", value=" ".join(["python bench/gpu.py", *(argv or sys.argv[1:])]))
    writer.write("fact", "parts", value=parts)
    writer.write("fact", "rehearsal", value=args.rehearse)
    try:
        runner.run(parts)
    except Stopped as stopped:
        writer.write("failure", "the run", kind="stopped", detail=f"{stopped} before it had ended")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return finish(args.out)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The parts to run, in their order. Refuses, in one line, what cannot run."""
    asked = [name for name in args.parts.split(",") if name]
    if unknown := [name for name in asked if name not in PARTS]:
        parser.error(f"--parts {args.parts}: there is no part {unknown[0]}; the parts are {', '.join(PARTS)}")
    if not asked:
        parser.error(f"--parts names no part; the parts are {', '.join(PARTS)}")
    if args.out is None:
        parser.error("--out DIR is missing: where to put what is found")
    if (args.out / FILE).exists():
        parser.error(f"--out {args.out} holds an earlier run: name a new folder, or --report {args.out} for its report")
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g} must be above 0")
    if not args.rehearse and not has_gpu():
        parser.error("there is no GPU here, and torch sees none: --rehearse runs the same code without")
    return [name for name in PARTS if name in asked]


def has_gpu() -> bool:
    """Asked of the system first, because torch takes seconds to import; torch has the last word."""
    nodes = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd")
    if any(Path(node).exists() for node in nodes) or shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
        return True
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], stderr=subprocess.DEVNULL).returncode == 0


def finish(out: Path) -> int:
    """Write the report; the exit status."""
    summary = report.write(out)
    print(f"\n{summary.text}", flush=True)
    return 1 if summary.failures else 0


def _stop(number, frame):
    signal.signal(number, signal.SIG_IGN)  # once is enough: what follows ends the workers and writes the report
    raise Stopped(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
