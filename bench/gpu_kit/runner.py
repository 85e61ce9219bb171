"""Runs parts one after the other, each in processes of its own, and lets none of them take down another.

A process that dies, or whose item takes longer than it may, is ended, the item is written down as failed, and a new
process goes on behind it. A part that is over its time is ended the same way: what it wrote is there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from heiretsu.bench.gpu_kit.plan import PARTS, Group
from heiretsu.bench.gpu_kit.record import Reader, Record

ROOT = Path(__file__).parents[2]
GRACE_S = 15.0  # from the end of a part's time, when no item begins any more, until its processes are ended
FINISH_S = 5.0  # of the whole time, for the report
POLL_S = 0.1
ASK_S = 5.0  # for SIGTERM to work
RESTARTS = 20  # of one worker


@dataclass
class Worker:
    """One process, and what its lines say about it."""

    group: Group
    number: int
    command: list[str]
    log: Path
    process: subprocess.Popen = None
    item: str = ""  # under way, "" between two
    ends_by: float = 0.0  # when that item counts as hung
    begun: int = 0  # items, by this process
    restarts: int = 0
    done: bool = False


@dataclass
class Runner:
    """minutes: for everything. say: told of each failure at once. environment: more variables for the workers."""

    out: Path
    scratch: Path
    minutes: float
    rehearse: bool
    say: Callable[[str], None] = print
    grace_s: float = GRACE_S
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ends_by = time.time() + 60 * self.minutes - FINISH_S
        self.reader = Reader(self.out)
        self.workers: list[Worker] = []

    def run(self, parts: list[str]) -> None:
        try:
            for position, part in enumerate(parts):
                self._run_part(part, parts[position:])
        finally:
            self.stop()

    def stop(self) -> None:
        """End whatever still runs."""
        for worker in self.workers:
            _end(worker)

    def _run_part(self, part: str, still: list[str]) -> None:
        share = PARTS[part].minutes / sum(PARTS[name].minutes for name in still)
        seconds = max(0.0, self.ends_by - time.time()) * share
        began, writer = time.time(), Record(self.out, part, "runner")
        self.say(f"{part}: for at most {seconds:.0f} s")
        phases = PARTS[part].phases
        for position, groups in enumerate(phases):
            left = began + seconds - time.time()
            if position + 1 < len(phases):
                left /= 2  # what comes first prepares for the last
            self._run_phase(part, groups, left, writer)
        writer.write("fact", "seconds", value=round(time.time() - began, 1))
        writer.close()

    def _run_phase(self, part: str, groups: tuple[Group, ...], seconds: float, writer: Record) -> None:
        deadline = time.time() + seconds
        self.workers = []
        for group in groups:
            count = group.rehearsed if self.rehearse else max(1, min(group.workers, os.cpu_count() or 1))
            for number in range(count):
                log = self.scratch / f"{part}-{group.name}-{number}.log"
                worker = Worker(group, number, self._command(part, group, number, count), log)
                self.workers.append(worker)
                self._start(worker, deadline)
        while not all(worker.done for worker in self.workers):
            time.sleep(POLL_S)
            self._read()
            for worker in self.workers:
                if not worker.done:
                    self._look_after(worker, deadline, writer)
        self._read()
        self._keep_logs(part)

    def _command(self, part: str, group: Group, number: int, count: int) -> list[str]:
        command = [sys.executable, "-m", "heiretsu.bench.gpu_kit.worker", part, group.name]
        command += ["--worker", str(number), "--workers", str(count)]
        command += ["--out", str(self.out), "--scratch", str(self.scratch)]
        return command + ["--rehearse"] * self.rehearse

    def _start(self, worker: Worker, deadline: float) -> None:
        environment = {**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"}
        environment["TRITON_INTERPRET"] = str(int(self.rehearse and worker.group.interpreted))
        if self.rehearse:
            environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [*worker.command, "--seconds", f"{deadline - time.time():.1f}"]
        worker.item, worker.begun = "", 0
        with open(worker.log, "ab") as log:
            worker.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that what it starts can be ended with it
            )  # fmt: skip

    def _read(self) -> None:
        """Follow what the workers write: which item each is at; and say what failed."""
        for line in self.reader.new():
            worker = next(
                (w for w in self.workers if (w.group.name, w.number) == (line["group"], line["worker"])), None
            )
            if line["what"] == "begin" and worker:
                worker.item, worker.ends_by = line["name"], line["time"] + line["limit_s"]
                worker.begun += 1
            elif line["what"] == "end" and worker:
                worker.item = ""
            elif line["what"] == "failure" or (line["what"] == "check" and not line["ok"]):
                detail = line["detail"].splitlines()
                self.say(f"  FAIL {line['part']} {line['name']}: {line.get('kind', 'wrong')}: {' '.join(detail)[:300]}")

    def _look_after(self, worker: Worker, deadline: float, writer: Record) -> None:
        status, now = worker.process.poll(), time.time()
        if status is None:
            over = now > deadline + self.grace_s
            if not over and not (worker.item and now > worker.ends_by):
                return
            _end(worker)
            self._read()  # what it wrote at the last moment
            what = "the part is over its time, and it was still under way" if over else "it hung, and was ended"
            self._blame(worker, writer, "over time", what)
            worker.done = over
        elif status == 0:
            worker.done = True
        else:
            self._read()
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            if worker.item or not worker.begun:
                self._blame(worker, writer, "died", f"its process ended with {how}: {_last_line(worker.log)}")
        if not worker.done:
            worker.done = not worker.begun or worker.restarts >= RESTARTS or now > deadline
            if not worker.done:
                worker.restarts += 1
                self._start(worker, deadline)

    def _blame(self, worker: Worker, writer: Record, kind: str, detail: str) -> None:
        name = worker.item or f"{worker.group.name} {worker.number}, before its first item"
        writer.write("failure", name, kind=kind, detail=detail)
        self._read()

    def _keep_logs(self, part: str) -> None:
        with open(self.out / "log.txt", "a") as log:
            for worker in self.workers:
                if text := worker.log.read_text(errors="replace").strip():
                    log.write(f"=== {part} {worker.group.name} {worker.number}\n{text}\n")


def _end(worker: Worker) -> None:
    """End a worker and what it has started: all are in one session. torchrun wants to be asked, to end its ranks."""
    if worker.process is None or worker.process.poll() is not None:
        return
    group, asked = worker.process.pid, time.time()
    for signal_number, patience in ((signal.SIGTERM, ASK_S), (signal.SIGKILL, ASK_S)):
        try:
            os.killpg(group, signal_number)
            while time.time() < asked + patience:
                worker.process.poll()  # so that it does not stay as a zombie of the group
                os.killpg(group, 0)
                time.sleep(0.02)
        except ProcessLookupError:
            break
        asked = time.time()
    worker.process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"
