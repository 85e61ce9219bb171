"""When and where a run is saved: in the background, one save at a time, on all ranks alike.

`begin` returns when the state is copied. Each rank tells the others with the sums of a step whether it still writes
(`note`), and when none does, all learn how it went (`after`); `finish` waits for it. So what is said, and what is done
about a failure, happens on every rank after the same step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from heiretsu.parallel import checkpoint
from heiretsu.parallel.engine import Engine, StepReport
from heiretsu.run.config import RunConfig
from heiretsu.run.options import refuse
from heiretsu.run.state import facts_of

LONGEST_SAVE = timedelta(hours=2)
STILL_WRITING = 1 << 16  # beside the number of a signal, in what a rank tells the others


class Saver:
    """The saves of a run, into its --checkpoint_dir; without one, nothing is saved and no call does anything.

    facts: what run.json is to hold besides the config. say: prints a line, on rank 0.
    """

    def __init__(self, config: RunConfig, engine: Engine, facts: dict, say: Callable[[str], None]):
        self.config, self.engine, self.facts, self.say = config, engine, facts, say
        self.directory, self.mesh = config.checkpoint_dir, engine.mesh
        self.copies = checkpoint.Copies()
        self.group = None
        if self.directory and self.mesh.world.size > 1:
            # Of its own: messages of the saving thread must not meet those of the training. Where a process is lost
            # they fail at once, and where a machine is, the watch ends the run; where one writes slowly, they wait.
            self.group = dist.new_group(backend="gloo", timeout=LONGEST_SAVE)
        self.saving: checkpoint.Saving | None = None
        self.failed = False  # the last save did
        self.checked = self.directory is None  # whether the optimizer's state can be saved

    def begin(self, step: int) -> None:
        """Save the state after `step` steps, once the save before, if it is still being written, has ended."""
        if self.directory is None:
            return
        self.finish()
        facts = facts_of(self.engine, self.config.as_json(), self.facts)
        where = self.config.keep, self.group, self.copies, self.config.local_checkpoints
        self.saving = checkpoint.start(self.directory, step, self.engine.updater.pieces(), facts, *where)

    def note(self) -> int:
        """For `Engine.step`: whether this rank is still writing, as the step ends."""
        return STILL_WRITING if self.saving is not None and not self.saving.done() else 0

    def after(self, report: StepReport) -> None:
        """Tell of a save that has ended, in the step in which it has on every rank. After the first update, refuse an
        optimizer whose state cannot be saved, and not when hours of it are to be."""
        if not self.checked and not report.skipped:
            try:
                self.engine.updater.pieces()
            except ValueError as error:
                refuse(error)
            self.checked = True
        if self.saving is not None and not any(note & STILL_WRITING for note in report.notes):
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is on its way, and tell how it went. All ranks call it."""
        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        try:
            path = saving.result()
        except checkpoint.SaveError as error:
            self.failed = True
            if self.config.on_save_error == "stop":
                self._end(f"{error}; earlier checkpoints are untouched")
            self.say(f"warning: {error}; earlier checkpoints are untouched, and the run goes on")
            return
        self.failed = False
        self.say(f"saved {path}")
        if saving.writer.complaint:
            self.say(f"warning: {saving.writer.complaint}")

    def close(self) -> None:
        """After the last step. A run whose last state could not be saved ends with status 1."""
        self.finish()
        if self.failed:
            self._end("the last save failed")

    def _end(self, why: str) -> None:
        if self.mesh.rank == 0:
            print(f"train.py: error: {why}", file=sys.stderr, flush=True)
        sys.exit(1)
