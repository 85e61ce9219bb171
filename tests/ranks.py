"""The one launcher of distributed tests: runs a function on every rank of a mesh of CPU processes, with gloo.

    results = ranks(fn, argument, ..., tp=2, pp=2)      # fn(mesh, argument, ...) on 4 ranks; a list by rank

Each call forks its ranks from a process that has imported torch already, which takes a few milliseconds. They are not
kept for the next call: the threads of a gloo group outlive it, and spin once their peers have gone. fn must be
importable (a module's own function), and so must what it is given; what it returns travels back. An exception on any
rank is raised here, with its traceback, and ends the others, which may be waiting for it.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

TIMEOUT_S = 300  # of one call; two cores may serve eight ranks and other tests
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "heiretsu.run.building", "heiretsu.kernels.fused"])


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


def run_ranks(fn: Callable, *args, dp: int = 1, ep: int = 1, pp: int = 1, tp: int = 1, **kwargs) -> list:
    """fn(mesh, *args, **kwargs) on each of dp * ep * pp * tp ranks; its results, by rank."""
    sizes = {"dp": dp, "ep": ep, "pp": pp, "tp": tp}
    world_size = math.prod(sizes.values())
    ranks: list[tuple[Any, Any]] = []  # (process, connection)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ours, theirs = _context.Pipe()
                job = (fn, args, kwargs, sizes, rank, os.path.join(folder, "store"))
                process = _context.Process(target=_serve, args=(theirs, job), daemon=True)
                process.start()
                theirs.close()  # so that its end is seen here
                ranks.append((process, ours))
            return _collect([connection for _, connection in ranks])
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _collect(connections: list) -> list:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT_S
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} did not answer in {TIMEOUT_S} s")
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                ok, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                ok, value = False, "it ended without a word"
            if not ok:
                raise RankError(f"rank {rank} of {len(connections)} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(connections))]


def _serve(connection, job) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        answer = True, _run(*job)
    except Exception:
        answer = False, traceback.format_exc()
    # By value: torch's own way shares a tensor's memory, which is gone once this process has ended.
    connection.send_bytes(pickle.dumps(answer))


def _run(fn, args, kwargs, sizes, rank, store):
    from heiretsu.parallel.mesh import make_mesh, process_groups

    def on_rank():
        return fn(make_mesh(**sizes), *args, **kwargs)

    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    with process_groups("gloo", math.prod(sizes.values()), init_method=f"file://{store}", rank=rank, timeout=timeout):
        result = on_rank()
    # One that is left can abort the process when Python shuts down, after a run that went well.
    deadline = time.monotonic() + 5  # the system may list a thread a moment longer than its join takes
    while left := _gloo_threads():
        assert time.monotonic() < deadline, f"{left} threads outlived their process groups: something holds a mesh"
        time.sleep(0.01)
    return result


def _gloo_threads() -> int:
    """How many threads of process groups this process has; 0 where there is no /proc to tell."""
    count = 0
    for task in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it ended just now
            count += "gloo" in task.read_text()
    return count
