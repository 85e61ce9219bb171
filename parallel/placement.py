"""One record for each parameter: what it is globally, and where its pieces live.

A layer states a `Spec` for each of its parameters and makes the parameters from it with `declare`. `placement_table`
collects the records of a model under their full names. Initialisation, gradient averaging, the gradient norm, the
optimizer's groups, checkpoints and the parity harness read this table and nothing else, so that they cannot disagree.
Which axes a parameter has to do with is for its layer to say: none is named here.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import nn

from heiretsu.parallel.mesh import WITHIN_STAGE, Axis, Mesh


@dataclass(frozen=True)
class Spec:
    """What a layer knows of one of its parameters.

    shape: global. shards: pairs of a dim and the axis over which torch.chunk splits it. partial_over: the axes over
    which its gradient is a partial sum, as each rank has seen other tokens. shared_over: the axis of the pipeline
    stages that hold a copy each, where several do; their gradients add up. std: of the normal initial values; a number
    in `fill` is used instead where std is None. decay: weight decay applies. rows: rows of dim 0 that mean something;
    those above are padding, zero for ever.
    """

    shape: tuple[int, ...]
    shards: tuple[tuple[int, str], ...] = ()
    _: KW_ONLY
    partial_over: tuple[str, ...]
    shared_over: str | None = None
    std: float | None = None
    fill: float = 0.0
    decay: bool = False
    rows: int | None = None


@dataclass(frozen=True)
class Placement:
    """A parameter's record on one mesh. name: canonical, the same on every topology."""

    name: str
    spec: Spec
    mesh: Mesh

    @property
    def local_slices(self) -> tuple[slice, ...]:
        """The part of the global tensor that this rank holds."""
        axes = dict(self.spec.shards)
        return tuple(
            slice(*shard_bounds(size, self.mesh.over(axes[dim]))) if dim in axes else slice(0, size)
            for dim, size in enumerate(self.spec.shape)
        )

    @property
    def reduce_axis(self) -> Axis:
        """The axis over which the gradient is summed: other ranks' tokens that it has not seen yet."""
        return self.mesh.over(*self.spec.partial_over)

    @property
    def divisor(self) -> int:
        """What the summed gradient is divided by: the number of data replicas, whose mean objective is minimised."""
        return self.mesh.replica.size

    @property
    def shared_axis(self) -> Axis | None:
        """The axis over which the copies in several stages sum their gradients, after `reduce_axis`."""
        return self.mesh.over(self.spec.shared_over) if self.spec.shared_over else None

    @property
    def is_owner(self) -> bool:
        """True on exactly one of the ranks that hold the same piece: there it counts towards the gradient norm."""
        sharded = {axis for _, axis in self.spec.shards}
        copies = [self.mesh.over(axis) for axis in WITHIN_STAGE if axis not in sharded]
        copies += [self.shared_axis] if self.shared_axis else []
        return all(axis.index == 0 for axis in copies)

    def local(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's piece (a view) of the whole tensor."""
        return whole[self.local_slices]


Table = dict[str, Placement]


class Piece(NamedTuple):
    """What this rank holds of a tensor that is laid out as a parameter is: its part, and the parameter's record."""

    tensor: torch.Tensor
    place: Placement


def shard_bounds(size: int, axis: Axis) -> tuple[int, int]:
    """First and past-the-last index of this rank's shard of a dim: ceil(size / axis.size) each, like torch.chunk."""
    length = -(-size // axis.size)
    return min(length * axis.index, size), min(length * (axis.index + 1), size)


def declare(module: nn.Module, mesh: Mesh, dtype: torch.dtype, **specs: Spec) -> None:
    """Give `module` a parameter for each spec: this rank's shard, with its initial constant (normals come later)."""
    module.specs = specs  # type: ignore[assignment]  # a plain attribute, read by placement_table alone
    for name, spec in specs.items():
        shape = [s.stop - s.start for s in Placement(name, spec, mesh).local_slices]
        module.register_parameter(name, nn.Parameter(torch.full(shape, spec.fill, dtype=dtype, device=mesh.device)))


def placement_table(model: nn.Module, mesh: Mesh) -> Table:
    """The record of every parameter that this rank's part of the model holds, in the model's order."""
    table: Table = {}
    for path, module in model.named_modules():
        for name, spec in getattr(module, "specs", {}).items():
            full_name = f"{path}.{name}" if path else name
            table[full_name] = Placement(full_name, spec, mesh)
    missing = {name for name, _ in model.named_parameters()} - set(table)
    assert not missing, f"parameters without a placement: {sorted(missing)}"
    return table
