"""Tensor parallelism: linear layers, embedding and cross-entropy with their weights split over the tp axis.

Shoeybi et al. 2019 (arXiv:1909.08053), section 3. Activations between the layers are whole on every tp rank; between a
column-parallel and the next row-parallel layer each rank holds its part of the features. Weights may be wider than the
activations (float32 masters under bf16): they are cast where they are used, and their gradients come back wide.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from heiretsu.parallel.collectives import all_reduce, copy_to, reduce_from
from heiretsu.parallel.mesh import REPLICAS, Axis, Mesh
from heiretsu.parallel.placement import Spec, declare, shard_bounds
from heiretsu.parallel.profiling import region


class _ColumnLinear(torch.autograd.Function):
    """x @ weight.T whose backward sums dx over the axis while the weight's gradient is being computed."""

    @staticmethod
    def forward(ctx, x, weight, axis):
        ctx.save_for_backward(x, weight)
        ctx.axis = axis
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dy @ weight  # (..., C), partial sum over tp
        pending = dist.all_reduce(dx, group=ctx.axis.group, async_op=True)
        dweight = dy.flatten(0, -2).T @ x.flatten(0, -2)
        with region(f"all-reduce {ctx.axis.name}", waits=True):
            pending.wait()
        return dx, dweight, None


@torch.compiler.disable
def _column_linear_overlapped(x, weight, axis):
    return _ColumnLinear.apply(x, weight, axis)


def column_linear(x: torch.Tensor, weight: torch.Tensor, axis: Axis) -> torch.Tensor:
    """x: (..., C), whole on every rank. weight: (F / size, C), this rank's rows. Returns (..., F / size)."""
    return F.linear(x, weight) if axis.size == 1 else _column_linear_overlapped(x, weight, axis)


class ColumnParallelLinear(nn.Module):
    """Linear layer with its outputs split over tp: each rank computes its own features of every token.

    in_features: C. out_features: F, divisible by tp. parts: stacked projections of F features each, every one of them
    split by itself (3 for a fused query-key-value). weight: (parts, F, C) or, with one part, (F, C).
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, mesh: Mesh, in_features: int, out_features: int, std: float, dtype: torch.dtype, parts: int = 1):
        super().__init__()
        self.tp = mesh.tp
        lead = (parts,) if parts > 1 else ()
        shards = ((len(lead), "tp"),)
        weight = Spec((*lead, out_features, in_features), shards, partial_over=REPLICAS, std=std, decay=True)
        bias = Spec((*lead, out_features), shards, partial_over=REPLICAS)
        declare(self, mesh, dtype, weight=weight, bias=bias)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Without the bias. x: (..., C), whole. Returns (..., parts * F / tp), this rank's features."""
        weight = self.weight.flatten(0, -2).to(x.dtype)
        return column_linear(x, weight, self.tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x) + self.bias.flatten().to(x.dtype)


class RowParallelLinear(nn.Module):
    """Linear layer with its inputs split over tp: each rank's product is a partial sum, reduced over tp.

    weight: (out_features, in_features), dim 1 sharded. The bias is whole on every rank, added once, after the sum.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, mesh: Mesh, in_features: int, out_features: int, std: float, dtype: torch.dtype):
        super().__init__()
        self.tp = mesh.tp
        weight = Spec((out_features, in_features), ((1, "tp"),), partial_over=REPLICAS, std=std, decay=True)
        declare(self, mesh, dtype, weight=weight, bias=Spec((out_features,), partial_over=REPLICAS))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Without the bias. x: (..., in_features / tp), this rank's features. Returns (..., out_features), whole."""
        return reduce_from(F.linear(x, self.weight.to(x.dtype)), self.tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x) + self.bias.to(x.dtype)


class VocabParallelEmbedding(nn.Module):
    """Token embedding, tied to the output head (the first and the last stage hold it), with its rows split over tp.

    num_rows: vocabulary size. padded_rows: rows that the weight really has, the same on every topology; those past
    num_rows are never looked up and get no logit. weight: (padded_rows, C), dim 0 sharded.
    """

    weight: nn.Parameter

    def __init__(self, mesh: Mesh, num_rows: int, padded_rows: int, features: int, std: float, dtype: torch.dtype):
        super().__init__()
        self.tp = mesh.tp
        shape, shards = (padded_rows, features), ((0, "tp"),)
        spec = Spec(shape, shards, partial_over=REPLICAS, shared_over="ends", std=std, decay=True, rows=num_rows)
        declare(self, mesh, dtype, weight=spec)
        self.start, stop = shard_bounds(padded_rows, mesh.tp)
        self.num_local_rows = max(0, min(stop, num_rows) - self.start)

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids: (B, T) int64. Returns (B, T, C) in dtype, whole on every tp rank."""
        if self.tp.size == 1:
            return F.embedding(ids, self.weight).to(dtype)
        local = ids - self.start
        elsewhere = (local < 0) | (local >= self.num_local_rows)
        if self.num_local_rows == 0:  # a rank with nothing but padding
            rows = self.weight.sum(dtype=dtype).expand(*ids.shape, self.weight.shape[1])
        else:
            rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight).to(dtype)
        return reduce_from(rows.masked_fill(elsewhere[..., None], 0.0), self.tp)

    def cross_entropy(self, x: torch.Tensor, targets: torch.Tensor, ops) -> torch.Tensor:
        """Loss of each token with this embedding as the head. x: (N, C), whole. targets: (N,). Returns (N,) float32.

        Each rank sees the logits of its own rows only. With m the largest shard lse, the whole lse is
        m + log(sum over shards of exp(lse - m)).
        """
        weight = self.weight[: self.num_local_rows]
        lse, target_logit = ops.linear_cross_entropy(copy_to(x, self.tp), weight, targets, self.start)
        if self.tp.size == 1:
            return lse - target_logit
        largest = all_reduce(lse, self.tp, dist.ReduceOp.MAX)
        total = reduce_from((lse - largest).exp(), self.tp)
        return largest + total.log() - reduce_from(target_logit, self.tp)
