"""Compile and judge every case of every kernel file, several at a time."""

import importlib
import importlib.util
import multiprocessing
import pkgutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import heiretsu.kernels.gpu as kernels_package
from heiretsu.kernels.gpu.launch import AuditCase
from heiretsu.offgpu.audit.analysis import analyze, check_reading
from heiretsu.offgpu.audit.bars import failures
from heiretsu.offgpu.audit.figures import Figures
from heiretsu.offgpu.machines import machine


@dataclass(frozen=True)
class Job:
    """One case, by name, so that another process can look it up. source: a module's name, or the path of a file."""

    source: str
    arch: str
    case_name: str


@dataclass
class Verdict:
    """failures: why the case may not ship, [] if it may. figures: None if it did not compile."""

    job: Job
    figures: Figures | None
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def kernel_modules() -> list[str]:
    """Names of the library's modules that have audit_cases."""
    names = [f"{kernels_package.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels_package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "audit_cases")]


def cases(source: str, arch: str) -> dict[str, AuditCase]:
    """{name: case} of one kernel file on one machine. ValueError where a name occurs twice."""
    found = _load(source).audit_cases(machine(arch).kernel_class)
    by_name = {case.name: case for case in found}
    if len(by_name) < len(found):
        names = sorted(case.name for case in found)
        twice = sorted({a for a, b in zip(names, names[1:], strict=False) if a == b})
        raise ValueError(f"{source}: audit cases need names of their own on {arch}; twice: {', '.join(twice)}")
    return by_name


def _load(source: str):
    if not source.endswith(".py"):
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location("audited_kernels", source)
    if spec is None or spec.loader is None:
        raise ValueError(f"{source} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judge(job: Job) -> Verdict:
    """Compile one case and hold its figures against the bars. A compiler's error is a verdict, too."""
    started = time.perf_counter()
    case, target = cases(job.source, job.arch)[job.case_name], machine(job.arch)
    try:
        figures = analyze(target, case.fn, case.signature, case.constexprs, case.num_warps, case.num_stages)
    except Exception as error:  # whatever the compiler raises: the other cases are still to be judged
        reason = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        return Verdict(job, None, [reason], time.perf_counter() - started)
    return Verdict(job, figures, failures(case, figures, target), time.perf_counter() - started)


def read_known_gemms(arch: str) -> list[str]:
    """The closed-form check of one machine: `analysis.check_reading`."""
    return check_reading(machine(arch))


def run(jobs: list[Job], archs: list[str], processes: int):
    """Yield the closed-form check's complaints (a list of str) of each arch, then a Verdict for each job, in order."""
    if processes == 1:
        yield from map(read_known_gemms, archs)
        yield from map(judge, jobs)
        return
    # fork: torch and Triton are imported once; nothing here has started a thread pool yet.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        readings = [pool.submit(read_known_gemms, arch) for arch in archs]
        verdicts = [pool.submit(judge, job) for job in jobs]
        for future in readings + verdicts:
            yield future.result()
