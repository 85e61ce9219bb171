"""What is told of a step: named numbers that add up over microbatches, stages and ranks, in one message.

A stage declares its metrics (`Metric`), so that every rank packs the same vector, whatever its own stages compute. They
stay on the device until all ranks have added theirs, and the host reads once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import torch

from heiretsu.parallel.collectives import all_reduce
from heiretsu.parallel.mesh import Axis, Mesh
from heiretsu.parallel.profiling import region


class Metric(NamedTuple):
    """shape: of what a stage gives for a microbatch. Stages add up; so do microbatches and replicas under "sum", and
    under "mean" their mean is taken."""

    shape: tuple[int, ...] = ()
    rule: Literal["mean", "sum"] = "mean"


class Totals:
    """What this rank's stages gave for its microbatches, in that order: on the device, so that nothing waits."""

    def __init__(self, declared: Mapping[str, Metric]):
        self.declared = declared
        self.given: dict[str, list[torch.Tensor]] = {name: [] for name in declared}

    def add(self, metrics: Mapping[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            assert value.shape == self.declared[name].shape, f"{name} is {tuple(value.shape)}, not as it was declared"
            self.given[name].append(value.detach())

    def shares(self, num_microbatches: int, mesh: Mesh) -> list[torch.Tensor]:
        """This rank's share of each metric, a float64 vector: over all ranks they add up to what its rule says."""
        shares = []
        for name, metric in self.declared.items():
            given = self.given[name] if mesh.tp.index == 0 else []  # the ranks of tp hold copies
            given = given or [torch.zeros(metric.shape, device=mesh.device)]
            share = widened(torch.stack([value.flatten() for value in given])).cumsum(0)[-1]  # in the order given
            shares.append(share / (num_microbatches * mesh.replica.size) if metric.rule == "mean" else share)
        return shares

    def not_finite(self) -> list[str]:
        """Names of the metrics of which this rank gave what is NaN or inf. Waits for them."""
        return [name for name, given in self.given.items() if not all(bool(x.isfinite().all()) for x in given)]


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in float64, for sums. On its device, or on the CPU where that has none (Apple's mps); those that ranks can talk
    from, a CPU and CUDA's GPUs, have it."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def exchange(
    sums: Sequence[torch.Tensor], told: Sequence[float], world: Axis
) -> tuple[list[list[float]], list[tuple[float, ...]]]:
    """Each of `sums`, float64 vectors, added over all ranks; and the few numbers that each rank has told, by rank."""
    own = torch.cat(list(sums))
    by_rank = own.new_zeros(world.size, len(told))
    for place, number in enumerate(told):
        by_rank[world.index, place] = number
    everything = all_reduce(torch.cat([own, by_rank.flatten()]), world)
    with region(f"all-reduce {world.name}", waits=True):  # a GPU's is waited for here, and all that came before it
        numbers = iter(everything.tolist())
    totals = [list(islice(numbers, len(vector))) for vector in sums]
    return totals, [tuple(islice(numbers, len(told))) for _ in range(world.size)]
