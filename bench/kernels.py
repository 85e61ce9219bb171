"""Measure the kernels against their alternatives, or audit what the compiler makes of them.

    python bench/kernels.py --quick                     # what is here: a GPU, or the CPU forms
    python bench/kernels.py --op attention --plot charts --json attention.json
    python bench/kernels.py --audit                     # no GPU needed: compile for A100, H100, B200 and MI300X

Parity comes first: an implementation that is wrong gets no number. Cases that lose are printed, too.
"""

import argparse
import os
import sys

if __name__ == "__main__" and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[
        0
    ]  # this folder's file names are not names for `import`: others publish modules called kernels or train


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats: minutes, for a first look")
    parser.add_argument("--json", metavar="FILE", help="also write every figure there")
    audit = parser.add_argument_group("compile audit")
    audit.add_argument("--audit", action="store_true", help="compile ahead of time and check, instead of measuring")
    audit.add_argument("--arch", default="sm_80,sm_90,sm_100,gfx942", help="machines to compile for (%(default)s)")
    audit.add_argument("--output", metavar="FILE", help="write the audit's tables there, as Markdown")
    audit.add_argument("--audit-file", metavar="FILE", help="audit this Python file's audit_cases, not the library's")
    audit.add_argument("--jobs", type=int, default=2, help="compile so many cases at a time (%(default)s)")
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    if args.audit:
        os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: the interpreter has nothing to compile
        from heiretsu.bench.audit import report

        try:
            archs = args.arch.split(",")
            return report.audit(archs, args.quick, args.output, args.json, args.audit_file, args.jobs)
        except ValueError as error:
            parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
