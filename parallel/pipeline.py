"""The executor: runs any pipeline schedule, one stage included.

A schedule says in which order this rank computes, sends and receives (`heiretsu.parallel.schedules`); the executor only
obeys. It knows a stage as a module that maps (hidden or None, microbatch) to a `StageOutput`.

Sends do not block; receives are waited for where the schedule puts them. Activations go down on the axis pp, gradients
come up on pp_back, so each pair of ranks has one ordered channel for each direction and neither waits behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from heiretsu.parallel.mesh import Axis, Mesh
from heiretsu.parallel.profiling import region
from heiretsu.parallel.schedules.actions import Action, Kind, peer


@dataclass(frozen=True)
class Microbatch:
    """A few sequences. inputs, targets: (B, T) int64.

    first_sample: index of row 0 in the step's global batch; step: of training. Dropout masks are functions of both.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    first_sample: int = 0
    step: int = 0


@dataclass(frozen=True)
class StageOutput:
    """What one stage makes of one microbatch.

    hidden: (B, T, C) for the next stage; None from the last. objective: scalar, this stage's share of what is minimised
    (cross-entropy on the last stage, weighted balance losses on every stage). loss: mean cross-entropy, last stage
    only.
    aux_loss: this stage's share of the balance loss, unweighted. expert_load: (MoE layers of the whole model, E) int64
    tokens of each expert, zero in the rows of other stages; None without experts.
    """

    hidden: torch.Tensor | None
    objective: torch.Tensor
    loss: torch.Tensor | None
    aux_loss: torch.Tensor
    expert_load: torch.Tensor | None


@dataclass
class Totals:
    """What the microbatches that this rank ran gave: their losses, scalars still on the device, so that nothing waits
    for it; and the sum of their expert loads."""

    losses: list[torch.Tensor] = field(default_factory=list)
    aux_losses: list[torch.Tensor] = field(default_factory=list)
    expert_load: torch.Tensor | None = None

    def add(self, out: StageOutput) -> None:
        if out.loss is not None:
            self.losses.append(out.loss.detach())
        self.aux_losses.append(out.aux_loss.detach())
        if out.expert_load is not None:
            self.expert_load = out.expert_load + (0 if self.expert_load is None else self.expert_load)


@dataclass
class _InFlight:
    """What a (microbatch, stage) keeps between its actions."""

    hidden_in: torch.Tensor | None = None
    out: StageOutput | None = None
    grad_out: torch.Tensor | None = None
    arriving: dist.Work | None = None
    receive: str = ""  # which receive, for the record of what this rank waits in

    def forward(self, stage: nn.Module, batch: Microbatch) -> None:
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
    stages: Sequence[nn.Module],
    batches: Sequence[Microbatch],
    mesh: Mesh,
    hidden_size: int,
    hidden_dtype: torch.dtype,
    loss_scale: float = 1.0,
) -> Totals:
    """Run this rank's actions; gradients of the mean objective, times loss_scale, accumulate in the parameters.

    stages: those of this rank, the i-th being stage i * pp + pp_rank of the model. batches: one for each microbatch.
    """
    totals, sends = Totals(), _Sends()
    flights: dict[tuple[int, int], _InFlight] = {}  # (microbatch, stage)
    last_stage = len(stages) * mesh.pp.size - 1

    for action in actions:
        kind, microbatch, stage = action
        flight = flights.setdefault((microbatch, stage), _InFlight())
        batch = batches[microbatch]
        with region(str(action), words=action.words):
            match kind:
                case Kind.RECV_FORWARD:
                    flight.hidden_in, flight.arriving = _receive(batch, hidden_size, hidden_dtype, mesh.pp, kind)
                    flight.receive = action.words
                case Kind.FORWARD:
                    if mesh.pp.size == 1 and stage > 0:  # from the stage before, on this rank
                        flight.hidden_in = flights[microbatch, stage - 1].out.hidden.detach()
                    flight.forward(stages[stage // mesh.pp.size], batch)
                    totals.add(flight.out)
                case Kind.SEND_FORWARD:
                    sends.start(flight.out.hidden.detach(), mesh.pp, kind)
                case Kind.RECV_BACKWARD:
                    flight.grad_out, flight.arriving = _receive(batch, hidden_size, hidden_dtype, mesh.pp_back, kind)
                    flight.receive = action.words
                case Kind.BACKWARD:
                    if mesh.pp.size == 1 and stage < last_stage:
                        flight.grad_out = flights[microbatch, stage + 1].hidden_in.grad
                    flight.backward(loss_scale / len(batches))
                case Kind.SEND_BACKWARD:
                    sends.start(flight.hidden_in.grad, mesh.pp_back, kind)
                    del flights[microbatch, stage]
                case _:
                    raise ValueError(f"{mesh.coordinates()}: the executor does not split backward, as {action} asks")
    sends.wait()
    return totals


def _receive(batch: Microbatch, hidden_size: int, dtype: torch.dtype, axis: Axis, kind: Kind):
    buffer = torch.empty(*batch.inputs.shape, hidden_size, dtype=dtype, device=batch.inputs.device)
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
