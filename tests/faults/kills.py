"""Kills at random moments, saves included: a run that is started again after each ends as if nothing had happened.

    python -m tests.faults.kills --count 20                # dense and with experts, on dp 2 x pp 2
    python -m tests.faults.kills --count 5 --torchrun      # it is torchrun --max-restarts that starts it again

Exits with 1 where the final parameters are not bitwise those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from heiretsu.kernels import plain
from heiretsu.run.saved import load_model
from tests.faults.launch import PATIENCE_S, TINY, records, run_to_the_end, started, torchrun

RANKS = 4
MESH = [*TINY, "--dp", "2", "--pp", "2", "--grad_accum_steps", "2", "--timeout", "120"]
MODELS = {"dense": [], "experts": ["--num_experts", "4", "--moe_freq", "1"]}


def flags_of(model: str, steps: int, folder: Path) -> list[str]:
    """A checkpoint after every step, so that many a kill falls into a save."""
    saving = ["--checkpoint_dir", str(folder / "saved"), "--save_interval", "1", "--resume", "auto"]
    log = ["--log_file", str(folder / "log.jsonl")]
    return [*MESH, *MODELS[model], "--max_iters", str(steps), *saving, *log]


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = load_model(folder / "saved", plain)
    return {name: param.detach() for name, param in model.named_parameters()}


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in ours.keys() | theirs.keys() if not torch.equal(ours[name], theirs[name])]


def moments(count: int, steps: int, rng: random.Random) -> list[tuple[int, float]]:
    """(step whose log line is awaited, seconds after it) of each kill; a quarter fall into the start after the last."""
    at = sorted(rng.randrange(1, steps - 1) for _ in range(count))
    return [(0 if index and rng.random() < 0.25 else step, rng.uniform(0, 0.4)) for index, step in enumerate(at)]


def steps_done(folder: Path) -> int:
    try:
        return max((record["step"] + 1 for record in records(folder / "log.jsonl")), default=0)
    except ValueError:  # a line that is being written
        return 0


def disturbed(model: str, steps: int, count: int, seed: int, folder: Path) -> list[str]:
    """The run, killed `count` times and started again; a line for each kill."""
    rng, said = random.Random(seed), []
    flags = flags_of(model, steps, folder)
    for number, (step, delay) in enumerate(moments(count, steps, rng)):
        victim = rng.randrange(RANKS)
        with started(flags, RANKS, folder / f"life{number}") as run:
            deadline = time.monotonic() + PATIENCE_S
            while steps_done(folder) < step and time.monotonic() < deadline and run.processes[victim].is_alive():
                time.sleep(0.01)
            time.sleep(delay)
            alive = run.processes[victim].is_alive()
            os.kill(run.processes[victim].pid, signal.SIGKILL) if alive else None
            statuses, text = run.end(30)  # then they are killed, as by torchrun: some may not have met yet
        said.append(f"rank {victim} after step {steps_done(folder)}: statuses {statuses}")
        print(f"{model}: kill {number + 1} of {count}, {said[-1]}", flush=True)
        assert statuses[victim] == -signal.SIGKILL and 0 not in statuses, text
    statuses, text = run_to_the_end(flags, RANKS, folder / "last life")
    assert statuses == [0] * RANKS, text
    return said


def under_torchrun(model: str, steps: int, count: int, seed: int, folder: Path) -> list[str]:
    """As `disturbed`, but torchrun starts the ranks again. Its workers are found by their RANK in /proc."""
    rng, said = random.Random(seed), []
    process = torchrun(flags_of(model, steps, folder), RANKS, restarts=count)
    killed: set[int] = set()
    for step, delay in moments(count, steps, rng):
        victim = str(rng.randrange(RANKS))
        pid = 0
        while (steps_done(folder) < step or not pid) and process.poll() is None:
            pid = next((p for p, rank in workers(process.pid) if rank == victim and p not in killed), 0)
            time.sleep(0.02)
        time.sleep(delay)
        if process.poll() is None:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
            said.append(f"rank {victim} after step {steps_done(folder)}")
            print(f"{model}: {said[-1]}", flush=True)
    text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, text
    return said


def workers(agent: int) -> list[tuple[int, str]]:
    """(process id, RANK) of each process that torchrun's agent has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = dict(item.partition("=")[::2] for item in (folder / "environ").read_text().split("\0"))
        except OSError:
            continue
        if parent == agent and "RANK" in environment:
            found.append((int(folder.name), environment["RANK"]))
    return found


def compare(model: str, steps: int, count: int, seed: int, how=disturbed) -> tuple[list[str], list[str]]:
    """(a line for each kill, names of the parameters that ended differently)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        statuses, text = run_to_the_end(flags_of(model, steps, folder / "straight"), RANKS, folder / "straight")
        assert statuses == [0] * RANKS, text
        said = how(model, steps, count, seed, folder / "killed")
        return said, differing(parameters(folder / "killed"), parameters(folder / "straight"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="kills of each model")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", action="store_true")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    asked = parser.parse_args()
    bad = False
    for model in asked.models:
        began = time.monotonic()
        how = under_torchrun if asked.torchrun else disturbed
        said, wrong = compare(model, asked.steps, asked.count, asked.seed, how)
        verdict = f"{len(wrong)} parameters differ: {wrong[:3]}" if wrong else "the same final parameters, bitwise"
        print(f"{model}: {len(said)} kills, {verdict}, {time.monotonic() - began:.0f} s", flush=True)
        bad |= bool(wrong)
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
