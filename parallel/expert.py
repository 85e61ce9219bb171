"""Expert parallelism: tokens travel to the rank that holds their expert, and back.

Lepikhin et al. 2020 (arXiv:2006.16668), without capacities: every token is served. Both ways are one differentiable
exchange each, and a rank with no tokens to send, or none to serve, still takes part in every one. Over an axis of one
rank nothing moves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from heiretsu.parallel.collectives import all_to_all
from heiretsu.parallel.mesh import Axis


class Dispatched(NamedTuple):
    """Rows that this rank serves, and the way back.

    rows: (M, C), in order of the sending rank. experts: (M, k) int64, indices among this rank's experts. gates: (M, k),
    the weights of a row's k experts. Over one rank these are what was given; else a row is a token's way to one expert,
    and its gate is one: the token's own gates stay at home, and weigh what returns.
    """

    rows: torch.Tensor
    experts: torch.Tensor
    gates: torch.Tensor
    home_gates: torch.Tensor
    order: torch.Tensor | None = None
    sent: list[int] | None = None
    received: list[int] | None = None


def dispatch(x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor, num_experts: int, ep: Axis) -> Dispatched:
    """Send each token to its experts. x: (N, C). experts: (N, K) int64, global indices. gates: (N, K).

    Rank i of the axis holds experts i * E/ep .. (i + 1) * E/ep - 1. The counts are read on the host, once.
    """
    if ep.size == 1:
        return Dispatched(x, experts, gates, gates)
    per_rank = num_experts // ep.size
    flat = experts.flatten()
    order = flat.argsort(stable=True)  # (N * K,), by expert and so by rank
    counts = torch.bincount(flat // per_rank, minlength=ep.size)
    one_each = [1] * ep.size
    their_counts = all_to_all(counts, one_each, one_each, ep)
    sent, received = counts.tolist(), their_counts.tolist()

    rows = all_to_all(x[order // experts.shape[1]], sent, received, ep)
    served = all_to_all(flat[order], sent, received, ep) - ep.index * per_rank
    return Dispatched(rows, served[:, None], gates.new_ones(len(rows), 1), gates, order, sent, received)


def combine(y: torch.Tensor, there: Dispatched, ep: Axis) -> torch.Tensor:
    """Bring served rows home and add them up. y: (M, C), in the order of there.rows. Returns (N, C)."""
    if ep.size == 1:
        return y
    home, gates = all_to_all(y, there.received, there.sent, ep), there.home_gates
    pairs = torch.empty_like(home).index_copy(0, there.order, home)  # a permutation: every row is written
    return (pairs.view(*gates.shape, y.shape[1]) * gates[..., None].to(y.dtype)).sum(1)
