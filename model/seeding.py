"""Random numbers as functions of what they belong to, never of who asks first.

Initial values are a function of (seed, the parameter's full name, global index): the whole tensor is drawn on the CPU
from a generator of its own, then sliced. A dropout site's seed is a function of (seed, step, layer, site).
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from heiretsu.parallel.placement import Placement, Table

INIT_STD = 0.02  # Radford et al. 2019


def fold(seed: int, *path: int | str) -> int:
    """A 63-bit seed for whatever `path` names, under the run's seed."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def initial_value(place: Placement, seed: int) -> torch.Tensor:
    """The whole parameter's initial value, float32 on the CPU, whatever the mesh and the run's dtype."""
    spec = place.spec
    whole = torch.full(spec.shape, spec.fill, dtype=torch.float32, device="cpu")
    if spec.std is not None:
        whole.normal_(0.0, spec.std, generator=torch.Generator("cpu").manual_seed(fold(seed, "init", place.name)))
    if spec.rows is not None:
        whole[spec.rows :] = 0.0  # padding
    return whole


@torch.no_grad()
def initialise(model: nn.Module, table: Table, seed: int) -> None:
    """Write this rank's pieces of the initial values into the model."""
    for name, param in model.named_parameters():
        param.copy_(table[name].local(initial_value(table[name], seed)))
