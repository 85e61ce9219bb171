"""Which rank is slow: each rank's own time in a step, waiting left out, against that of the others."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from heiretsu.parallel.mesh import AXIS_NAMES, Mesh, abstract_mesh

SLOW, IN_A_ROW = 2.0, 10  # so far above the median, for so many steps, is worth a line


class Stragglers:
    """Compares a rank with those of its own pipeline stage, as stages differ by design; with all where it is alone."""

    def __init__(self, mesh: Mesh):
        dp, ep, pp, tp = (getattr(mesh, name).size for name in AXIS_NAMES)
        self.meshes = [abstract_mesh(dp, ep, pp, tp, rank) for rank in range(mesh.world.size)]
        stages = [[m.rank for m in self.meshes if m.pp.index == stage] for stage in range(mesh.pp.size)]
        self.peers = [stages[m.pp.index] if len(stages[0]) > 1 else list(mesh.world.ranks) for m in self.meshes]
        self.suspect = self.count = 0

    def update(self, compute_s: Sequence[float]) -> dict[str, float]:
        """A step's times by rank. Returns what the log gets; `line` names a rank that has long been slow, if any."""
        medians = [statistics.median_low([compute_s[peer] for peer in peers]) for peers in self.peers]
        ratios = [own / (median or 1.0) for own, median in zip(compute_s, medians, strict=True)]
        slowest = max(range(len(ratios)), key=ratios.__getitem__)
        ratio = ratios[slowest]
        self.count = self.count + 1 if slowest == self.suspect and ratio >= SLOW else int(ratio >= SLOW)
        self.suspect = slowest
        self.line = ""
        if self.count == IN_A_ROW:
            self.line = (
                f"slow: for {IN_A_ROW} steps {self.meshes[slowest].coordinates()} has taken over {SLOW:.0f} times the "
                f"median of its stage for its own part, {1000 * compute_s[slowest]:.0f} ms in this one"
            )
        return {"slowest_rank": slowest, "slowest_over_median": round(ratio, 3)}
