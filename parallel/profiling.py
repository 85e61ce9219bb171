"""Where a step's time goes: torch.profiler over a few steps, with the names that the library gives its regions.

`region` marks schedule actions and collectives; the kernels are there by their own names. Traces open in Perfetto or
chrome://tracing, one for each rank. The same regions keep the record of what a rank is doing (`activity.py`).
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from heiretsu.parallel.activity import ACTIVITY
from heiretsu.parallel.mesh import Mesh


class region:
    """`with region("all-reduce tp", waits=True): ...`: a name in the traces, and in the record of what a rank is doing.

    waits: whether this rank needs others in it. words: its name in the record, if that is to be longer.
    """

    def __init__(self, name: str, waits: bool = False, words: str = ""):
        self.mark, self.words, self.waits = record_function(name), words or name, waits

    def __enter__(self) -> None:
        ACTIVITY.enter(self.words, self.waits)
        self.mark.__enter__()

    def __exit__(self, kind, error, trace) -> None:
        self.mark.__exit__(kind, error, trace)
        ACTIVITY.leave(error)


WARMUP_STEPS, PROFILED_STEPS = 2, 3


class StepProfiler:
    """Profiles steps WARMUP_STEPS .. WARMUP_STEPS + PROFILED_STEPS - 1 after the start. folder None: does nothing.

    Call `step` after each training step. Writes folder/rank<r>.json and, where memory is asked for on a GPU,
    folder/memory_rank<r>.pickle (for pytorch.org/memory_viz).
    """

    def __init__(self, folder: str | None, mesh: Mesh, memory: bool = False):
        self.folder, self.mesh, self.table = Path(folder) if folder else None, mesh, ""
        self.memory = memory and mesh.device.type == "cuda"
        self.profiler: Any = contextlib.nullcontext()  # or a torch.profiler.profile
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (mesh.device.type == "cuda")
        plan = schedule(wait=WARMUP_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1)
        self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        if self.memory:
            torch.cuda.memory._record_memory_history()  # PyTorch's documented way, underscore and all

    def __enter__(self) -> StepProfiler:
        self.profiler.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.profiler.__exit__(*exception)

    def step(self) -> str:
        """Mark the end of a step. Returns the table of where the time went, once, when it is known; else ''."""
        if self.folder is None:
            return ""
        self.profiler.step()
        table, self.table = self.table, ""
        return table

    def _write(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self.folder / f"rank{self.mesh.rank}.json"))
        if self.memory:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_rank{self.mesh.rank}.pickle"))
        on_gpu = self.mesh.device.type == "cuda"
        averages = profiler.key_averages()
        by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        regions = copy.copy(averages)
        regions[:] = [event for event in averages if event.is_user_annotation]
        by_region = regions.table(sort_by="cpu_time_total", row_limit=12)
        self.table = f"by region:\n{by_region}\nby kernel:\n{averages.table(sort_by=by, row_limit=15)}"
