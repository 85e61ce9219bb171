"""Which host each rank sits on, and which axes of the mesh cross hosts.

A launcher numbers its processes host by host, and the mesh counts tp fastest, then pp, ep and dp. `placed_rank` is the
one place where the two meet.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from heiretsu.parallel.collectives import gather_objects
from heiretsu.parallel.mesh import AXIS_NAMES, Mesh, abstract_mesh


def placed_rank(environment: Mapping[str, str], ep: int, pp: int, tp: int) -> int:
    """The rank in the mesh of this process, which the launcher calls RANK, such that tp and ep stay on a host.

    Blocks of tp * pp * ep ranks follow each other in the mesh. Where a host holds whole ones, the launcher's numbers
    are good as they are. Where it does not, but holds whole groups of tp * ep, the stages of a pipeline are dealt to
    different hosts instead: a stage sends its activations once a microbatch, tp and ep exchange in every layer. Rank 0
    is the same process either way. Without equal hosts that a launcher has told of, nothing is moved.
    """
    rank = int(environment.get("RANK", 0))
    world_size, per_host = int(environment.get("WORLD_SIZE", 1)), int(environment.get("LOCAL_WORLD_SIZE", 0))
    equal_hosts = per_host and per_host * int(environment.get("GROUP_WORLD_SIZE", 1)) == world_size
    if not equal_hosts or per_host % (tp * pp * ep) == 0 or per_host % (tp * ep):
        return rank
    rest, tp_index = divmod(rank, tp)
    rest, ep_index = divmod(rest, ep)
    dp_index, pp_index = divmod(rest, pp)
    return ((dp_index * ep + ep_index) * pp + pp_index) * tp + tp_index


@dataclass(frozen=True)
class Hosts:
    """names: of the host of each rank, by rank. sizes: of the mesh, by axis."""

    names: tuple[str, ...]
    sizes: Mapping[str, int]

    @property
    def ranks(self) -> dict[str, list[int]]:
        """By host, in the order of their first ranks."""
        found: dict[str, list[int]] = {}
        for rank, name in enumerate(self.names):
            found.setdefault(name, []).append(rank)
        return found

    def crossing(self) -> list[str]:
        """The axes on which some rank has a neighbour on another host."""
        dp, ep, pp, tp = (self.sizes[name] for name in AXIS_NAMES)
        meshes = [abstract_mesh(dp, ep, pp, tp, rank) for rank in range(len(self.names))]
        hosts = {name: [{self.names[r] for r in getattr(mesh, name).ranks} for mesh in meshes] for name in AXIS_NAMES}
        return [name for name in AXIS_NAMES if max(map(len, hosts[name])) > 1]

    def only_dp_crosses(self) -> bool:
        """Whether the first host holds a whole model."""
        return set(self.crossing()) <= {"dp"}

    def describe(self) -> list[str]:
        """For the header of the log: nothing on one host, else who sits where, and a warning if tp crosses hosts."""
        if len(self.ranks) == 1:
            return []
        where = ", ".join(f"{name} ranks {_spans(ranks)}" for name, ranks in self.ranks.items())
        crossing = self.crossing()
        lines = [f"hosts: {where}; between hosts: {', '.join(crossing)}"]
        if "tp" in crossing:
            most = min(len(ranks) for ranks in self.ranks.values())
            lines.append(
                f"warning: --tp {self.sizes['tp']} crosses hosts, and every layer waits four times a step for the "
                f"network: keep tp to the {most} rank{'s' * (most > 1)} of a host, and raise --pp or --dp instead"
            )
        return lines


def gather_hosts(mesh: Mesh) -> Hosts:
    """Every rank's host. A collective of the whole world. Two machines that call themselves alike, as containers may,
    are told apart by the launcher's number of the node."""
    found = gather_objects((socket.gethostname(), os.environ.get("GROUP_RANK", "0")), mesh.world)
    alike = Counter(name for name, _ in set(found))
    names = tuple(name if alike[name] == 1 else f"{name} (node {node})" for name, node in found)
    return Hosts(names, {name: getattr(mesh, name).size for name in AXIS_NAMES})


def _spans(ranks: list[int]) -> str:
    """0-3, 8, 10-11 for 0 1 2 3 8 10 11."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
