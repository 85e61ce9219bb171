"""A replica's part of a global batch, as microbatches. Sample i of a global batch is the same on every topology."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from heiretsu.data.batches import TokenDataset
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.pipeline import Context, Microbatch
from heiretsu.run.config import RunConfig

Read = Callable[[range], tuple[torch.Tensor, torch.Tensor]]


def microbatches(config: RunConfig, mesh: Mesh, read: Read, step: int = 0, first: int = 0) -> list[Microbatch]:
    """This replica's share of global_batch_size samples, from sample `first` on.

    read: gives the inputs and the targets of a range of samples, each (B, T). step: what randomness is drawn from.
    """
    mine = first + mesh.replica.index * config.grad_accum_steps * config.batch_size
    batches = []
    for start in range(mine, mine + config.grad_accum_steps * config.batch_size, config.batch_size):
        inputs, targets = read(range(start, start + config.batch_size))
        batches.append(Microbatch(inputs.to(mesh.device), targets.to(mesh.device), Context(step, start)))
    return batches


def read_batches(config: RunConfig, mesh: Mesh, data: TokenDataset, step: int) -> list[Microbatch]:
    """This replica's microbatches of a training step."""
    return microbatches(config, mesh, lambda samples: data.batch(step, samples), step)


def evaluate(config: RunConfig, mesh: Mesh, engine: Engine, data: TokenDataset) -> dict[str, float]:
    """Mean loss over the first eval_iters global batches of the validation windows."""
    total = 0.0
    for iteration in range(config.eval_iters):
        first = iteration * config.global_batch_size
        total += engine.evaluate(microbatches(config, mesh, data.eval_batch, first=first))["loss"]
    loss = total / config.eval_iters
    bits = {} if data.bytes_per_token is None else {"eval_bits_per_byte": loss / math.log(2) / data.bytes_per_token}
    return {"eval_loss": loss, **bits}
