"""Data parallelism: gradients summed over the data replicas in flat buckets, while backward still runs.

Each parameter's gradient is a view into its bucket, so that autograd accumulates straight into what is sent. A bucket
leaves as soon as every gradient in it has been accumulated over all microbatches: once a step, whatever the number of
microbatches. Which axis a gradient is summed over, and its divisor, are the placement table's business.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist

from heiretsu.parallel.mesh import Axis
from heiretsu.parallel.placement import Placement, Table
from heiretsu.parallel.profiling import region

BUCKET_BYTES = 25 * 2**20  # as large as hides the latency, as small as lets the first leave early (Li et al. 2020)


@dataclass
class _Bucket:
    axis: Axis
    flat: torch.Tensor
    names: list[str]
    waiting: int = 0
    work: dist.Work | None = None


class GradientAverager:
    """Owns the gradients of a model: `prepare` before a step's first backward, `finish` after its last."""

    def __init__(self, params: dict[str, torch.nn.Parameter], table: Table, bucket_bytes: int = BUCKET_BYTES):
        self.params, self.table = params, table
        self.buckets: list[_Bucket] = []
        self._bucket_of: dict[str, _Bucket] = {}
        for names in _group(params, table, bucket_bytes):
            sizes = [params[name].numel() for name in names]
            bucket = _Bucket(table[names[0]].reduce_axis, params[names[0]].new_zeros(sum(sizes)), names)
            self.buckets.append(bucket)
            for name, part in zip(names, bucket.flat.split(sizes), strict=True):
                params[name].grad = part.view_as(params[name])
                self._bucket_of[name] = bucket
        self._due: dict[str, int] = {}
        for name, param in params.items():
            param.register_post_accumulate_grad_hook(_hook(weakref.ref(self), name))

    def _accumulated(self, name: str) -> None:
        if name not in self._due:
            return
        self._due[name] -= 1
        if self._due[name] == 0:
            self._bucket_of[name].waiting -= 1
            self._launch(only_ready=True)

    def prepare(self, num_microbatches: int) -> None:
        """Zero all gradients; each parameter's is complete after `num_microbatches` backward passes."""
        self._due = dict.fromkeys(self.params, num_microbatches)
        for bucket in self.buckets:
            bucket.flat.zero_()
            bucket.waiting = len(bucket.names)
        self._next = 0

    def _launch(self, only_ready: bool) -> None:
        """Start reductions in the buckets' order, which is the same on every rank, whatever order they fill in."""
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if only_ready and bucket.waiting:
                return
            if bucket.axis.size > 1:
                bucket.work = dist.all_reduce(bucket.flat, group=bucket.axis.group, async_op=True)
            self._next += 1

    def finish(self) -> None:
        """Wait for every sum, divide, and add up the copies in several stages. Gradients are then global means."""
        self._launch(only_ready=False)
        self._due = {}
        for bucket in self.buckets:
            if bucket.work is not None:
                with region(f"all-reduce {bucket.axis.name}", waits=True):
                    bucket.work.wait()
                bucket.work = None
            divisor = self.table[bucket.names[0]].divisor
            if divisor > 1:
                bucket.flat.div_(divisor)
        for name, param in self.params.items():
            axis = self.table[name].shared_axis
            if axis is not None and axis.size > 1:
                with region(f"all-reduce {axis.name}", waits=True):
                    dist.all_reduce(param.grad, group=axis.group)

    def scale(self, factor: float) -> None:
        """Multiply every gradient."""
        for bucket in self.buckets:
            bucket.flat.mul_(factor)


def _hook(averager: weakref.ref[GradientAverager], name: str):
    # Autograd holds its hooks where Python's garbage collector cannot look: a strong reference from one to the
    # averager, and so to the parameters, would keep the model for ever.
    def accumulated(_):
        if (alive := averager()) is not None:
            alive._accumulated(name)

    return accumulated


def _group(params: dict[str, torch.nn.Parameter], table: Table, bucket_bytes: int) -> list[list[str]]:
    """Names bucket by bucket, the model's last parameters first: about the order in which backward finishes them.

    What several stages share goes last of all: with one stage its gradient is whole only when backward reaches the
    bottom.
    """

    def kind(place: Placement):
        return place.spec.shared_over, place.reduce_axis.name, place.divisor

    buckets: list[list[str]] = []
    filling: dict[tuple, list[str]] = {}
    for name in sorted(reversed(params), key=lambda name: table[name].spec.shared_over is not None):
        bucket = filling.setdefault(kind(table[name]), [])
        bucket.append(name)
        if sum(params[n].numel() * params[n].element_size() for n in bucket) >= bucket_bytes:
            buckets.append(filling.pop(kind(table[name])))
    return buckets + list(filling.values())
