"""Saves that are disturbed: a full disk, a kill at any point, a rank that cannot write, a second run in the folder."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from heiretsu.kernels import plain
from heiretsu.parallel import checkpoint, checkpoint_folder
from heiretsu.parallel.checkpoint_folder import checkpoints, newest_whole, tidy
from heiretsu.parallel.checkpoint_seal import verify
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import state
from heiretsu.run.building import build_engine
from heiretsu.run.lock import FolderLock
from heiretsu.run.saving import Saver
from tests.faults.saved_runs import run, steps_in
from tests.ranks import _context
from tests.training import DENSE, run_config

CONFIG = run_config(replace(DENSE, n_layer=2), microbatches=1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB, on which five saves of the small run fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".step"))


@pytest.mark.parametrize("what", ["stop", pytest.param("continue", marks=pytest.mark.full)])
def test_a_disk_that_is_full(small_disk, tmp_path, record_property, what):
    record_property("fault", f"disk full during a save (tmpfs), --on_save_error {what}")
    folder, log = small_disk / "run", tmp_path / "log.jsonl"
    flags = ["--save_interval", "1", "--keep", "99", "--on_save_error", what]
    outcome = run(folder, *flags, steps=12, log=log)
    kept = steps_in(folder)
    assert outcome.status == 1 and 3 <= len(kept) < 12 and kept == list(range(1, len(kept) + 1)), outcome.err
    for path in checkpoints(folder):
        verify(path)
    assert hidden(folder) == []
    complaints = [line for line in (outcome.out + outcome.err).splitlines() if "could not be saved" in line]
    assert all("No space left on device" in line and "earlier checkpoints are untouched" in line for line in complaints)
    if what == "stop":
        assert len(complaints) == 1 and len(outcome.log) < 12
    else:
        assert len(complaints) == 12 - len(kept) and len(outcome.log) == 12
        assert "the last save failed" in outcome.err
    shutil.rmtree(folder / "step_00000001")
    again = run(folder, *flags, "--keep", "1", "--resume", "auto", steps=12, log=log)
    assert again.status == 0 and steps_in(folder) == [12] and sorted(again.losses) == list(range(12)), again.err
    record_property("outcome", f"steps {kept[0]} to {kept[-1]} intact; {complaints[0].rpartition('saved: ')[2]}")


def test_a_file_that_may_not_grow(tmp_path, monkeypatch, record_property):
    """Where nothing can be mounted: the system's limit on a file's size stands in for the disk's end."""
    import resource

    record_property("fault", "a file that may not grow (RLIMIT_FSIZE) during a save")
    folder = tmp_path / "run"
    real, limits = checkpoint.start, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(directory, step, *rest, **facts):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return real(directory, step, *rest, **facts)

    monkeypatch.setattr(checkpoint, "start", limited)
    try:
        outcome = run(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.status == 1 and outcome.err.count("\n") == 1 and "step_00000004 could not be saved" in outcome.err
    assert "File too large" in outcome.err and steps_in(folder) == [2] and hidden(folder) == []
    verify(folder / "step_00000002")
    record_property("outcome", outcome.err.strip().rpartition("saved: ")[2])


# --- a kill at each point of a save

POINTS = {
    "while the tensors are written": (checkpoint.dcp.FileSystemWriter, "write_data", "after"),
    "before .metadata": (checkpoint._Writer, "finish", "before"),
    "before run.json": (checkpoint, "write_json", "before"),
    "before the checksums": (checkpoint, "seal", "before"),
    "between checksums and rename": (checkpoint, "publish", "before"),
    "after the rename": (checkpoint, "rotate", "before"),
    "when an old one is renamed away": (checkpoint_folder, "_remove", "before"),
    "when all is done": (checkpoint, "rotate", "after"),
}


def saves_until_killed(folder: Path, steps: list[int], point: str, at_step: int, keep: int) -> None:
    """In a process of its own: saves of an untrained model, and SIGKILL at the point in one of them."""
    owner, name, when = POINTS[point]
    real, step = getattr(owner, name), 0

    def killing(*args, **kwargs):
        if step == at_step and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if step == at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, killing)
    engine = build_engine(CONFIG, abstract_mesh(), plain)
    saver = Saver(replace(CONFIG, checkpoint_dir=str(folder), keep=keep), engine, {}, print)
    for step in steps:
        saver.begin(step)
        saver.finish()


def as_json() -> dict:
    import json

    return json.loads(CONFIG.to_json())


def killed(target, *args) -> None:
    process = _context.Process(target=target, args=args)
    process.start()
    process.join(timeout=240)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "point",
    [
        point if point == "between checksums and rename" else pytest.param(point, marks=pytest.mark.full)
        for point in POINTS
    ],
)
def test_a_kill_at_a_point_of_a_save(tmp_path, record_property, point):
    record_property("fault", f"SIGKILL during a save, {point}")
    killed(saves_until_killed, tmp_path, [2, 4, 6], point, 6, 1)
    seen = [path.name for path in checkpoints(tmp_path)]
    for path in checkpoints(tmp_path):
        verify(path)  # what has a name is whole, before anything is tidied
    tidy(tmp_path)
    assert hidden(tmp_path) == []
    newest = newest_whole(tmp_path, print)
    assert newest.name in ("step_00000004", "step_00000006") and newest.name == seen[-1]
    engine = build_engine(replace(CONFIG, seed=5), abstract_mesh(), plain)
    assert state.load(newest, engine, as_json()) == int(newest.name[-8:])
    expected = build_engine(CONFIG, abstract_mesh(), plain).params
    assert all((param == expected[name]).all() for name, param in engine.params.items())
    record_property("outcome", f"the newest is {newest.name}, whole, bitwise; the rest is cleared away")


def test_a_kill_between_the_renames_of_a_replaced_checkpoint(tmp_path, monkeypatch, record_property):
    record_property("fault", "SIGKILL when a checkpoint of the same step is replaced, between its two renames")
    engine = build_engine(CONFIG, abstract_mesh(), plain)
    path = state.save(tmp_path, 4, engine, as_json(), keep=9)
    real = os.replace

    def dies(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(checkpoint_folder.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        state.save(tmp_path, 4, engine, as_json(), keep=9)
    monkeypatch.undo()
    assert not path.exists() and ".step_00000004.replaced" in hidden(tmp_path)
    tidy(tmp_path)
    assert hidden(tmp_path) == []
    verify(path)
    record_property("outcome", "the next run takes the old one back")


def test_a_kill_while_an_old_checkpoint_is_deleted(tmp_path, monkeypatch, record_property):
    record_property("fault", "SIGKILL while the files of an old checkpoint are deleted")
    engine = build_engine(CONFIG, abstract_mesh(), plain)
    for step in (2, 4):
        state.save(tmp_path, step, engine, as_json(), keep=9)
    real = shutil.rmtree

    def dies(path, *args, **kwargs):
        if Path(path).is_dir() and "step_00000002" in Path(path).name:
            next(Path(path).glob("*.distcp")).unlink()
            raise KeyboardInterrupt
        real(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_folder.rotate(tmp_path, keep=1)
    monkeypatch.undo()
    assert steps_in(tmp_path) == [4] and hidden(tmp_path) == [".step_00000002.deleted"]
    tidy(tmp_path)
    assert hidden(tmp_path) == []
    record_property("outcome", "it has lost its name before its first file, and is cleared away by the next run")


def saves_for_ever(folder: Path) -> None:
    engine = build_engine(CONFIG, abstract_mesh(), plain)
    saver = Saver(replace(CONFIG, checkpoint_dir=str(folder), keep=2), engine, {}, print)
    step = max(steps_in(folder), default=0)
    while True:
        step += 1
        saver.begin(step)
        saver.finish()


@pytest.mark.full
def test_kills_at_random_moments(tmp_path, record_property):
    record_property("fault", "SIGKILL at 12 random moments of a process that does nothing but save")
    moments = random.Random(7)
    for _ in range(12):
        process = _context.Process(target=saves_for_ever, args=(tmp_path,))
        before = max(steps_in(tmp_path), default=0)
        process.start()
        deadline = time.monotonic() + 120
        while max(steps_in(tmp_path), default=0) <= before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.5)
        process.kill()
        process.join()
        named = steps_in(tmp_path)
        assert named and max(named) > before
        for path in checkpoints(tmp_path):
            verify(path)
        tidy(tmp_path)
        assert hidden(tmp_path) == []
    record_property("outcome", f"every checkpoint with a name was whole each time; {named[-1]} saves done")


# --- several ranks


def saves_with_a_rank_that_cannot(mesh, folder: Path) -> list[str]:
    """What each of five saves came to, on this rank. Rank 1 fails in the second, and writes elsewhere in the fourth."""
    config = run_config(replace(DENSE, n_layer=2), microbatches=1, dp=2)
    engine = build_engine(config, mesh, plain)
    came_to: list[str] = []
    config = replace(config, checkpoint_dir=str(folder), on_save_error="continue")
    saver = Saver(config, engine, {}, came_to.append)
    real = checkpoint._Writer.write_data
    for step in range(1, 6):

        def write_data(self, plan, planner, step=step):
            if mesh.rank == 1 and step == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            if mesh.rank == 1 and step == 4:
                self.path = self.part = folder / "elsewhere"
                self.path.mkdir(exist_ok=True)
            return real(self, plan, planner)

        checkpoint._Writer.write_data = write_data
        saver.begin(step)
        saver.finish()
    checkpoint._Writer.write_data = real  # the other holds the mesh, which must end before its process
    return came_to


def test_a_rank_that_cannot_write_its_part(ranks, tmp_path, record_property):
    record_property("fault", "one rank of two cannot write in a save, or writes where the other does not see it")
    folder = tmp_path / "run"
    one, two = ranks(saves_with_a_rank_that_cannot, folder, dp=2)
    assert [line.startswith("warning") for line in one] == [False, True, False, True, False] and len(two) == 5
    assert "step_00000002 could not be saved: rank 1: OSError: [Errno 28] No space left" in one[1]
    assert "do all nodes share the folder" in one[3] and "__1_0.distcp is not there" in one[3], one[3]
    assert [line.startswith("warning") for line in two] == [line.startswith("warning") for line in one]
    assert steps_in(folder) == [3, 5] and hidden(folder) == []
    for path in checkpoints(folder):
        verify(path)
    record_property("outcome", "no rank has saved it: " + one[1].partition("saved: ")[2].partition(";")[0])


# --- two runs in one folder

HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from heiretsu.run.lock import FolderLock
lock = FolderLock({folder!r})
lock.take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds."""
    (tmp_path / "run").mkdir()
    program = HOLDER.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path / "run"))
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    yield tmp_path / "run", holder
    holder.kill()
    holder.wait()
    holder.stdout.close()


def test_a_second_run_is_refused_while_the_first_lives(held, record_property):
    folder, holder = held
    record_property("fault", "a second run in the folder of one that lives; then the first is killed")
    refused = run(folder)
    assert refused.status == 2 and refused.err.count("\n") == 1 and f"process {holder.pid} on " in refused.err
    assert steps_in(folder) == [] and not refused.log
    holder.kill()
    holder.wait()
    assert run(folder, steps=2).status == 0 and steps_in(folder) == [2]
    record_property("outcome", "refused in one line that names the first; once that is killed, no lock is left")


def test_a_run_waits_for_its_own_jobs_predecessor(held, monkeypatch, record_property):
    folder, holder = held
    record_property("fault", "a job that is started again while its killed predecessor is still ending")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (folder / ".lock").write_text('{"job": "77", "pid": 1, "host": "a"}')
    signal.signal(signal.SIGALRM, lambda *_: holder.kill())
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    lock = FolderLock(folder)
    began = time.monotonic()
    assert lock.take(grace_s=0.0, same_job_grace_s=60.0) is None
    assert time.monotonic() - began > 0.9
    lock.release()
    (folder / ".lock").write_text("no JSON")
    other = FolderLock(folder)
    assert other.take(grace_s=0.0) is None  # what stands in the file decides nothing
    other.release()
    record_property("outcome", "it waits until the lock is free")
