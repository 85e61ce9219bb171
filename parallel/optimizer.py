"""From averaged gradients to new parameters: the global norm, clipping, the loss scale and the agreed skip.

Every decision here is taken from numbers that one all-reduce over the whole world has made equal on all ranks, so that
all ranks step or all ranks skip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from heiretsu.parallel.collectives import all_reduce
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.placement import Table


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


def gradient_norm(grads: dict[str, torch.Tensor], table: Table, mesh: Mesh) -> torch.Tensor:
    """The 2-norm of the whole model's gradient, a float64 scalar, equal on every rank.

    Each element counts once, on the rank that the table calls its owner; NaN or inf anywhere makes it non-finite
    everywhere.
    """
    squares = torch.zeros(
        2, dtype=torch.float64, device=mesh.device
    )  # sum of owned squares, non-finite values anywhere
    for name, grad in grads.items():
        square = torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2
        if table[name].is_owner:
            squares[0] += square
        squares[1] += (~square.isfinite()).double()
    squares = all_reduce(squares, mesh.world)
    return torch.where(squares[1] > 0, math.nan, squares[0].sqrt())


def optimizer_groups(params: dict[str, torch.nn.Parameter], table: Table, weight_decay: float) -> list[dict]:
    """Parameter groups for torch.optim: weights decay, biases and norms do not."""
    decayed = [param for name, param in params.items() if table[name].spec.decay]
    others = [param for name, param in params.items() if not table[name].spec.decay]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
