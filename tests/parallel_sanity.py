"""The mesh and its collectives on real processes: who is where, and what each forward and each backward gives.

torchrun --standalone --nproc_per_node=4 tests/parallel_sanity.py --dp 2 --tp 2 --pp 1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # torchrun puts this folder on the path, not the repository

import torch
import torch.distributed as dist

from heiretsu.parallel.collectives import all_to_all, copy_to, reduce_from
from heiretsu.parallel.mesh import AXIS_NAMES, Axis, Mesh
from tests.torchrun import config_of, on_mesh, parser


def verdict(mesh: Mesh) -> dict[str, str]:
    found = coordinates(mesh)
    for name in (*AXIS_NAMES, "replica", "ends", "pp_back", "world"):
        axis = getattr(mesh, name)
        found |= {f"{check} over {name}": message for check, message in collectives(mesh, axis).items()}
        if mesh.rank == 0:
            print(f"{name}: ranks {axis.ranks}")
    everyone: list = [None] * mesh.world.size
    if mesh.world.size > 1:
        dist.all_gather_object(everyone, found)
        found = {f"rank {rank}, {key}": value for rank, one in enumerate(everyone) for key, value in one.items()}
    return found


def coordinates(mesh: Mesh) -> dict[str, str]:
    dp, ep, pp, tp = (getattr(mesh, name) for name in AXIS_NAMES)
    rank = ((dp.index * ep.size + ep.index) * pp.size + pp.index) * tp.size + tp.index
    found = {} if rank == mesh.rank else {"coordinates": f"{mesh.coordinates()} should be rank {rank}"}
    for name in (*AXIS_NAMES, "replica", "world"):
        axis = getattr(mesh, name)
        if axis.ranks[axis.index] != mesh.rank or len(axis.ranks) != axis.size:
            found[f"axis {name}"] = f"rank {mesh.rank} is not number {axis.index} of {axis.ranks}"
    return found


def collectives(mesh: Mesh, axis: Axis) -> dict[str, str]:
    """Each rank puts in values that are functions of its rank, so that it can compute what the others put in."""
    counts = [[1 + (i + j) % 3 for j in range(axis.size)] for i in range(axis.size)]  # rows from i to j
    sent, received = counts[axis.index], [row[axis.index] for row in counts]
    xs = [values(rank, sum(counts[i]), mesh) for i, rank in enumerate(axis.ranks)]
    back = [values(100 + rank, sum(row[i] for row in counts), mesh) for i, rank in enumerate(axis.ranks)]
    same = [values(200 + rank, 5, mesh) for rank in axis.ranks]
    up = [values(300 + rank, 5, mesh) for rank in axis.ranks]
    me = axis.index

    found = compare("copy_to", lambda x: copy_to(x, axis), same[me], up[me], same[me], sum(up))
    found |= compare("reduce_from", lambda x: reduce_from(x, axis), same[me], up[me], sum(same), up[me])
    there = torch.cat([x.split(counts[i])[me] for i, x in enumerate(xs)])
    home = torch.cat([g.split([row[j] for row in counts])[me] for j, g in enumerate(back)])
    return found | compare("all_to_all", lambda x: all_to_all(x, sent, received, axis), xs[me], back[me], there, home)


def values(seed: int, rows: int, mesh: Mesh) -> torch.Tensor:
    return torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(mesh.device)


def compare(name, function, x, upstream, expected, expected_gradient) -> dict[str, str]:
    """Forward and backward of one collective against what they should give; neither may write into what it is given."""
    leaf, gradient = x.clone().requires_grad_(), upstream.clone()
    y = function(leaf)
    y.backward(gradient)
    found = {}
    if not torch.allclose(y, expected, rtol=1e-12, atol=1e-12):
        found[name] = f"forward differs by {(y - expected).abs().max().item():.1e}"
    if not torch.allclose(leaf.grad, expected_gradient, rtol=1e-12, atol=1e-12):
        found[f"{name} backward"] = f"gradient differs by {(leaf.grad - expected_gradient).abs().max().item():.1e}"
    if not (torch.equal(leaf.detach(), x) and torch.equal(gradient, upstream)):
        found[f"{name} in place"] = "wrote into its input or into the gradient that it was given"
    return found


flags = parser(__doc__).parse_args()
config = config_of(flags)
on_mesh(config, verdict)
