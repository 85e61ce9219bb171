"""From averaged gradients to new parameters: the global norm, clipping, the loss scale and the agreed skip.

Every decision here is taken from numbers that one all-reduce over the whole world has made equal on all ranks, so that
all ranks step or all ranks skip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from heiretsu.parallel.collectives import sum_numbers
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.placement import Table
from heiretsu.parallel.profiling import region

PIECE = 1024  # elements whose squares are added up in one go


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


def gradient_norm(grads: dict[str, torch.Tensor], table: Table, mesh: Mesh) -> float:
    """The 2-norm of the whole model's gradient, equal on every rank.

    Each element counts once, on the rank that the table calls its owner; NaN or inf anywhere, or a square that
    overflows, makes it NaN everywhere.
    """
    with region("norms of the gradients", waits=mesh.device.type == "cuda"):  # for all that was launched before
        norms = torch.stack([two_norm(grad) for grad in grads.values()]).tolist()
    owned = sum(norm * norm for name, norm in zip(grads, norms, strict=True) if table[name].is_owner)
    bad = float(sum(not math.isfinite(norm) for norm in norms))
    total, bad = sum_numbers([owned, bad], mesh.world, mesh.device)
    return math.nan if bad else math.sqrt(total)


def two_norm(x: torch.Tensor) -> torch.Tensor:
    """The 2-norm of x, a scalar in its dtype: of the norms of pieces, so that no sum in float32 is long.

    A CPU's vector_norm of 40 million float32 is off by up to 2%, and one that casts to float64 takes 18 times as long.
    """
    x = x.flatten()
    if len(x) <= PIECE:
        return torch.linalg.vector_norm(x)
    whole, rest = x[: len(x) - len(x) % PIECE], x[len(x) - len(x) % PIECE :]
    norms = torch.linalg.vector_norm(whole.view(-1, PIECE), dim=1)
    return two_norm(torch.cat([norms, torch.linalg.vector_norm(rest)[None]]))


def optimizer_groups(params: dict[str, torch.nn.Parameter], table: Table, weight_decay: float) -> list[dict]:
    """Parameter groups for torch.optim: weights decay, biases and norms do not."""
    decayed = [param for name, param in params.items() if table[name].spec.decay]
    others = [param for name, param in params.items() if not table[name].spec.decay]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
