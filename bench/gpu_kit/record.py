"""The file that every process of a run appends to: JSON lines, each whole as soon as it is known.

Every line has part, group, worker, time (seconds since 1970), what and name. `what` is one of

    begin, end  an item is under way; what of it is missing between the two tells who died where. begin: limit_s
    fact        value: text about the machine
    figure      value, unit, and whatever else belongs to it
    check       ok: a yes-or-no answer; detail: why not
    finding     detail: a disagreement between what was said beforehand and what the device says. No fault by itself
    absent      why: left out, with a word
    failure     kind (wrong, error, fault, out of memory, died, over time), detail
"""

import json
import os
import time
from pathlib import Path

FILE = "figures.jsonl"


class Record:
    """Appends to `folder`/figures.jsonl for one worker. Safe with several processes: each line is one write."""

    def __init__(self, folder: Path, part: str, group: str = "", worker: int = 0):
        self.stamp = {"part": part, "group": group, "worker": worker}
        self.fd = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, what: str, name: str, **fields) -> None:
        line = {**self.stamp, "time": round(time.time(), 3), "what": what, "name": name, **fields}
        os.write(self.fd, (json.dumps(line, default=str) + "\n").encode())

    def close(self) -> None:
        os.close(self.fd)


class Reader:
    """Reads the lines that came since the last call; a line that is half written is left for the next."""

    def __init__(self, folder: Path):
        self.path, self.offset = Path(folder) / FILE, 0

    def new(self) -> list[dict]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [line for text in whole.splitlines() if (line := _parse(text)) is not None]


def read(folder: Path) -> list[dict]:
    """Every whole line."""
    return Reader(folder).new()


def _parse(text: bytes) -> dict | None:
    try:
        line = json.loads(text)
    except ValueError:  # a process died within its write
        return None
    return line if isinstance(line, dict) and {"part", "what", "name"} <= line.keys() else None
