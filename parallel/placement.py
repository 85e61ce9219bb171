"""One record for each parameter: what it is globally, and where its pieces live.

A layer states a `Spec` for each of its parameters and makes the parameters from it with `declare`. `placement_table`
collects the records of a model under their full names. Initialisation, gradient averaging, the gradient norm, the
optimizer's groups, checkpoints and the parity harness read this table and nothing else, so that they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from heiretsu.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Spec:
    """What a layer knows of one of its parameters.

    shape: global. shards: {dim: axis name}, torch.chunk's split of that dim over the axis. std: of the normal initial
    values; a number in `fill` is used instead where std is None. expert: the parameter belongs to an expert, so its
    gradient already holds the tokens of every ep rank. tied: held by the first and the last pipeline stage. decay:
    weight decay applies. rows: rows of dim 0 that mean something; those above are padding, zero for ever.
    """

    shape: tuple[int, ...]
    shards: tuple[tuple[int, str], ...] = ()
    std: float | None = None
    fill: float = 0.0
    expert: bool = False
    tied: bool = False
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
            slice(*shard_bounds(size, getattr(self.mesh, axes[dim]))) if dim in axes else slice(0, size)
            for dim, size in enumerate(self.spec.shape)
        )

    @property
    def reduce_axis(self) -> Axis:
        """The axis over which the gradient is summed: other replicas' tokens that it has not seen yet."""
        return self.mesh.dp if self.spec.expert else self.mesh.replica

    @property
    def divisor(self) -> int:
        """What the summed gradient is divided by: the number of data replicas, for experts too."""
        return self.mesh.replica.size

    @property
    def tied_axis(self) -> Axis | None:
        """The axis over which the copies of a tied parameter sum their gradients, after `reduce_axis`."""
        return self.mesh.ends if self.spec.tied and self.mesh.pp.size > 1 else None

    @property
    def is_owner(self) -> bool:
        """True on exactly one of the ranks that hold the same piece: there it counts towards the gradient norm."""
        sharded = {axis for _, axis in self.spec.shards}
        replicated = [getattr(self.mesh, axis) for axis in ("dp", "ep", "tp") if axis not in sharded]
        first_copy = self.tied_axis is None or self.tied_axis.index == 0
        return first_copy and all(axis.index == 0 for axis in replicated)

    @property
    def num_elements(self) -> int:
        """Elements of the whole parameter, padding left out."""
        rows = self.spec.shape[0] if self.spec.rows is None else self.spec.rows
        return rows * torch.Size(self.spec.shape[1:]).numel()

    def local(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's piece (a view) of the whole tensor."""
        return whole[self.local_slices]


Table = dict[str, Placement]


def shard_bounds(size: int, axis: Axis) -> tuple[int, int]:
    """First and past-the-last index of this rank's chunk of a dim; chunks of ceil(size / axis.size), like
    torch.chunk."""
    chunk = -(-size // axis.size)
    return min(chunk * axis.index, size), min(chunk * (axis.index + 1), size)


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
