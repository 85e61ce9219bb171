"""The executor: runs any pipeline schedule, one stage included.

A schedule says in which order this rank computes, sends and receives (`heiretsu.parallel.schedules`); the executor only
obeys. Of the model it knows what a `Stage` states.

Sends do not block; receives are waited for where the schedule puts them. Activations go down on the axis pp, gradients
come up on pp_back, so each pair of ranks has one ordered channel for each direction and neither waits behind the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from heiretsu.parallel.mesh import Axis, Mesh
from heiretsu.parallel.metrics import Metric, Totals
from heiretsu.parallel.profiling import region
from heiretsu.parallel.schedules.actions import Action, Kind, peer


@dataclass(frozen=True)
class Context:
    """Where a microbatch belongs: what randomness is drawn from. step: of training. first_sample: index of row 0 in the
    step's global batch."""

    step: int = 0
    first_sample: int = 0


@dataclass(frozen=True)
class Microbatch:
    """A few sequences. inputs, targets: (B, T) int64."""

    inputs: torch.Tensor
    targets: torch.Tensor
    context: Context = Context()


@dataclass(frozen=True)
class StageOutput:
    """What one stage makes of one microbatch.

    hidden: for the next stage; None from the last. objective: scalar, this stage's share of what is minimised. metrics:
    this stage's share of those that it declares; one that is left out is zero.
    """

    hidden: torch.Tensor | None
    objective: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Stage(nn.Module):
    """A range of a model's layers: maps (hidden of the stage before, or None; a microbatch) to a `StageOutput`.

    metrics: of the whole model, and so the same for each of its stages. hidden_dtype: of what stages hand on.
    """

    metrics: Mapping[str, Metric]
    hidden_dtype: torch.dtype

    def hidden_shape(self, batch: Microbatch) -> tuple[int, ...]:
        """Of what stages hand on for this microbatch, the same between any two."""
        raise NotImplementedError


@dataclass
class _InFlight:
    """What a (microbatch, stage) keeps between its actions."""

    hidden_in: torch.Tensor | None = None
    out: StageOutput | None = None
    grad_out: torch.Tensor | None = None
    arriving: dist.Work | None = None
    receive: str = ""  # which receive, for the record of what this rank waits in

    def forward(self, stage: Stage, batch: Microbatch) -> None:
        self._arrived()
        if self.hidden_in is not None:
            self.hidden_in.requires_grad_(torch.is_grad_enabled())
        self.out = stage(self.hidden_in, batch)

    def backward(self, scale: float) -> None:
        self._arrived()
        roots, grads = [self.out.objective], [torch.full_like(self.out.objective, scale)]
        if self.out.hidden is not None:
            roots.append(self.out.hidden)
            grads.append(self.grad_out)
        needed = [(root, grad) for root, grad in zip(roots, grads, strict=True) if root.requires_grad]
        torch.autograd.backward([root for root, _ in needed], [grad for _, grad in needed])
        self.out = self.grad_out = None  # frees the graph

    def _arrived(self) -> None:
        if self.arriving is not None:
            with region(self.receive, waits=True):
                self.arriving.wait()
            self.arriving = None


def run_schedule(
    actions: Sequence[Action],
    stages: Sequence[Stage],
    batches: Sequence[Microbatch],
    mesh: Mesh,
    loss_scale: float = 1.0,
) -> Totals:
    """Run this rank's actions; gradients of the mean objective, times loss_scale, accumulate in the parameters.

    stages: those of this rank, the i-th being stage i * pp + pp_rank of the model. batches: one for each microbatch.
    """
    totals, sends = Totals(stages[0].metrics), _Sends()
    flights: dict[tuple[int, int], _InFlight] = {}  # (microbatch, stage)

    for action in actions:
        batch, stage = batches[action.microbatch], stages[action.stage // mesh.pp.size]
        flight = flights.setdefault((action.microbatch, action.stage), _InFlight())
        kind = action.kind
        with region(str(action), words=action.words):
            match kind:
                case Kind.RECV_FORWARD:
                    flight.hidden_in, flight.arriving = _receive(stage, batch, mesh.pp, kind)
                    flight.receive = action.words
                case Kind.FORWARD:
                    flight.forward(stage, batch)
                    totals.add(flight.out.metrics)
                case Kind.SEND_FORWARD:
                    sends.start(flight.out.hidden.detach(), mesh.pp, kind)
                case Kind.RECV_BACKWARD:
                    flight.grad_out, flight.arriving = _receive(stage, batch, mesh.pp_back, kind)
                    flight.receive = action.words
                case Kind.BACKWARD:
                    flight.backward(loss_scale / len(batches))
                case Kind.SEND_BACKWARD:
                    sends.start(flight.hidden_in.grad, mesh.pp_back, kind)
                    del flights[action.microbatch, action.stage]
                case _:
                    raise ValueError(f"{mesh.coordinates()}: the executor does not split backward, as {action} asks")
    sends.wait()
    return totals


def _receive(stage: Stage, batch: Microbatch, axis: Axis, kind: Kind):
    buffer = torch.empty(stage.hidden_shape(batch), dtype=stage.hidden_dtype, device=batch.inputs.device)
    return buffer, dist.irecv(buffer, axis.ranks[peer(kind, axis.index, axis.size)], group=axis.group)


class _Sends:
    """Sends under way; each tensor is kept alive until it has left."""

    def __init__(self):
        self.pending: list[tuple[dist.Work, torch.Tensor]] = []

    def start(self, tensor: torch.Tensor, axis: Axis, kind: Kind) -> None:
        self.pending = [(work, kept) for work, kept in self.pending if not work.is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, axis.ranks[peer(kind, axis.index, axis.size)], group=axis.group)
        self.pending.append((work, tensor))

    def wait(self) -> None:
        for work, _ in self.pending:
            with region("wait for sends", waits=True):
                work.wait()
