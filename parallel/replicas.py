"""Copies that must be equal: a digest of every parameter and optimizer piece, compared over all ranks that hold it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from heiretsu.parallel.collectives import gather_objects
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.placement import Piece

_AT_ONCE = 2**24  # elements: a digest needs 16 bytes for each
_PRIME = 0x1000003


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """A number of a tensor's bits and their places: an int64 scalar, on its device.

    A sum modulo 2**64 of each element's bits times an odd number of its index: any one changed element changes it.
    """
    flat = tensor.detach().contiguous().flatten()
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _AT_ONCE):
        part = bits[start : start + _AT_ONCE].to(torch.int64)
        index = torch.arange(start, start + part.numel(), device=tensor.device)
        total = total + ((part ^ (part >> 29)) * (2 * _PRIME * index + 1)).sum()
    return total


def first_difference(pieces: Mapping[str, Piece], mesh: Mesh) -> str:
    """The first parameter, or state of it, whose copies differ, and what which ranks hold; "" if none do.

    pieces: `Updater.pieces`. All ranks call it together, and get the same answer. Ranks hold copies of a piece where
    its name and its place in the whole tensor are the same: over the axes that do not split it, and over the stages
    that share it.
    """
    keys = [
        (name, tuple((part.start, part.stop) for part in piece.place.local_slices)) for name, piece in pieces.items()
    ]
    digests = torch.stack([digest(piece.tensor).to(mesh.device) for piece in pieces.values()]).tolist()
    holders: dict[tuple, dict[int, list[int]]] = {}
    order: dict[tuple, tuple] = {}
    everyone = gather_objects((mesh.pp.index, list(zip(keys, digests, strict=True))), mesh.world)
    for rank, (stage, theirs) in enumerate(everyone):
        for index, (key, value) in enumerate(theirs):
            holders.setdefault(key, {}).setdefault(value, []).append(rank)
            order.setdefault(key, (stage, index))
    differing = [key for key, values in holders.items() if len(values) > 1]
    if not differing:
        return ""
    first = min(differing, key=order.__getitem__)
    kind, _, name = first[0].partition("/")
    groups = [f"rank {', '.join(map(str, ranks))}" for ranks in holders[first].values()]
    return f"{name}{'' if kind == 'model' else f' ({kind})'} differs between {' and '.join(groups)}"
