"""Collectives as adjoint pairs, each named by what its forward does.

    copy_to      forward: identity        backward: all-reduce
    reduce_from  forward: all-reduce      backward: identity
    all_to_all   forward: all-to-all      backward: all-to-all the other way

Each is an autograd function; over an axis of size 1 each is the identity. None writes into its input or into the
gradient that it is given. (Shoeybi et al. 2019, arXiv:1909.08053, calls the first two f and g.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from heiretsu.parallel.mesh import Axis
from heiretsu.parallel.profiling import region


def all_reduce(x: torch.Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """A new tensor, reduced over the axis. Not differentiable: for statistics and inside backward passes."""
    out = x.detach().clone(memory_format=torch.contiguous_format)
    if axis.size > 1:
        with region(f"all-reduce {axis.name}", waits=True):
            dist.all_reduce(out, op=op, group=axis.group)
    return out


def gather_objects(value: Any, axis: Axis) -> list:
    """Every rank's value, in the axis's order. Pickled: for what is rare and small."""
    if axis.size == 1:
        return [value]
    values: list = [None] * axis.size
    with region(f"gather over {axis.name}", waits=True):
        dist.all_gather_object(values, value, group=axis.group)
    return values


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return all_reduce(dy, ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send_counts, receive_counts, axis):
        ctx.counts, ctx.axis = (receive_counts, send_counts), axis
        return _all_to_all(x, send_counts, receive_counts, axis)

    @staticmethod
    def backward(ctx, dy):
        send_counts, receive_counts = ctx.counts
        return _all_to_all(dy, send_counts, receive_counts, ctx.axis), None, None, None


def _all_to_all(x, send_counts, receive_counts, axis):
    out = x.new_empty((sum(receive_counts), *x.shape[1:]))
    with region(f"all-to-all {axis.name}", waits=True):
        dist.all_to_all_single(out, x.contiguous(), receive_counts, send_counts, group=axis.group)
    return out


@torch.compiler.disable
def copy_to(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """x as it is; its gradient, a partial sum on each rank of the axis, is summed over the axis."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


@torch.compiler.disable
def reduce_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of x, a partial sum on each rank, over the axis; whole on every rank of it."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


@torch.compiler.disable
def all_to_all(x: torch.Tensor, send_counts: list[int], receive_counts: list[int], axis: Axis) -> torch.Tensor:
    """Rows of x to other ranks: the first send_counts[0] to the axis's rank 0, and so on; returns the rows received,
    those of rank 0 first. x: (sum(send_counts), ...). Ranks with nothing to send still take part."""
    return x if axis.size == 1 else _AllToAll.apply(x, send_counts, receive_counts, axis)
