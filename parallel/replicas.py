"""Copies that must be equal: a digest of every parameter and optimizer piece, compared over all ranks that hold it."""

from __future__ import annotations

import torch

from heiretsu.parallel.collectives import gather_objects
from heiretsu.parallel.engine import Engine

_PIECE = 2**24  # elements at a time: a digest needs 16 bytes for each
_PRIME = 0x1000003


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """A number of a tensor's bits and their places: an int64 scalar, on its device.

    A sum modulo 2**64 of each element's bits times an odd number of its index: any one changed element changes it.
    """
    flat = tensor.detach().contiguous().flatten()
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _PIECE):
        piece = bits[start : start + _PIECE].to(torch.int64)
        index = torch.arange(start, start + piece.numel(), device=tensor.device)
        total = total + ((piece ^ (piece >> 29)) * (2 * _PRIME * index + 1)).sum()
    return total


def first_difference(engine: Engine) -> str:
    """The first parameter, or moment of it, whose copies differ, and what which ranks hold; "" if none do.

    All ranks call it together, and get the same answer. Ranks hold copies of a piece where its name and its place in
    the whole tensor are the same: over the axes that do not split it, and over the stages that share a tied one.
    """
    keys: list[tuple] = []
    digests: list[torch.Tensor] = []
    for index, (name, param) in enumerate(engine.params.items()):
        place = tuple((part.start, part.stop) for part in engine.table[name].local_slices)
        state = engine.optimizer.state.get(param, {})
        for what, tensor in [("", param), *((f" ({key})", value) for key, value in state.items())]:
            if isinstance(tensor, torch.Tensor):
                keys.append((engine.mesh.pp.index, index, name + what, place))
                digests.append(digest(tensor).to(engine.mesh.device))
    mine = dict(zip(keys, torch.stack(digests).tolist(), strict=True))
    holders: dict[tuple, dict[int, list[int]]] = {}
    order: dict[tuple, tuple] = {}
    for rank, theirs in enumerate(gather_objects(mine, engine.mesh.world)):
        for (stage, index, name, place), value in theirs.items():
            holders.setdefault((name, place), {}).setdefault(value, []).append(rank)
            order.setdefault((name, place), (stage, index))
    differing = [key for key, values in holders.items() if len(values) > 1]
    if not differing:
        return ""
    name, place = min(differing, key=order.__getitem__)
    groups = [f"rank {', '.join(map(str, ranks))}" for ranks in holders[name, place].values()]
    return f"{name} differs between {' and '.join(groups)}"
