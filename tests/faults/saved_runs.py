"""Small runs that were saved, to be damaged and resumed: in one process each, without starting a program."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from tests.training import train_here

FLAGS = "--n_layer 1 --n_head 2 --n_embed 16 --block_size 16 --batch_size 2 --eval_interval 0 --sample_tokens 0".split()
FLAGS += "--device cpu --dtype float64 --learning_rate 0.01 --save_interval 2".split()
STEPS = 6


@dataclass
class Outcome:
    """What a run came to: exit status, standard output and error, and its log by step."""

    status: int
    out: str
    err: str
    log: list[dict]

    @property
    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in self.log}

    def said(self, part: str) -> str:
        """The first line with `part` in it."""
        return next((line for line in (self.out + self.err).splitlines() if part in line), "")


def run(folder: Path, *flags: str, steps: int = STEPS, log: Path | None = None) -> Outcome:
    """`python train.py ... --checkpoint_dir folder`, in this process."""
    log = log or folder.with_name(f"{folder.name}.jsonl")
    arguments = [*FLAGS, "--max_iters", str(steps), "--checkpoint_dir", str(folder), "--log_file", str(log), *flags]
    out, err, status = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train_here(*arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    lines = log.read_text().splitlines() if log.exists() else []
    return Outcome(status, out.getvalue(), err.getvalue(), [json.loads(line) for line in lines])


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def flip_a_bit(file: Path, seed: int = 0) -> None:
    data = bytearray(file.read_bytes())
    place = random.Random(seed).randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)


def copy_of(folder: Path, to: Path) -> Path:
    """The folder, and the log beside it."""
    shutil.copy(folder.with_name(f"{folder.name}.jsonl"), to.with_name(f"{to.name}.jsonl"))
    return Path(shutil.copytree(folder, to))
