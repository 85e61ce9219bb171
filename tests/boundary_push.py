"""What crosses the boundaries of a pipeline, against one process: each stage's input, for many steps and both
schedules.

    torchrun --standalone --nproc_per_node=4 tests/boundary_push.py --dp 1 --tp 1 --pp 4 --steps 20 --micro_batches 8

Every hidden state that a stage receives is compared with that of the whole model at the same layer, microbatch and
step; its dtype must be that of the activations.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # torchrun puts this folder on the path, not the repository

import torch

from heiretsu.kernels import plain
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from tests.torchrun import config_of, gather, on_mesh, parser
from tests.training import OPS, dataset


def push(mesh, config, ops) -> tuple[list[float], dict]:
    """Losses, and {(layer, step, first sample): hidden state before it} for the layers that begin a stage somewhere."""
    engine = build_engine(config, mesh, ops)
    data = dataset(config.model.vocab_size, config.model.block_size)
    crossed: dict[tuple, torch.Tensor] = {}
    for stage in engine.stages:
        for block in stage.blocks.values():
            block.register_forward_pre_hook(lambda block, args: keep(crossed, block.layer, *args))
    reports = [engine.step(read_batches(config, mesh, data, step)) for step in range(flags.steps)]
    return [report.metrics["loss"] for report in reports], crossed


def keep(crossed, layer, hidden, context) -> None:
    crossed[layer, context.step, context.first_sample] = hidden.detach().cpu()


def verdict(mesh) -> dict[str, str]:
    found: dict[str, str] = {}
    for schedule in ("gpipe", "1f1b"):
        ours = gather(mesh, push(mesh, replace(config, schedule=schedule), OPS["fused" if flags.fused else "plain"]))
        if mesh.rank != 0:
            continue
        alone = replace(config, dp=1, ep=1, pp=1, tp=1, grad_accum_steps=config.grad_accum_steps * config.replicas)
        losses, hidden = push(abstract_mesh(device=mesh.device), alone, plain)
        found |= compare(schedule, ours, losses, hidden)
    return found


def compare(schedule, ours, losses, hidden) -> dict[str, str]:
    found, seen, worst = {}, set(), 0.0
    for rank, (their_losses, crossed) in enumerate(ours):
        gap = max(abs(a - b) / abs(b) for a, b in zip(their_losses, losses, strict=True))
        if not gap <= flags.thresh:
            found[f"{schedule} losses"] = f"rank {rank} differs by {gap:.1e}"
        for key, value in crossed.items():
            seen.add(key)
            gap = (value - hidden[key]).abs().max().item() / hidden[key].abs().max().item()
            worst = max(worst, gap)
            if value.dtype != hidden[key].dtype or not gap <= flags.thresh:
                found[f"{schedule} boundary"] = f"rank {rank}, (layer, step, sample) {key}: {gap:.1e}, {value.dtype}"
    if seen != hidden.keys():
        found[f"{schedule} microbatches"] = f"{len(hidden.keys() - seen)} of {len(hidden)} hidden states never arrived"
    print(f"{schedule}: {len(seen)} hidden states over {flags.steps} steps, largest relative difference {worst:.1e}")
    return found


flags = parser(__doc__).parse_args()
config = config_of(flags)
on_mesh(config, verdict)
