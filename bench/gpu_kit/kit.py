"""What an item of a part is given: the device, the sizes to work at, and a place to write what it finds."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from heiretsu.bench.gpu_kit import record
from heiretsu.bench.gpu_kit.device import Device
from heiretsu.bench.timing import Roofline

ROOT = Path(__file__).parents[2]
LONG_S = 300.0  # for an item that starts programs of its own


@dataclass(frozen=True)
class Item:
    """A piece of work that may fail by itself. limit_s: after which it counts as hung, and its process is ended.

    A rehearsal multiplies the limit: it shares its machine with who knows what.
    """

    name: str
    run: Callable[[], None]
    limit_s: float = 90.0


class Kit:
    """deadline: of time.time(); no item begins after it. scratch: a folder that is gone after the run."""

    def __init__(self, out: Path, scratch: Path, device: Device, rehearse: bool, seconds: float, writer: record.Record):
        self.out, self.scratch, self.device, self.rehearse = out, scratch, device, rehearse
        self.deadline, self.writer = time.time() + seconds, writer
        self.torch_device = device.torch_device
        self.item = ""  # its name, for what it writes
        self.clock_s = time.perf_counter

    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def fact(self, name: str, value: object) -> None:
        self.writer.write("fact", name, value=value)

    def figure(self, name: str, value: float | None, unit: str, **more) -> None:
        self.writer.write("figure", name, value=value, unit=unit, item=self.item, **more)

    def check(self, ok: bool, detail: str = "", name: str = "", **more) -> None:
        """A yes-or-no answer about the current item."""
        self.writer.write("check", name or self.item, ok=bool(ok), detail=detail, **more)

    def finding(self, detail: str, name: str = "") -> None:
        self.writer.write("finding", name or self.item, detail=detail)

    def absent(self, name: str, why: str) -> None:
        self.writer.write("absent", name, why=why)

    def failure(self, kind: str, detail: str, name: str = "") -> None:
        self.writer.write("failure", name or self.item, kind=kind, detail=detail)

    def recorded(self, part: str, what: str) -> list[dict]:
        """What another part has written."""
        return [line for line in record.read(self.out) if line["part"] == part and line["what"] == what]

    def roofline(self) -> Roofline | None:
        """As `facts` measured it; None where that part did not run."""
        found = {line["name"]: line["value"] for line in self.recorded("facts", "figure")}
        if {"copy bandwidth", "matrix rate"} <= found.keys():
            return Roofline(found["copy bandwidth"], found["matrix rate"])
        return None

    def environment(self, **more: str) -> dict[str, str]:
        """For a program of the repository that an item starts."""
        return {**os.environ, "PYTHONUNBUFFERED": "1", **({"OMP_NUM_THREADS": "1"} if self.rehearse else {}), **more}

    @property
    def python(self) -> str:
        return sys.executable

    @contextlib.contextmanager
    def named(self, name: str):
        before, self.item = self.item, name
        try:
            yield
        finally:
            self.item = before
