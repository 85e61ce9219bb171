"""From accumulated gradients to new parameters: reduction, the global norm, clipping, the loss scale, the agreed skip.

Any optimizer of torch's kind does; the caller's function makes it from parameter groups. Every decision is taken from
numbers that one all-reduce over the whole world has made equal on all ranks, so that all ranks step or all ranks skip.
What a checkpoint holds of all this are pieces and facts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from heiretsu.parallel.data import GradientAverager
from heiretsu.parallel.metrics import widened
from heiretsu.parallel.placement import Piece, Table

BLOCK = 1024  # elements whose squares are added up in one go

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass
class LossScaler:
    """Dynamic loss scale for float16 (Micikevicius et al. 2018, arXiv:1710.03740). scale 1 and growth 0: no scaling."""

    scale: float = 1.0
    growth: int = 0  # good steps before the scale doubles; 0 keeps it
    good_steps: int = 0

    def update(self, found_inf: bool) -> None:
        if not self.growth:
            return
        if found_inf:
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth:
            self.scale, self.good_steps = self.scale * 2, 0


class Updater:
    """Owns the gradients, the optimizer and its state. A step: `prepare`, the backward passes, `reduce`, `squares`,
    whose sums over all ranks go to `apply`.

    params, table: of this rank, by name; each has a gradient in every step. make_optimizer: of the groups that
    `optimizer_groups` makes. grad_clip: largest gradient norm, 0 for no clipping. steps: that the optimizer has taken.
    """

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        table: Table,
        make_optimizer: MakeOptimizer,
        grad_clip: float = 0.0,
        scaler: LossScaler | None = None,
    ):
        self.params, self.table, self.grad_clip, self.scaler = params, table, grad_clip, scaler or LossScaler()
        self.averager = GradientAverager(params, table)
        self.optimizer = make_optimizer(optimizer_groups(params, table))
        self.steps = 0
        device = next(iter(params.values())).device
        self._owned = torch.tensor([table[name].is_owner for name in params], device=device)

    @property
    def grads(self) -> dict[str, torch.Tensor]:
        return {name: param.grad for name, param in self.params.items()}

    def prepare(self, num_microbatches: int) -> None:
        """Zero all gradients; each is complete after so many backward passes."""
        self.averager.prepare(num_microbatches)

    def reduce(self) -> None:
        """After the last backward pass: gradients are then global means, times the loss scale, on every rank."""
        self.averager.finish()

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(1,) float64 each, left on the device: this rank's share of the gradient's squared norm, in which each
        element counts on the rank that the table calls its owner; and how many gradients here are not finite."""
        norms = torch.stack([two_norm(grad) for grad in self.grads.values()])
        owned = widened(norms.where(self._owned, 0.0))
        return (owned * owned).cumsum(0)[-1:], widened((~norms.isfinite()).sum()[None])

    def apply(self, squares: float, num_not_finite: float) -> tuple[float, bool]:
        """Step, or skip where the norm is not finite. Takes what `squares` gave, added over all ranks; returns the
        gradient's norm before clipping, and whether the step was skipped."""
        norm = math.nan if num_not_finite else math.sqrt(squares) / self.scaler.scale
        skipped = not math.isfinite(norm)
        if not skipped:
            factor = min(1.0, self.grad_clip / (norm + 1e-6)) if self.grad_clip > 0 else 1.0
            factor /= self.scaler.scale
            if factor != 1.0:
                self.averager.scale(factor)
            self.optimizer.step()
            self.steps += 1
        self.scaler.update(skipped)
        return norm, skipped

    def pieces(self, counts: bool = False) -> dict[str, Piece]:
        """Parameters as model/NAME, the optimizer's tensors of a parameter's shape as STATE/NAME; no copies.

        counts: also each parameter's step count, which is one for all, and a fact. ValueError for an optimizer that
        keeps anything else.
        """
        found = {}
        for name, param in self.params.items():
            found[f"model/{name}"] = Piece(param.detach(), self.table[name])
            for key, value in self.optimizer.state.get(param, {}).items():
                is_tensor, is_count = isinstance(value, torch.Tensor), key == "step"
                if not is_count and not (is_tensor and value.shape == param.shape):
                    kept = f"{type(self.optimizer).__name__} keeps {key} for {name}"
                    raise ValueError(f"{kept}: only tensors of a parameter's shape and step counts can be saved")
                if is_tensor and (counts or not is_count):
                    found[f"{key}/{name}"] = Piece(value, self.table[name])
        return found

    def facts(self) -> dict[str, Any]:
        """What there is to save besides the pieces, as JSON."""
        return {"optimizer_steps": self.steps, "scaler": asdict(self.scaler)}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take over saved facts; `pieces` are then those of a run of so many steps, for their saved values to be
        written into. A loss scale that grows otherwise than this run's is left out."""
        self.steps = facts["optimizer_steps"]
        if self.steps:  # there is no state before the first step
            self._make_state()
        for state in self.optimizer.state.values():
            if isinstance(count := state.get("step"), torch.Tensor):
                count.fill_(self.steps)
            elif count is not None:
                state["step"] = self.steps
        if facts["scaler"]["growth"] == self.scaler.growth:
            self.scaler = LossScaler(**facts["scaler"])

    def _make_state(self) -> None:
        """The optimizer's state as it makes it by itself, in a step that changes nothing."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def optimizer_groups(params: dict[str, nn.Parameter], table: Table) -> list[dict[str, Any]]:
    """Parameter groups for torch.optim: weights decay by what the optimizer is told, biases and norms do not."""
    decayed = [param for name, param in params.items() if table[name].spec.decay]
    others = [param for name, param in params.items() if not table[name].spec.decay]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def two_norm(x: torch.Tensor) -> torch.Tensor:
    """The 2-norm of x, a scalar in its dtype: of the norms of blocks, so that no sum in float32 is long.

    A CPU's vector_norm of 40 million float32 is off by up to 2%, and one that casts to float64 takes 18 times as long.
    """
    x = x.flatten()
    if len(x) <= BLOCK:
        return torch.linalg.vector_norm(x)
    whole, rest = x[: len(x) - len(x) % BLOCK], x[len(x) - len(x) % BLOCK :]
    norms = torch.linalg.vector_norm(whole.view(-1, BLOCK), dim=1)
    return two_norm(torch.cat([norms, torch.linalg.vector_norm(rest)[None]]))
