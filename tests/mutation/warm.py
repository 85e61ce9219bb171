"""A warm process in a copy of the tree, which forks a child for each bundle of tests.

It has imported what takes seconds (torch, transformers, pytest) and nothing of heiretsu: each child imports the copy's
own files, edited or not. Jobs come as JSON lines on standard input, answers go as JSON lines to standard output:

    {"files": {path: text}, "tests": {file: [node id, ...]}, "limits": {node id: seconds},
     "other_limit": seconds, "marks": pytest's -m, "trace": folder or null, "functions": names of tests or null}
    {"verdict": "green" | "red" | "hung" | "broken", "test": node id, "why": one line, "seconds": {node id: seconds},
     "failed": {node id: why}}

files: what the copy's files hold for this job alone. A test that runs past its limit is killed with everything that it
started. The process ends when its standard input does, and takes the copy with it.

    python warm.py FOLDER_OF_THE_COPY MODULE_TO_IMPORT ...
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import json
import multiprocessing.util
import os
import select
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import hypothesis
import pytest

_SET_CHILD_SUBREAPER = 36  # linux/prctl.h: orphans of a child become ours


def main() -> None:
    folder, *names = sys.argv[1:]
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed by accident is no answer
    try:
        for line in sys.stdin:
            print(json.dumps(run(json.loads(line))), file=answers, flush=True)
    finally:
        _kill_descendants()
        shutil.rmtree(folder, ignore_errors=True)


def run(job: dict) -> dict:
    saved = {path: (Path(path).read_text(), os.stat(path)) for path in job["files"]}
    try:
        for path, text in job["files"].items():
            Path(path).write_text(text)
            # Compiled files are told apart by size and by whole seconds.
            os.utime(path, (time.time(), next(_seconds)))
        return _in_child(job)
    finally:
        for path, (text, status) in saved.items():
            Path(path).write_text(text)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


_seconds = itertools.count(int(time.time()))


def _in_child(job: dict) -> dict:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            status = _run_tests(job, writer)
        except BaseException:  # whatever it is, it is the parent's to report
            os.write(writer, f"broken\t\t{traceback.format_exc(limit=-3)!r}\n".encode())
            status = 3
        os._exit(status)
    os.close(writer)
    try:
        return _watch(pid, reader, job["limits"], job["other_limit"])
    finally:
        os.close(reader)
        _kill_descendants()


def _watch(pid: int, reader: int, limits: dict[str, float], other_limit: float) -> dict:
    """Follow the child's words until it ends, or until a test takes too long."""
    words, test = b"", "collection"
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    # The first that went wrong, and what there is to know of all.
    seen = {"verdict": "green", "test": "", "why": "", "seconds": seconds, "failed": failed}
    deadline = time.monotonic() + other_limit
    while True:
        ready, _, _ = select.select([reader, 0], [], [], 0.1)
        if 0 in ready:
            sys.exit()  # nobody waits for the answer any more
        if time.monotonic() > deadline:
            failed[test] = "time limit"
            return seen | {"verdict": "hung", "test": test, "why": "time limit"}
        piece = os.read(reader, 65536) if ready else b""
        words += piece
        *lines, words = words.split(b"\n")
        for line in lines:
            kind, name, text = line.decode(errors="replace").split("\t")
            if kind == "start":
                test = name
                deadline = time.monotonic() + limits.get(name, other_limit)
            elif kind == "end":
                seconds[name] = float(text)
            else:
                failed[name] = text
                if seen["verdict"] == "green":
                    seen |= {"verdict": kind, "test": name, "why": text}
        if not piece and _ended(pid):
            break
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if seen["verdict"] == "green" and status not in (0, 5):  # 5: no tests were collected
        failed[test] = f"the process ended with status {status}"
        seen |= {"verdict": "red", "test": test, "why": failed[test]}
    return seen


def _ended(pid: int) -> bool:
    """The child ended although a process that it left holds the pipe."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_descendants() -> None:
    """Kill and reap all that descends from this process, orphans too."""
    while True:
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if fields[0] != "Z" or int(fields[1]) == os.getpid():
                    parents[int(stat.parent.name)] = int(fields[1])
        ours = {os.getpid()}
        while more := {child for child, parent in parents.items() if parent in ours} - ours:
            ours |= more
        for pid in ours - {os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.01)
        except ChildProcessError:
            return


def _run_tests(job: dict, writer: int) -> int:
    os.register_at_fork(after_in_child=lambda: os.close(writer))
    multiprocessing.util.spawnv_passfds = _fork_the_fork_server
    log = os.open("pytest.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    hypothesis.settings.register_profile("unhurried", deadline=None)  # a tracer and other edits take their time
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    options += ["--hypothesis-profile=unhurried", "-m", job["marks"]]
    plugins: list = [_Reporter(job, writer)]
    if job["trace"]:
        plugins.append(_Tracing(job["trace"]))
    else:
        options.append("-x")
    return int(pytest.main([*options, *job["tests"]], plugins=plugins))


class _Reporter:
    """Selects and orders the tests, and says what happens to them."""

    def __init__(self, job: dict, writer: int):
        self.writer = writer
        self.wanted = {test: place for place, test in enumerate(t for tests in job["tests"].values() for t in tests)}
        self.functions = job["functions"]
        self.seconds: dict[str, float] = {}

    def say(self, kind: str, test: str, text: str = "") -> None:
        clean = text.replace("\t", " ").replace("\n", " ")
        os.write(self.writer, f"{kind}\t{test}\t{clean[:300]}\n".encode())

    def pytest_collectreport(self, report):
        if report.failed:
            self.say("red", report.nodeid, _reason(report))

    def pytest_collection_modifyitems(self, config, items):
        if self.functions is not None:
            items[:] = [item for item in items if item.originalname in self.functions]
        if self.wanted:
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.wanted])
            items[:] = [item for item in items if item.nodeid in self.wanted]
            items.sort(key=lambda item: self.wanted[item.nodeid])

    def pytest_runtest_logstart(self, nodeid):
        self.say("start", nodeid)
        self.seconds[nodeid] = 0.0

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.say("red", report.nodeid, _reason(report))
        if report.when == "teardown":
            self.say("end", report.nodeid, str(self.seconds[report.nodeid]))


class _Tracing:
    """Tells the tracer which test runs. What fixtures of a wider scope do belongs to every test of the file."""

    def __init__(self, folder: str):
        import sitecustomize

        os.environ["MUTATION_TRACE"] = folder  # for the processes that the tests start
        Path(folder, "test").write_text("")
        self.tracer = sitecustomize.Tracer(folder)

    def pytest_collectstart(self, collector):
        self.tracer.begin(collector.nodeid.partition("::")[0])

    def pytest_runtest_logstart(self, nodeid):
        self.tracer.begin(nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        test = self.tracer.test
        if fixturedef.scope != "function":
            self.tracer.begin(request.node.nodeid.partition("::")[0] or test.partition("::")[0])
        try:
            return (yield)
        finally:
            self.tracer.begin(test)


def _reason(report) -> str:
    text = str(report.longrepr)
    return next((line[1:].strip() for line in text.splitlines() if line.startswith("E")), text[-200:])


_spawn = multiprocessing.util.spawnv_passfds


def _fork_the_fork_server(path, args, passfds):
    """Instead of a new interpreter, which would import torch again."""
    program = os.fsdecode(args[-1])
    if "forkserver" not in program:
        return _spawn(path, args, passfds)
    pid = os.fork()
    if pid == 0:
        try:
            signal.set_wakeup_fd(-1)
            exec(program, {})
        finally:
            os._exit(1)
    return pid


if __name__ == "__main__":
    main()
