"""The mesh: which ranks a rank may talk to, one axis for each kind of parallelism.

Context is passed explicitly: a layer takes the axis that it talks over. An axis of size 1 has no process group, and
every collective over it is the identity, so that one process needs no process group at all.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXIS_NAMES = ("dp", "ep", "pp", "tp")  # slowest to fastest: rank = ((dp * ep + ep_i) * pp + pp_i) * tp + tp_i
WITHIN_STAGE = ("dp", "ep", "tp")  # the axes along which ranks hold copies or shards of the same parameters
REPLICAS = ("dp", "ep")  # every (dp, ep) pair is a data replica, with tokens of its own
JOINT_AXES = {REPLICAS: "replica"}  # what `Mesh.over` joins, each on a channel of its own


@dataclass(frozen=True)
class Axis:
    """One line of ranks through the mesh, as seen from this rank. index: this rank's place; ranks: global, in order."""

    name: str
    size: int = 1
    index: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo) -> Axis:
        return self  # nothing in it changes, and a process group cannot be copied: a model's copy talks over the same


@dataclass(frozen=True)
class Mesh:
    """This rank's axes.

    ends: the first and the last pipeline stage, for parameters that both hold (size 1 elsewhere). pp_back: the axis pp
    again on a channel of its own, so that gradients going up never queue behind activations going down. joint: the
    axes that `over` gives.
    """

    dp: Axis
    ep: Axis
    pp: Axis
    tp: Axis
    ends: Axis
    pp_back: Axis
    world: Axis
    joint: Mapping[tuple[str, ...], Axis]
    device: torch.device
    device_mesh: DeviceMesh | None = None  # dp x ep x pp x tp; None without process groups

    def over(self, *names: str) -> Axis:
        """The axis that several make together, slowest first: ranks that differ in these coordinates alone."""
        return getattr(self, names[0]) if len(names) == 1 else self.joint[names]

    @property
    def replica(self) -> Axis:
        """The data replicas."""
        return self.over(*REPLICAS)

    @property
    def rank(self) -> int:
        return self.world.index

    def coordinates(self) -> str:
        """This rank in words, for error messages."""
        place = ", ".join(f"{name}={getattr(self, name).index}" for name in AXIS_NAMES)
        return f"rank {self.rank} ({place})"


@contextmanager
def process_groups(backend: str, world_size: int, **options) -> Iterator[None]:
    """The default process group, which make_mesh needs, for as long as the block runs; one process needs none.

    Call a function in the block that does the work, so that nothing holds a mesh when the block ends. Only then are
    gloo's threads joined, and they must be: one that frees the tensors of the last collective while the interpreter
    shuts down aborts the process, after all its work was done. A block that raises leaves the groups as they are: to
    destroy them may wait for ranks that never answer, and what was raised must be seen. options: those of
    init_process_group.
    """
    if world_size == 1:
        yield
        return
    dist.init_process_group(backend, world_size=world_size, **options)
    yield
    gc.collect()  # an engine and its parameters' hooks refer to each other, and to the mesh
    dist.destroy_process_group()


def make_mesh(dp: int = 1, ep: int = 1, pp: int = 1, tp: int = 1, device: str | torch.device = "cpu") -> Mesh:
    """This rank's mesh. All ranks must call it together, within process_groups (or after init_process_group).

    Raises ValueError if dp * ep * pp * tp is not the world size.
    """
    sizes = (dp, ep, pp, tp)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if math.prod(sizes) != world_size:
        product = " x ".join(f"--{name} {size}" for name, size in zip(AXIS_NAMES, sizes, strict=True))
        raise ValueError(f"{product} = {math.prod(sizes)} ranks, but the world has {world_size} processes")
    device = torch.device(device)
    if world_size == 1:
        return abstract_mesh(dp, ep, pp, tp, device=device)

    rank = dist.get_rank()
    device_mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXIS_NAMES)
    blank = abstract_mesh(dp, ep, pp, tp, rank)

    def joined(axis: Axis) -> Axis:
        if axis.size == 1:
            return axis
        group = dist.group.WORLD if axis.name == "world" else device_mesh.get_group(axis.name)
        return replace(axis, group=group)

    def new_groups(*names: str) -> Axis:
        """The same group made on every line of the mesh; every rank takes part in making each of them."""
        mine = blank.over(*names)
        lines = {abstract_mesh(dp, ep, pp, tp, rank=r).over(*names).ranks for r in range(world_size)}
        groups = {ranks: dist.new_group(list(ranks)) for ranks in sorted(lines) if len(ranks) > 1}
        return replace(mine, group=groups.get(mine.ranks))

    return Mesh(
        **{name: joined(getattr(blank, name)) for name in (*AXIS_NAMES, "world")},
        joint={names: new_groups(*names) for names in JOINT_AXES},
        ends=new_groups("ends"),
        pp_back=new_groups("pp_back"),
        device=device,
        device_mesh=device_mesh,
    )


def abstract_mesh(dp=1, ep=1, pp=1, tp=1, rank: int = 0, device: str | torch.device = "cpu") -> Mesh:
    """The mesh that `rank` would have, without process groups: for planning, for tables, and for one process."""
    sizes = dict(zip(AXIS_NAMES, (dp, ep, pp, tp), strict=True))
    grid = torch.arange(math.prod(sizes.values()), device="cpu").view(dp, ep, pp, tp)
    at = dict(zip(AXIS_NAMES, (grid == rank).nonzero()[0].tolist(), strict=True))

    def line(name: str, over: tuple[str, ...]) -> Axis:
        picked = grid[tuple(slice(None) if axis in over else at[axis] for axis in AXIS_NAMES)].flatten().tolist()
        return Axis(name, len(picked), picked.index(rank), tuple(picked))

    axes: dict[str, Any] = {name: line(name, (name,)) for name in AXIS_NAMES}
    column = axes["pp"]
    ends = Axis("ends", ranks=(rank,))
    if column.size > 1 and column.index in (0, column.size - 1):
        ends = Axis("ends", 2, int(column.index > 0), (column.ranks[0], column.ranks[-1]))
    return Mesh(
        **axes,
        joint={names: line(name, names) for names, name in JOINT_AXES.items()},
        ends=ends,
        pp_back=line("pp_back", ("pp",)),
        world=line("world", AXIS_NAMES),
        device=torch.device(device),
    )
