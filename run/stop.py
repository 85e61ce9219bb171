"""Why a run ends before its last step, on all ranks alike: a signal, numbers that stay bad, replicas that differ."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from types import FrameType

from heiretsu.parallel.engine import StepReport
from heiretsu.run.config import RunConfig
from heiretsu.run.watch import GAVE_UP

SIGNAL = 0xFF  # of what a rank tells the others, the part that is a signal's number
_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "Ctrl-C"}


@dataclass(frozen=True)
class Ending:
    """why: a line for the log. status: of the processes. saves: whether what the run has come to is worth keeping."""

    why: str
    status: int
    saves: bool


class Stop:
    """Signals and numbers that end a run. One rank's signal reaches the others with a step's sums (`note`).

    A cluster sends SIGTERM before it takes a machine away, Slurm what its --signal names: the step is finished, a
    checkpoint saved, status 0. A second Ctrl-C ends the process at once. One process that has nowhere to save has
    nothing to finish: SIGTERM and SIGUSR1 end it as ever.
    """

    def __init__(self, config: RunConfig):
        self.config, self.received, self.skips = config, 0, 0
        self.can_save = config.checkpoint_dir is not None
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS if self.can_save or config.num_ranks > 1 else [signal.SIGINT]:
            # A shell has what it runs in the background ignore Ctrl-C; train.sbatch has all on the way to the ranks
            # ignore SIGUSR1.
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def close(self) -> None:
        """No more signals are waited for. A warning may come again, and finds Python, at its end, without its handlers:
        it would then kill a run that is over."""
        if signal.getsignal(signal.SIGUSR1) == self._receive:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def note(self) -> int:
        """For `Engine.step`, which asks at the end of the step."""
        return self.received

    def after(self, report: StepReport, differing: str = "") -> Ending | None:
        """How the run ends after this step, if it does. differing: what `first_difference` found."""
        self.skips = self.skips + 1 if report.skipped else 0
        if differing:
            return Ending(f"replicas differ: {differing}; nothing is saved of it", GAVE_UP, saves=False)
        if self.skips == self.config.max_skips:
            why = f"{self.skips} steps in a row were skipped (--max_skips): the last because {report.not_finite}"
            return Ending(why, GAVE_UP, self.can_save)
        number = next((note & SIGNAL for note in report.notes if note & SIGNAL), 0)
        if not number:
            return None
        why = f"stopped by {_SIGNALS[signal.Signals(number)]}"
        if self.can_save:
            return Ending(f"{why}: go on with --resume auto", 0, saves=True)
        return Ending(f"{why}: nothing is saved without --checkpoint_dir", 128 + number, saves=False)
