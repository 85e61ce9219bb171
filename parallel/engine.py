"""One training step on any mesh: run the schedule, reduce gradients, tell each other, step or skip together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from heiretsu.parallel.activity import ACTIVITY
from heiretsu.parallel.collectives import gather_objects
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.metrics import Totals, exchange
from heiretsu.parallel.pipeline import Microbatch, Stage, run_schedule
from heiretsu.parallel.profiling import region
from heiretsu.parallel.schedules import forward_only, lower, validate
from heiretsu.parallel.schedules.actions import Schedule
from heiretsu.parallel.updater import Updater

Metrics = dict[str, Any]  # by name: a float, or a numpy array of the metric's shape


@dataclass(frozen=True)
class StepReport:
    """A step, seen alike by every rank.

    metrics: those that the stages declare, over the global batch. grad_norm: before clipping, NaN when a gradient was
    not finite; the step was then skipped, and not_finite names the first parameter of which. loss_scale: of this step's
    backward. compute_s: seconds that each rank took for its own part, by rank, waiting left out. notes: what each rank
    had to tell the others.
    """

    metrics: Metrics
    grad_norm: float
    skipped: bool
    loss_scale: float = 1.0
    not_finite: str = ""
    compute_s: tuple[float, ...] = (0.0,)
    notes: tuple[int, ...] = (0,)


class Engine:
    """A model's stages on this rank, with all that turns microbatches into a step.

    stages: this rank's ranges of layers, one or several. schedule: of compute actions, for all stages. updater: of
    their parameters. note: set by the caller, is asked in each step for a small integer that this rank tells all
    others; it travels with the step's sums.
    """

    def __init__(self, stages: Sequence[Stage], mesh: Mesh, schedule: Schedule, updater: Updater):
        if mesh.pp.size == 1 and len(stages) > 1:
            raise ValueError(f"{len(stages)} stages on one rank: the ranks of a pipeline hand on to one another")
        self.stages, self.mesh, self.updater = stages, mesh, updater
        self.params, self.table, self.metrics = updater.params, updater.table, stages[0].metrics
        program = lower(schedule)
        validate(program)
        self.actions = program[mesh.pp.index]
        self.num_microbatches = 1 + max(action.microbatch for action in self.actions)
        self.note: Callable[[], int] = lambda: 0

    def accumulate(self, batches: Sequence[Microbatch]) -> Totals:
        """Forward and backward of all microbatches. Gradients are then global means, times the loss scale."""
        assert len(batches) == self.num_microbatches
        for stage in self.stages:
            stage.train()
        self.updater.prepare(self.num_microbatches)
        totals = run_schedule(self.actions, self.stages, batches, self.mesh, self.updater.scaler.scale)
        with region("average gradients"):
            self.updater.reduce()
        return totals

    def step(self, batches: Sequence[Microbatch]) -> StepReport:
        """One optimizer step on this rank's microbatches of the global batch. Ranks tell each other all that they must
        know of it in one all-reduce, between reducing gradients and using them; the host reads once."""
        began, waited = time.monotonic(), ACTIVITY.waited_s
        scale = self.updater.scaler.scale
        with region(f"step {batches[0].context.step + 1}"):
            totals = self.accumulate(batches)
            compute_s = time.monotonic() - began - (ACTIVITY.waited_s - waited)
            with region("optimizer"):
                squares, bad = self.updater.squares()
                shares = [squares, *totals.shares(len(batches), self.mesh), bad]
                sums, told = exchange(shares, (compute_s, self.note()), self.mesh.world)
                norm, skipped = self.updater.apply(sums[0][0], sums[-1][0])
            # By what all ranks have heard, and not by `skipped`: no rank may be alone in a collective.
            not_finite = self._first_not_finite(totals) if sums[-1][0] or not math.isfinite(sums[0][0]) else ""
        seconds, notes = zip(*told, strict=True)
        metrics = self._shaped(sums[1:-1])
        return StepReport(metrics, norm, skipped, scale, not_finite, seconds, tuple(map(int, notes)))

    def _first_not_finite(self, totals: Totals) -> str:
        """After a skip: the first parameter, in the model's order, whose reduced gradient was not finite, the ranks
        that saw it so, and those whose own part of a metric was not. A collective, of the skipped steps alone."""
        here, grads = None, self.updater.grads
        for index, stage in enumerate(self.stages):
            named = list(stage.named_parameters())
            finite = torch.stack([grads[name].isfinite().all() for name, _ in named]).tolist()
            if here is None and not all(finite):
                place = finite.index(False)
                here = index * self.mesh.pp.size + self.mesh.pp.index, place, named[place][0]
        found = gather_objects((here, totals.not_finite()), self.mesh.world)
        first = min((where for where, _ in found if where is not None), default=None)
        if first is None:
            return "the gradient's norm overflowed"
        seen = ", ".join(str(rank) for rank, (where, _) in enumerate(found) if where == first)
        said = f"the gradient of {first[2]} was not finite (rank {seen})"
        for name in self.metrics:  # the first of them; what is made of it is not finite either
            if lost := ", ".join(str(rank) for rank, (_, names) in enumerate(found) if name in names):
                return f"{said}, nor the {name} (rank {lost})"
        return said

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Microbatch]) -> Metrics:
        """The metrics of the given microbatches of all replicas; the same on every rank."""
        for stage in self.stages:
            stage.eval()
        actions = lower(forward_only(self.mesh.pp.size, len(batches), len(self.stages)))[self.mesh.pp.index]
        with region("evaluation"):
            totals = run_schedule(actions, self.stages, batches, self.mesh)
            sums, _ = exchange(totals.shares(len(batches), self.mesh), (), self.mesh.world)
        return self._shaped(sums)

    def _shaped(self, flat: Sequence[Sequence[float]]) -> Metrics:
        metrics: Metrics = {}
        for (name, metric), numbers in zip(self.metrics.items(), flat, strict=True):
            metrics[name] = np.array(numbers).reshape(metric.shape) if metric.shape else numbers[0]
        return metrics
