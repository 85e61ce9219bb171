"""Real runs of train.py, each rank a process of its own, to do things to.

    run = start([*TINY, "--dp", "2"], ranks=2, fault="kill:1:3", folder=tmp_path)
    statuses, said = run.end(seconds=60)

Ranks are forked from a process that has imported torch already, with what torchrun would give them in their
environment; they differ from torchrun's in nothing else, and cost a tenth. What needs torchrun itself, its restarts,
starts it with `torchrun`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLANTED = Path(__file__).parent / "planted.py"
TINY = (
    "--n_layer 2 --n_head 2 --n_embed 16 --block_size 16 --batch_size 2 --eval_interval 0 --sample_tokens 0 "
    "--device cpu --learning_rate 0.01"
).split()
PATIENCE_S = 240  # for what takes seconds on an idle machine

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "heiretsu.run.building", "heiretsu.kernels.fused"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """processes: by rank. Each rank's output is in folder/rank<r>.out and .err."""

    def __init__(self, flags: Sequence[str], ranks: int, fault: str, folder: Path, environment: dict[str, str]):
        self.folder, self.processes = folder, []
        folder.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        for rank in range(ranks):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **environment}
            process = _context.Process(target=_serve, args=(list(flags), fault, env, str(folder / f"rank{rank}")))
            process.start()
            self.processes.append(process)

    def kill(self, number: int, ranks: Sequence[int] | None = None) -> None:
        for rank in range(len(self.processes)) if ranks is None else ranks:
            os.kill(self.processes[rank].pid, number)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait, for as long as the ranks live."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert any(process.is_alive() for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def end(self, seconds: float = PATIENCE_S) -> tuple[list[int], str]:
        """Exit statuses by rank (negative: the signal), and all that was said. A rank that does not end in time, a
        frozen one too, is killed, and its status is None."""
        deadline = time.monotonic() + seconds
        statuses = []
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            statuses.append(process.exitcode)
        self.stop()
        return statuses, self.said()

    def stop(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def said(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("rank*.???")))

    def rank_said(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.err").read_text(errors="replace")


@contextlib.contextmanager
def started(flags: Sequence[str], ranks: int, folder: Path, fault: str = "none:0:0", **environment: str):
    run = Run(flags, ranks, fault, folder, environment)
    try:
        yield run
    finally:
        run.stop()


def run_to_the_end(flags: Sequence[str], ranks: int, folder: Path, fault: str = "none:0:0", **environment: str):
    with started(flags, ranks, folder, fault, **environment) as run:
        return run.end()


def _serve(flags: list[str], fault: str, environment: dict[str, str], output: str) -> None:
    for number, suffix in ((1, "out"), (2, "err")):
        sink = os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    from tests.faults import planted

    sys.argv = [str(PLANTED), fault, *flags]
    planted.main()


def torchrun(flags: Sequence[str], ranks: int, restarts: int = 0, fault: str = "none:0:0") -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [f"--max-restarts={restarts}", str(PLANTED), fault, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_line(text: str, having: str) -> str:
    return next((line for line in reversed(text.splitlines()) if having in line), "")
