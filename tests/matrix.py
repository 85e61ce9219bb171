"""The checks that depend on a release of PyTorch or Triton, on each pair of them that can be installed here.

    python -m tests.matrix                                     # make matrix: every pair, minutes each
    python -m tests.matrix --pairs 2.13.0/3.9.0 --steps compiled,interpreted
    python -m tests.matrix --index URL                         # where CPU builds of PyTorch are published

Each pair has an environment of its own under build/matrix/, made once. Where no CPU build of a pair's PyTorch is to be
had (a CUDA build brings gigabytes that nothing here uses), its Triton is taken beside the PyTorch of constraints.txt,
for the steps that look at Triton. What was seen is printed and written to bench/results/matrix.md, together with what
earlier calls saw of other pairs and steps; what the steps printed lies in the environment's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "matrix"
PAGE = ROOT / "bench" / "results" / "matrix.md"
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
SECONDS_A_STEP = 1800
OF_CUDA = ("nvidia-", "cuda-")  # what the names of packages begin with that a CUDA build of PyTorch needs


class Pair(NamedTuple):
    torch: str
    triton: str

    def __str__(self) -> str:
        return f"{self.torch}/{self.triton}"

    @property
    def folder(self) -> Path:
        return FOLDER / f"torch-{self.torch}-triton-{self.triton}"

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")


# Releases of PyTorch from the oldest that pyproject.toml takes, each with the Triton that it names.
PAIRS = (
    Pair("2.11.0", "3.6.0"),
    Pair("2.12.1", "3.7.1"),
    Pair("2.13.0", "3.7.1"),
    Pair("2.14.1", "3.8.0"),
    Pair("2.15.0", "3.9.0"),
)


@dataclass(frozen=True)
class Step:
    """commands: arguments of the environment's Python. of_triton: whether it says something of a Triton by itself."""

    commands: tuple[tuple[str, ...], ...]
    of_triton: bool = True
    interpret: bool = False


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "600", *arguments)


SMALL_ROWS = "whole or tails or tiny or each"  # of the parity table: some of every op
STEPS = {
    "lint": Step(
        (
            ("-m", "ruff", "check", "."),
            ("-m", "ruff", "format", "--check", "."),
            ("-m", "mypy", "-p", "heiretsu"),
        ),
        of_triton=False,
    ),
    "compiled": Step((("bench/kernels.py", "--audit", "--quick", "--fit-only"),)),
    "interpreted": Step(
        (
            _pytest("tests/kernels/interpreter", "-k", "not sanitized and not far"),
            _pytest("tests/offgpu/interpreter", "tests/kernels/test_registered_ops.py"),
            _pytest("tests/kernels/test_parity.py", "-k", SMALL_ROWS),
        ),
        interpret=True,
    ),
    "emulated": Step(
        (
            _pytest("tests/offgpu/emulator"),
            _pytest("tests/kernels", "--emulate", "sm_90", "-k", "bfloat16 and lockstep"),
        )
    ),
    "parity": Step(
        (
            _pytest("tests/kernels/test_parity.py", "tests/kernels/test_with_torch.py", "-m", "not full"),
            _pytest("tests/kernels/test_registered_ops.py", "-m", "not full"),
            _pytest("tests/parallel/test_topologies.py", "-k", "dp2xpp2xtp2 or ep2xpp2xtp2 or dropout or compile"),
            _pytest("tests/parallel/test_checkpoint.py", "-k", "same_mesh or on_another"),
        ),
        of_triton=False,
    ),
}


@dataclass
class Seen:
    """What one step said of one pair."""

    step: str
    passed: bool
    says: str
    seconds: float
    commit: str


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if sys.platform != "linux":
        print("the matrix needs Triton, which is published for Linux")
        return 2
    failed = False
    for pair in args.pairs:
        seen = on_pair(pair, args.steps, args.index)
        failed |= not all(step.passed for step in seen)
    text = page()
    PAGE.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {os.path.relpath(PAGE, ROOT)}")
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=_pairs, default=PAIRS, help="TORCH/TRITON,... (default: all that it knows)")
    parser.add_argument("--steps", type=_steps, default=list(STEPS), help=f"of {','.join(STEPS)} (default: all)")
    parser.add_argument("--index", default=CPU_BUILDS, help="of CPU builds, beside pip's; '' for none (%(default)s)")
    return parser.parse_args(arguments)


def _pairs(text: str) -> list[Pair]:
    found = [Pair(*words) for part in text.split(",") if len(words := part.split("/")) == 2]
    if not found or len(found) < len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no TORCH/TRITON, as in {PAIRS[0]}")
    return found


def _steps(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in STEPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(STEPS)}")
    return text.split(",")


def on_pair(pair: Pair, steps: list[str], index: str) -> list[Seen]:
    """Make the pair's environment and take the steps there; where it cannot be made, those of its Triton, beside the
    PyTorch of constraints.txt."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    why = make(pair, index)
    note(pair, why)
    if why:
        print(f"{pair}: not installed: {why}", flush=True)
        tested = Pair(pins()["torch"], pair.triton)
        if tested.torch == pair.torch or pair.triton == pins()["triton"]:
            return []
        return on_pair(tested, [name for name in steps if STEPS[name].of_triton], index)
    seen = []
    for name in steps:
        print(f"{pair}: {name} ... ", end="", flush=True)
        seen.append(take(pair, name))
        print(f"{seen[-1].says} ({seen[-1].seconds:.0f} s)", flush=True)
        remember(pair, seen[-1])
    return seen


# ---- environments


def pins() -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))


def make(pair: Pair, index: str) -> str:
    """'' if the pair's environment is there, made now or earlier from the same files; else why not, in a line."""
    packages = (
        (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]
    )  # the rest changes nothing that is installed
    made_from = "\n".join([packages, *((ROOT / name).read_text() for name in ("setup.py", "constraints.txt"))])
    stamp = pair.folder / "made-from"
    if stamp.is_file() and stamp.read_text() == made_from:
        return ""
    shutil.rmtree(pair.folder, ignore_errors=True)
    install = ["install", *(["--extra-index-url", index] if index else [])]
    why = refusal(install, pair)
    if why:
        return why
    print(f"{pair}: installing", flush=True)
    venv.create(pair.folder, with_pip=True)
    constraints = pair.folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in (pins() | pair._asdict()).items()))
    done = _pip(pair.python, *install, "--constraint", str(constraints), "--editable", ".[dev]")
    if done.returncode:
        return _why(done)
    stamp.write_text(made_from)
    return ""


def refusal(install: list[str], pair: Pair) -> str:
    """Why the pair is not to be installed: it cannot be, or PyTorch would be a CUDA build. Asks for metadata alone."""
    plan = FOLDER / "plan.json"
    wanted = [f"torch=={pair.torch}", f"triton=={pair.triton}"]
    done = _pip(sys.executable, *install, "--dry-run", "--ignore-installed", "--report", str(plan), *wanted)
    if done.returncode:
        return _why(done)
    names = [entry["metadata"]["name"] for entry in json.loads(plan.read_text())["install"]]
    of_cuda = [name for name in names if name.startswith(OF_CUDA)]
    if of_cuda:
        return f"only a CUDA build of torch {pair.torch} is to be had here, with {len(of_cuda)} packages of CUDA's"
    return ""


def _pip(python: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _why(done: subprocess.CompletedProcess) -> str:
    lines = [line.partition("ERROR: ")[2] for line in done.stderr.splitlines() if "ERROR: " in line]
    constraints = re.findall(r"\(constraint\) (.+)", done.stdout + done.stderr)  # of the machine's own pip.conf
    return (lines or ["pip failed without a word"])[0] + "".join(f" (constraint {text})" for text in constraints)


# ---- steps


def take(pair: Pair, name: str, run: Callable = subprocess.run) -> Seen:
    """Run the step's commands in the pair's environment until one fails; all that they print goes to a file."""
    step, log, says = STEPS[name], pair.folder / f"{name}.log", []
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON_"))}
    environment |= {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(pair.folder / "cache")}
    environment |= {"MYPY_CACHE_DIR": str(pair.folder / "mypy")}
    environment |= {"TRITON_INTERPRET": "1"} if step.interpret else {}
    started, passed = time.monotonic(), True
    with log.open("w") as file:
        for command in step.commands:
            file.write(f"$ python {' '.join(command)}\n")
            file.flush()
            try:
                status = run(
                    [pair.python, *command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                    timeout=SECONDS_A_STEP,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                status = f"over {SECONDS_A_STEP} s"
            says.append(last_line(log.read_text()))
            if status != 0:
                passed, says = False, [f"FAILED ({status}): {says[-1]}; see {log.relative_to(ROOT)}"]
                break
    return Seen(name, passed, "; ".join(says), time.monotonic() - started, commit())


def last_line(text: str) -> str:
    """What a tool said last, without its time and its rulers: "466 passed"."""
    line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return re.sub(r" in [\d.]+s.*$", "", line.strip("= "))


def commit() -> str:
    """The checkout's, "+" where the tree differs from it by more than results; "unknown" outside of one."""
    git = ["git", "-C", str(ROOT)]
    done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if done.returncode:
        return "unknown"
    tracked = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"]
    return done.stdout.strip() + "+" * bool(subprocess.run(tracked, capture_output=True).stdout)


# ---- what was seen


def _file(pair: Pair) -> Path:
    return FOLDER / f"{pair.folder.name}.json"


def _known(pair: Pair) -> dict:
    return json.loads(_file(pair).read_text()) if _file(pair).is_file() else {"pair": pair, "why_not": "", "steps": {}}


def note(pair: Pair, why_not: str) -> None:
    """Write down whether the pair can be installed."""
    _file(pair).write_text(json.dumps(_known(pair) | {"why_not": why_not}))


def remember(pair: Pair, seen: Seen) -> None:
    known = _known(pair)
    known["steps"][seen.step] = asdict(seen)
    _file(pair).write_text(json.dumps(known))


def page() -> str:
    """Everything that was seen, as Markdown."""
    rows = []
    for file in sorted(FOLDER.glob("torch-*.json")):
        known = json.loads(file.read_text())
        versions = list(known["pair"])
        if known["why_not"]:
            rows.append([*versions, "-", f"not installed: {known['why_not']}", "", ""])
        for name in STEPS:
            if not known["why_not"] and (step := known["steps"].get(name)):
                rows.append([*versions, name, step["says"], f"{step['seconds']:.0f}", step["commit"]])
    head = ["torch", "triton", "what ran", "result", "seconds", "commit"]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * 4 + ["---:", "---"], *rows)]
    described = "\n".join(f"- {name}: {_commands(step)}" for name, step in STEPS.items())
    return (
        f"# With which PyTorch and Triton\n\nWritten by `make matrix` (`tests/matrix.py`), CPU builds, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores; nothing here was run on a GPU.\n\n"
        + "\n".join(lines)
        + f"\n\n{described}\n"
    )


def _commands(step: Step) -> str:
    prefix = "TRITON_INTERPRET=1 " if step.interpret else ""
    plain = [" ".join(f"'{word}'" if " " in word else word for word in command) for command in step.commands]
    return ", ".join(f"`{prefix}python {text.replace(' -q -p no:cacheprovider --timeout 600', '')}`" for text in plain)


if __name__ == "__main__":
    sys.exit(main())
