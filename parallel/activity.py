"""What this process is doing now, and for how long: kept by the regions that the library marks (`profiling.region`).

One record for a process, as there is one for the profiler: whoever looks asks about the process, from another thread
and while the main one may be blocked in a collective (on a GPU, backward's regions are entered by autograd's own
threads). A region that *waits* is one in which this rank needs the others: a collective, a receive. Time in those is
not its own.
"""

from __future__ import annotations

import time
from typing import NamedTuple


class Place(NamedTuple):
    """One region that has been entered. since: time.monotonic()."""

    name: str
    waits: bool
    since: float


class Activity:
    """The regions that the process is in, outermost first.

    moves: counts entries and exits, so that two equal readings mean that nothing has moved. waited_s: seconds spent in
    regions that wait, in all, those of regions inside them not counted twice.
    """

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.moves = 0
        self.waited_s = 0.0
        self.failed_waiting = False  # whether the last exception came out of a region that waits
        self._failed: tuple[int, str] = (0, "")  # that exception's id, and where it was raised
        self._left = "the start"

    def enter(self, name: str, waits: bool) -> None:
        self.moves += 1
        self.places.append(Place(name, waits, time.monotonic()))

    def leave(self, error: BaseException | None) -> None:
        if error is not None and self._failed[0] != id(error):
            self._failed = id(error), self.where()
            self.failed_waiting = any(place.waits for place in self.places)
        place = self.places.pop()
        self.moves += 1
        if place.waits and not any(outer.waits for outer in self.places):
            self.waited_s += time.monotonic() - place.since
        if not self.places:
            self._left = self._failed[1] if error is not None else f"what follows {place.name}"

    def where(self) -> str:
        """In words, innermost first: "all-reduce tp / backward of microbatch 3 / step 17"."""
        return " / ".join(place.name for place in reversed(list(self.places)))

    def last_place(self) -> str:
        """Where it is; outside of all regions, which it left last, or where the exception was raised that left it."""
        return self.where() or self._left

    def waiting_s(self) -> float:
        """Seconds for which it has been waiting for other ranks without a break; 0 if it is not."""
        since = next((place.since for place in list(self.places) if place.waits), None)
        return 0.0 if since is None else time.monotonic() - since


ACTIVITY = Activity()
