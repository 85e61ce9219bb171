"""One training step on any mesh: run the schedule, average gradients, agree on the norm, step or skip together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from heiretsu.parallel.activity import ACTIVITY
from heiretsu.parallel.collectives import gather_objects, sum_numbers
from heiretsu.parallel.data import BUCKET_BYTES, GradientAverager
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.optimizer import LossScaler, gradient_norm
from heiretsu.parallel.pipeline import Microbatch, Totals, run_schedule
from heiretsu.parallel.placement import Table, placement_table
from heiretsu.parallel.profiling import region
from heiretsu.parallel.schedules import forward_only, lower, validate
from heiretsu.parallel.schedules.actions import Schedule


@dataclass(frozen=True)
class StepReport:
    """A step, seen alike by every rank. Means over the global batch; expert_load is None without experts.

    loss: cross-entropy, in nats. aux_loss: balance loss, mean over the MoE layers. grad_norm: before clipping, NaN
    when a gradient was not finite; the step was then skipped, and not_finite names the first parameter of which.
    loss_scale: of this step's backward. expert_load: (MoE layers, E) tokens of the global batch. compute_s: seconds
    that each rank took for its own part, by rank, waiting left out. notes: what each rank had to tell the others.
    """

    loss: float
    aux_loss: float
    grad_norm: float
    skipped: bool
    loss_scale: float = 1.0
    expert_load: torch.Tensor | None = None
    not_finite: str = ""
    compute_s: tuple[float, ...] = (0.0,)
    notes: tuple[int, ...] = (0,)


def no_note() -> int:
    return 0


class Engine:
    """A model's stages on this rank, with all that turns microbatches into a step.

    stages: this rank's ranges of layers, one or several. hidden_size, hidden_dtype: of what travels
    between stages. schedule: of compute actions, for all stages. grad_clip: largest gradient norm, 0 for no clipping.
    optimizer: made by the caller over `engine.params`. note: set by the caller, is asked at the end of each step for a
    small integer that this rank tells all others; it travels with the step's sums.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        mesh: Mesh,
        hidden_size: int,
        hidden_dtype: torch.dtype,
        num_microbatches: int,
        schedule: Schedule,
        grad_clip: float = 0.0,
        scaler: LossScaler | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self.stages, self.mesh = stages, mesh
        self.hidden_size, self.hidden_dtype = hidden_size, hidden_dtype
        self.num_microbatches, self.grad_clip, self.scaler = num_microbatches, grad_clip, scaler or LossScaler()
        self.params = {name: param for stage in stages for name, param in stage.named_parameters()}
        self.table: Table = {name: place for stage in stages for name, place in placement_table(stage, mesh).items()}
        self.averager = GradientAverager(self.params, self.table, bucket_bytes)
        program = lower(schedule)
        validate(program)
        self.actions = program[mesh.pp.index]
        self.optimizer: torch.optim.Optimizer | None = None
        self.note: Callable[[], int] = no_note

    @property
    def grads(self) -> dict[str, torch.Tensor]:
        return {name: param.grad for name, param in self.params.items()}

    def accumulate(self, batches: Sequence[Microbatch]) -> Totals:
        """Forward and backward of all microbatches. Gradients are then global means, times the loss scale."""
        assert len(batches) == self.num_microbatches
        for stage in self.stages:
            stage.train()
        self.averager.prepare(self.num_microbatches)
        totals = self._run(self.actions, batches, self.scaler.scale)
        with region("average gradients"):
            self.averager.finish()
        return totals

    def step(self, batches: Sequence[Microbatch]) -> StepReport:
        """One optimizer step on this rank's microbatches of the global batch."""
        began, waited = time.monotonic(), ACTIVITY.waited_s
        with region(f"step {batches[0].step + 1}"):
            totals = self.accumulate(batches)
            compute_s = time.monotonic() - began - (ACTIVITY.waited_s - waited)
            scale = self.scaler.scale
            with region("optimizer"):
                norm = gradient_norm(self.grads, self.table, self.mesh) / scale
                skipped = not math.isfinite(norm)
                if not skipped:
                    self._apply(norm)
            self.scaler.update(skipped)
            told = [compute_s, self.note(), skipped]
            loss, aux_loss, expert_load, by_rank = self._means(totals, len(batches), told)
            seconds, notes, skips = zip(*by_rank, strict=True)
            # By what all ranks have just heard, and not by `skipped`: no rank may be alone in a collective.
            not_finite = self._first_not_finite(totals) if any(skips) else ""
        notes = tuple(map(int, notes))
        return StepReport(loss, aux_loss, norm, skipped, scale, expert_load, not_finite, seconds, notes)

    def _first_not_finite(self, totals: Totals) -> str:
        """After a skip: the first parameter, in the model's order, whose averaged gradient was not finite, the ranks
        that saw it so, and those whose own loss was not finite. A collective, of the skipped steps alone."""
        here = None
        for index, stage in enumerate(self.stages):
            named = list(stage.named_parameters())
            finite = torch.stack([param.grad.isfinite().all() for _, param in named]).tolist()
            if here is None and not all(finite):
                place = finite.index(False)
                here = index * self.mesh.pp.size + self.mesh.pp.index, place, named[place][0]
        found = gather_objects((here, math.isfinite(_sum(totals.losses))), self.mesh.world)
        first = min((where for where, _ in found if where is not None), default=None)
        if first is None:
            return "the gradient's norm overflowed"
        seen = ", ".join(str(rank) for rank, (where, _) in enumerate(found) if where == first)
        lost = ", ".join(str(rank) for rank, (_, finite) in enumerate(found) if not finite)
        return f"the gradient of {first[2]} was not finite (rank {seen})" + (
            f", nor the loss (rank {lost})" * bool(lost)
        )

    def _apply(self, norm: float) -> None:
        factor = min(1.0, self.grad_clip / (norm + 1e-6)) if self.grad_clip > 0 else 1.0
        factor /= self.scaler.scale
        if factor != 1.0:
            self.averager.scale(factor)
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Microbatch]) -> float:
        """Mean cross-entropy over the given microbatches of all replicas; the same number on every rank."""
        for stage in self.stages:
            stage.eval()
        actions = lower(forward_only(self.mesh.pp.size, len(batches), len(self.stages)))[self.mesh.pp.index]
        with region("evaluation"):
            return self._means(self._run(actions, batches, 1.0), len(batches))[0]

    def _run(self, actions, batches, loss_scale) -> Totals:
        return run_schedule(
            actions, self.stages, batches, self.mesh, self.hidden_size, self.hidden_dtype, loss_scale=loss_scale
        )

    def _means(self, totals: Totals, num_microbatches: int, told: Sequence[float] = ()):
        """Global mean loss, balance loss and expert loads, from every stage of every replica; tp ranks hold copies.

        told: a few numbers of this rank; those of all ranks, by rank, come fourth.
        """
        sums = [
            _sum(losses) / (num_microbatches * self.mesh.replica.size) for losses in (totals.losses, totals.aux_losses)
        ]
        loads, world = totals.expert_load, self.mesh.world
        mine = sums if loads is None else [*sums, *loads.flatten().tolist()]
        mine = mine if self.mesh.tp.index == 0 else [0.0] * len(mine)
        slots = [0.0] * (world.size * len(told))
        slots[world.index * len(told) : (world.index + 1) * len(told)] = map(float, told)
        loss, aux_loss, *rest = sum_numbers([*mine, *slots], world, self.mesh.device)
        counts, slots = rest[: len(mine) - 2], rest[len(mine) - 2 :]
        by_rank = [slots[len(told) * rank : len(told) * (rank + 1)] for rank in range(world.size)]
        if loads is not None:
            loads = torch.tensor(counts, dtype=torch.long, device="cpu").view_as(loads)
        return loss, aux_loss, loads, by_rank


def _sum(scalars: Sequence[torch.Tensor]) -> float:
    """Their sum in float64: the only place where a step waits for the losses."""
    return sum(torch.stack(list(scalars)).tolist()) if scalars else 0.0
