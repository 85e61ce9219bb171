"""examples/slurm/train.sbatch on a real Slurm of two nodes: what ends a job, and how it goes on."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from heiretsu.bench.network import PATIENCE_S, ROOT
from heiretsu.parallel.checkpoint_folder import complete
from tests.cluster.launching import PYTHON, TINY
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.full

SCRIPT = ROOT / "examples/slurm/train.sbatch"
ENDLESS = ["--max_iters", "1000000"]  # ended by what the test does


class Job:
    """A job of the script. log: the lines of --log_file so far. output: what the job has printed."""

    def __init__(self, slurm: Slurm, name: str, *flags: str, options: tuple[str, ...] = (), ranks: int = 1):
        self.slurm, self.folder = slurm, slurm.folder / name
        output = slurm.folder / f"{name}.out"
        options = (*options, f"--output={output}", f"--job-name={name}")
        environment = {"PYTHON": str(PYTHON), "RUN_DIR": str(self.folder), "RANKS_PER_NODE": str(ranks)}
        environment["WANDB_DIR"] = str(slurm.folder)
        self.number = slurm.submit(*options, SCRIPT, *TINY, *flags, cwd=ROOT, **environment)
        self.output_file = output

    @property
    def output(self) -> str:
        return self.output_file.read_text() if self.output_file.exists() else ""

    @property
    def log(self) -> list[dict]:
        file = self.folder / "log.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    @property
    def saved(self) -> list[Path]:
        return complete(self.folder)

    def until(self, condition, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"no {what}:\n{self.output}\n{self.slurm.logs()}"
            self.slurm.job(self.number)
            time.sleep(0.3)

    def until_step(self, step: int) -> None:
        self.until(lambda: len(self.log) >= step, f"step {step}")

    def until_resumed(self) -> int:
        """The step with which it goes on, once it has gone on for ten steps."""
        line = re.compile(r"^resumed .*: (\d+) of", re.M)
        self.until(lambda: line.search(self.output), "line that says that it resumed")
        first = int(line.search(self.output).group(1))
        self.until_step(first + 10)
        return first

    def cancel(self) -> str:
        self.slurm.ask("scancel", str(self.number))
        return self.slurm.wait_for(self.number, "CANCELLED", "COMPLETED", "FAILED", "TIMEOUT")["JobState"]


def one_process(slurm: Slurm, steps: int, *flags: str, batch_size: int) -> list[dict]:
    """The log of the run with the whole batch on one process."""
    log = slurm.folder / "one-process.jsonl"
    log.unlink(missing_ok=True)  # a resumed run would go on with it
    files = ["--log_file", str(log), "--batch_size", str(batch_size)]
    slurm.net.alder.run(PYTHON, "train.py", *TINY, *files, "--max_iters", str(steps), *flags)
    return [json.loads(line) for line in log.read_text().splitlines()]


def same_curve(ours: list[dict], theirs: list[dict]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(a["step"] == b["step"] and abs(a["loss"] - b["loss"]) <= 1e-9 * b["loss"] for a, b in pairs)


def goes_on_where_it_was(job: Job, first: int, slurm: Slurm) -> None:
    """The log has every step once, and after the resumption those that one process gives from the same checkpoint."""
    job.cancel()
    assert [line["step"] for line in job.log] == list(range(len(job.log)))
    at = job.folder / f"step_{first:08d}"
    assert at.is_dir(), job.saved
    theirs = one_process(slurm, first + 3, "--resume", str(at), batch_size=8)
    assert same_curve(job.log[first : first + 3], theirs)


@pytest.fixture(scope="module")
def near_its_limit(slurm):
    """Submitted first of all, because Slurm knows no time limit below a minute, and looks every half minute."""
    options = ("--time=2", "--signal=B:USR1@80")
    return Job(slurm, "limit", *ENDLESS, "--dp", "2", "--keep", "100000", options=options)


def test_two_jobs_at_once_on_the_same_nodes_finish(slurm, near_its_limit, row):
    steps = ["--max_iters", "10"]
    jobs = [Job(slurm, "four", "--dp", "2", "--tp", "2", *steps, ranks=2), Job(slurm, "two", "--dp", "2", *steps)]
    for job in jobs:
        slurm.wait_for(job.number, "RUNNING", "COMPLETED")
    together = [slurm.job(job.number)["JobState"] for job in jobs]
    assert together == ["RUNNING", "RUNNING"]
    theirs = one_process(slurm, 10, batch_size=8)
    for job in jobs:
        assert slurm.wait_for(job.number, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", job.output
        assert same_curve(job.log, theirs)
    assert "hosts: alder ranks 0-1, birch ranks 2-3; between hosts: dp" in jobs[0].output
    assert "hosts: alder ranks 0, birch ranks 1; between hosts: dp" in jobs[1].output
    row("slurm finished", "both COMPLETED on ports of their own, dp 2 x tp 2 and dp 2, the curve of one process")


def test_a_requeued_job_saves_first_and_goes_on(slurm, near_its_limit, row):
    wandb = ["--wandb", "--wandb_mode", "offline"]
    job = Job(slurm, "requeue", *ENDLESS, *wandb, "--dp", "2", "--keep", "100000")
    job.until_step(5)
    assert job.saved == []
    slurm.ask("scontrol", "requeue", str(job.number))
    goes_on_where_it_was(job, job.until_resumed(), slurm)
    runs = [path.name.rpartition("-")[2] for path in (slurm.folder / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len(set(runs)) == 1, "two parts of one run"
    row("slurm requeue", "saved before srun ended, then went on in the same log and the same wandb run")


def test_a_cancelled_job_saves_and_is_not_put_back(slurm, near_its_limit, row):
    job = Job(slurm, "cancel", *ENDLESS, "--dp", "2")
    job.until_step(5)
    assert job.cancel() == "CANCELLED"
    job.until(lambda: "saved" in job.output, "checkpoint")
    assert len(job.saved) == 1 and "back in the queue" not in job.output
    assert slurm.job(job.number)["Restarts"] == "0"
    row("slurm cancel", "saved, CANCELLED, and not in the queue again")


def test_a_job_that_lost_a_node_goes_on_from_its_last_checkpoint(slurm, near_its_limit, row):
    job = Job(slurm, "node", *ENDLESS, "--dp", "2", "--save_interval", "20", "--keep", "100000", "--timeout", "20")
    job.until(lambda: job.saved, "checkpoint")
    kill_step(slurm, job.number)
    job.until(lambda: "back in the queue" in job.output, "return to the queue")
    goes_on_where_it_was(job, job.until_resumed(), slurm)
    assert int(slurm.job(job.number)["Restarts"]) >= 1
    row("slurm node", "the other node ended too, and the job went on from its last checkpoint")


def kill_step(slurm: Slurm, job: int) -> None:
    """End all processes of a job on its second node, and Slurm's own process for it, as a node that fails would."""
    victims = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            there = os.readlink(folder / "ns/pid") == os.readlink(f"/proc/{slurm.net.birch.pid}/ns/pid")
            of_job = f"SLURM_JOB_ID={job}\0".encode() in (folder / "environ").read_bytes()
            step = f"slurmstepd: [{job}." in (folder / "cmdline").read_text()
        except OSError:  # it has ended
            continue
        if there and (of_job or step):
            victims.append(int(folder.name))
    assert len(victims) >= 3, f"a step, a launcher and a rank, not {victims}"
    for victim in victims:
        os.kill(victim, signal.SIGKILL)


def test_a_job_near_its_time_limit_saves_and_goes_back_in_the_queue(slurm, near_its_limit, row):
    job = near_its_limit
    job.until(lambda: "back in the queue" in job.output, "return to the queue")
    slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")  # not again, on a machine that is slow now
    assert re.search(r"stopped by SIGUSR1: go on with --resume auto\nsaved .*step_\d+", job.output), job.output
    goes_on_where_it_was(job, job.until_resumed(), slurm)
    row("slurm limit", "warned, saved, back in the queue, and on in the same log")
