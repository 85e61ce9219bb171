"""Record what is to be audited, then compile and read it, several configurations at a time."""

import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from heiretsu.offgpu.audit.analysis import analyze, check_reading
from heiretsu.offgpu.audit.bars import BARS, SPILLS, Bar, failures
from heiretsu.offgpu.audit.calls import CALLS, Call, Configuration
from heiretsu.offgpu.audit.figures import Figures
from heiretsu.offgpu.machines import machine


@dataclass(frozen=True)
class Subject:
    """What is audited, and what is asked of it."""

    calls: Sequence[Call] = CALLS
    bars: Sequence[Bar] = BARS
    spills: Mapping[tuple[str, str], int] = field(default_factory=lambda: SPILLS)


@dataclass(frozen=True)
class Job:
    """One configuration on one machine."""

    arch: str
    case: Configuration

    @property
    def name(self) -> str:
        return self.case.name


@dataclass
class Verdict:
    """failures: why the configuration may not ship, [] if it may. figures: None if it did not compile."""

    job: Job
    figures: Figures | None
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def subject_of(path: str) -> Subject:
    """A Python file's: its CALLS, held to its own BARS and SPILLS, if it has any."""
    name = f"audited_files.{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--audit-file {path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise ValueError(f"--audit-file {path}: there is no such file") from None
    calls = getattr(module, "CALLS", None)
    if not calls or not all(isinstance(call, Call) for call in calls):
        raise ValueError(
            f"--audit-file {path} must have CALLS, a list of heiretsu.offgpu.audit.calls.Call: a label, and a function "
            "that launches your kernels on CPU tensors"
        )
    return Subject(calls, getattr(module, "BARS", ()), getattr(module, "SPILLS", {}))


def read(job: Job) -> Verdict:
    """Compile one configuration and read its figures. A compiler's error is a verdict, too."""
    started = time.perf_counter()
    try:
        verdict = Verdict(job, analyze(machine(job.arch), *job.case.code))
    except Exception as error:  # whatever the compiler raises: the others are still to be judged
        reason = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        verdict = Verdict(job, None, [reason])
    verdict.seconds = time.perf_counter() - started
    return verdict


def judge(verdict: Verdict, subject: Subject) -> Verdict:
    """With what its figures fall short of."""
    if verdict.figures:
        job = verdict.job
        verdict.failures += failures(job.case, verdict.figures, machine(job.arch), subject.bars, subject.spills)
    return verdict


def read_known_gemms(arch: str) -> list[str]:
    """The closed-form check of one machine: `analysis.check_reading`."""
    return check_reading(machine(arch))


def run(jobs: Sequence[Job], archs: Sequence[str], processes: int) -> Iterator:
    """Yield the closed-form check's complaints (a list of str) of each arch, then a Verdict, not yet judged, for each
    job, in order."""
    if processes == 1:
        yield from map(read_known_gemms, archs)
        yield from map(read, jobs)
        return
    # fork: torch, Triton and a user's file are imported once. The children compute nothing in torch.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures: list[Future] = [pool.submit(read_known_gemms, arch) for arch in archs]
        futures += [pool.submit(read, job) for job in jobs]
        for future in futures:
            yield future.result()
