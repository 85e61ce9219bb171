"""Signals that ask a run to stop: the step is finished, a checkpoint saved, and the run ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "Ctrl-C"}


class StopSignal:
    """What this process was asked; one rank's number, told to the others with a step's sums, stops all of them.

    A cluster sends SIGTERM before it takes a machine away, Slurm what its --signal names. A second Ctrl-C ends the
    process at once. One process that has nowhere to save has nothing to finish: SIGTERM and SIGUSR1 end it as ever.
    """

    def __init__(self, can_save: bool, num_ranks: int):
        self.received = 0
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS if can_save or num_ranks > 1 else [signal.SIGINT]:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and background jobs want it
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def note(self) -> int:
        """For `Engine.step`, which asks at the end of the step."""
        return self.received


def stopped_by(notes: Iterable[int]) -> int:
    """The signal that any rank has received; 0 for none. notes: of a step's report."""
    return next((note for note in notes if note), 0)
