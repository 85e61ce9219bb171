"""The one launcher of distributed tests: runs a function on every rank of a mesh of CPU processes, with gloo.

    results = ranks(fn, argument, ..., tp=2, pp=2)      # fn(mesh, argument, ...) on 4 ranks; a list by rank

A pool of processes is kept between calls; each call joins a new process group. fn must be importable (a module's own
function), and so must what it is given; what it returns travels back. An exception on any rank is raised here, with the
rank's traceback, and ends the whole pool, since its neighbours may wait for ever.
"""

from __future__ import annotations

import datetime
import math
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

TIMEOUT_S = 300  # of one call; two cores may serve eight ranks and other tests
_context = mp.get_context("forkserver")  # a child costs a fork of a process that has imported torch already
_context.set_forkserver_preload(["torch", "torch.distributed", "heiretsu.model.build", "heiretsu.kernels.fused"])


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


class RankPool:
    def __init__(self) -> None:
        self.workers: list[tuple[Any, Any]] = []  # (process, connection)

    def run(self, fn: Callable, *args, dp: int = 1, ep: int = 1, pp: int = 1, tp: int = 1, **kwargs) -> list:
        """fn(mesh, *args, **kwargs) on each of dp * ep * pp * tp ranks; its results, by rank."""
        sizes = {"dp": dp, "ep": ep, "pp": pp, "tp": tp}
        world_size = math.prod(sizes.values())
        self._grow(world_size)
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world_size):
                self.workers[rank][1].send((fn, args, kwargs, sizes, rank, os.path.join(folder, "store")))
            return self._collect(world_size)

    def _grow(self, size: int) -> None:
        while len(self.workers) < size:
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.workers.append((process, ours))

    def _collect(self, world_size: int) -> list:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT_S
        waiting = {self.workers[rank][1]: rank for rank in range(world_size)}
        try:
            while waiting:
                ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise RankError(f"ranks {sorted(waiting.values())} did not answer in {TIMEOUT_S} s")
                for connection in ready:
                    rank = waiting.pop(connection)
                    ok, value = connection.recv()
                    if not ok:
                        raise RankError(f"rank {rank} of {world_size} raised:\n{value}")
                    results[rank] = value
        except BaseException:
            self.close()
            raise
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers = []


def _serve(connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, _run(*job)))
        except Exception:
            connection.send((False, traceback.format_exc()))


def _run(fn, args, kwargs, sizes, rank, store):
    import torch.distributed as dist

    from heiretsu.parallel.mesh import make_mesh

    world_size = math.prod(sizes.values())
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=TIMEOUT_S),
        )
    try:
        return fn(make_mesh(**sizes), *args, **kwargs)
    finally:
        if world_size > 1:
            dist.destroy_process_group()
