"""Mixture-of-experts feed-forward block: router, experts and the loss that balances them.

Experts are split over ep, and each expert's features over tp; routing is computed on every tp rank alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from heiretsu.model.config import ModelConfig
from heiretsu.model.copying import HoldsOps
from heiretsu.model.seeding import INIT_STD
from heiretsu.parallel.collectives import copy_to, reduce_from
from heiretsu.parallel.expert import combine, dispatch
from heiretsu.parallel.mesh import REPLICAS, Axis, Mesh
from heiretsu.parallel.placement import Spec, declare


class Router(nn.Module):
    """Token scores for each expert, in float32 at least: a rounded tie would send a token elsewhere."""

    weight: nn.Parameter

    def __init__(self, mesh: Mesh, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        shape = (config.num_experts, config.n_embed)
        declare(self, mesh, dtype, weight=Spec(shape, partial_over=REPLICAS, std=INIT_STD, decay=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight)


class MoE(HoldsOps):
    """Dropless top-k mixture of two-layer GELU experts.

    w1: (E, C, F) and b1: (E, F), split over ep and, in F, over tp. w2: (E, F, C) likewise; b2: (E, C), over ep.
    """

    w1: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter

    def __init__(self, mesh: Mesh, config: ModelConfig, ops, residual_std: float, dtype: torch.dtype):
        super().__init__(ops)
        E, C, F = config.num_experts, config.n_embed, config.ffn_size
        self.config, self.tp, self.ep = config, mesh.tp, mesh.ep
        self.router = Router(mesh, config, dtype)
        # An expert serves the tokens of all ep ranks, so that its gradient holds them already.
        w1 = Spec((E, C, F), ((0, "ep"), (2, "tp")), partial_over=("dp",), std=INIT_STD, decay=True)
        b1 = Spec((E, F), ((0, "ep"), (1, "tp")), partial_over=("dp",))
        w2 = Spec((E, F, C), ((0, "ep"), (1, "tp")), partial_over=("dp",), std=residual_std, decay=True)
        b2 = Spec((E, C), ((0, "ep"),), partial_over=("dp",))
        declare(self, mesh, dtype, w1=w1, b1=b1, w2=w2, b2=b2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x: (B, T, C), whole on every tp rank. Returns y (B, T, C), whole; the balance loss; each expert's tokens."""
        B, T, C = x.shape
        tokens = x.reshape(B * T, C)
        logits = self.router(tokens)
        gates, experts = self.ops.route(logits, self.config.top_k)
        aux_loss, load = balance_loss(logits.view(B, T, -1), experts.view(B, T, -1))

        # From here to `reduce_from`, each tp rank works on its part of F: what enters has partial gradients.
        entering = copy_to(tokens, self.tp), experts, copy_to(gates, self.tp)
        there = dispatch(*entering, self.config.num_experts, self.ep)
        weights = self.w1, self.b1, self.w2, once(self.b2, self.tp)
        y = self.ops.expert_mlp(there.rows, there.experts, there.gates, *weights)
        y = combine(y, there, self.ep)  # (N, C), partial sum over tp
        return reduce_from(y, self.tp).view(B, T, C), aux_loss, load


def once(bias: torch.Tensor, tp: Axis) -> torch.Tensor:
    """A bias inside a partial sum over tp: itself on one rank and zero on the others; its gradient is whole."""
    return bias if tp.size == 1 else copy_to(bias, tp) * float(tp.index == 0)


def balance_loss(logits: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Switch balance loss of each sequence, averaged over sequences (Fedus et al. 2021, arXiv:2101.03961, eq. 4).

    logits: (B, T, E). experts: (B, T, K). For a sequence: E * sum_e f_e * p_e, with f_e the share of its token slots
    sent to expert e and p_e its mean probability. Taken within sequences, so that it does not depend on how they are
    grouped. Returns the loss, 1 when balanced, and the tokens of each expert, (E,) int64.
    """
    E = logits.shape[-1]
    chosen = torch.zeros_like(logits).scatter_add(2, experts, torch.ones_like(logits[..., : experts.shape[2]]))
    share = chosen.mean(1) / experts.shape[2]  # (B, E)
    prob = logits.softmax(-1).mean(1)  # (B, E)
    return E * (share * prob).sum(-1).mean(), chosen.sum((0, 1)).long()
