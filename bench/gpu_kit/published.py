"""What bench/results/audit.md says of each shipped configuration: the claims that a GPU can now contradict."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parents[1] / "results" / "audit.md"


@dataclass(frozen=True)
class Claim:
    """registers and spill_bytes of a thread; bound: the share of the tensor cores' peak that the other pipes leave
    possible, or, without a dot, the headroom over DRAM; None where there is none."""

    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_kib: float
    bound: float | None


def claims(arch: str) -> dict[str, Claim]:
    """{audit case: what is claimed of it} for an architecture (sm_90, ...); {} where nothing is."""
    text = FILE.read_text()
    section = re.search(rf"^### [^\n]*\({re.escape(arch)}\)\n\n(\| case .*?)\n\n", text, re.M | re.S)
    if not section:
        return {}
    header, _, *rows = (_cells(line) for line in section[1].splitlines())
    found = {}
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        warps, stages = map(int, cells["w/s"].split("/"))
        bound = None if cells["bound"] == "-" else float(cells["bound"])
        found[cells["case"]] = Claim(
            warps, stages, int(cells["regs"]), int(cells["spill B"]), float(cells["shared KiB"]), bound
        )
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]
