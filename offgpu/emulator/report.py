"""What a run of the emulator found, and the errors that it raises."""

from dataclasses import dataclass


class PTXError(Exception):
    """The program did something that stops the run (out of bounds, misaligned, a failed assertion, a deadlock)."""


class Unsupported(PTXError):
    """The program uses an instruction, or a form of one, that the emulator does not execute."""


@dataclass
class Finding:
    """One kind of defect at one source line, seen `count` times."""

    kind: str
    where: str
    text: str
    count: int = 1

    def __str__(self):
        return f"{self.kind} at {self.where}: {self.text} (x{self.count})"


# Findings after which nothing that follows would mean anything: the run stops.
FATAL = {"oob", "misaligned", "assert"}


class Report(list):
    """List of `Finding`s of one launch; empty means clean. `stats` holds times, counts and coverage."""

    def __init__(self):
        super().__init__()
        self.stats: dict = {}
        self._index: dict = {}

    def add(self, kind: str, where: str, text: str, count: int = 1) -> None:
        """Record a finding, or count it up if the same was seen at the same line before."""
        key = (kind, where, text.split(":")[0])
        if key in self._index:
            self[self._index[key]].count += int(count)
        else:
            self._index[key] = len(self)
            self.append(Finding(kind, where, text, int(count)))

    def kinds(self) -> list[str]:
        return sorted({finding.kind for finding in self})

    def __str__(self):
        return "\n".join(map(str, self)) or "clean"
