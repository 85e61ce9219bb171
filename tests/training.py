"""A few training steps of a tiny model on any mesh, and everything that two such runs can be compared by.

The reference is always the single process with the plain ops: what `python train.py` computes. Data is read by
a run's own reader and steps are taken by the real engine.
"""

from __future__ import annotations

import functools
import math
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from heiretsu.data.batches import TokenDataset
from heiretsu.kernels import fused, plain
from heiretsu.model.config import ModelConfig
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import Mesh, abstract_mesh
from heiretsu.run import batches
from heiretsu.run.building import build_engine
from heiretsu.run.config import RunConfig
from heiretsu.run.options import parse_args

TRAIN = str(Path(__file__).parents[1] / "train.py")
OPS = {"plain": plain, "fused": fused}

DENSE = ModelConfig(vocab_size=67, block_size=8, n_layer=4, n_head=4, n_embed=16)
MIXTURE = replace(DENSE, num_experts=4, top_k=2, moe_freq=2, aux_loss_coef=0.05)


def train_here(*flags: str) -> None:
    """`python train.py ...` in this process, without one of its own. It may end by SystemExit, as that may."""
    with patch.object(sys, "argv", [TRAIN, *flags]):
        runpy.run_path(TRAIN, run_name="__main__")


@dataclass
class Trace:
    """What a run did, on one rank. Numbers of the steps are the same on all ranks; tensors are this rank's pieces.

    A piece is (shape of the whole tensor, this rank's slices, values).
    """

    losses: list[float] = field(default_factory=list)
    aux_losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skips: list[bool] = field(default_factory=list)
    expert_loads: list = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    first_grads: dict[str, tuple] = field(default_factory=dict)
    params: dict[str, tuple] = field(default_factory=dict)


def run_config(model: ModelConfig, global_batch: int = 8, microbatches: int = 4, **changes) -> RunConfig:
    """float64, clipping on, a learning rate that moves things; global_batch is that of the step on any mesh."""
    base = parse_args(["--dtype", "float64", "--grad_clip", "0.5", "--learning_rate", "0.01"], world_size=1)
    config = replace(base, model=model, grad_accum_steps=microbatches, **changes)
    batch_size, rest = divmod(global_batch, microbatches * config.replicas)
    assert batch_size and not rest, (
        f"{global_batch} sequences in {microbatches} microbatches on {config.replicas} replicas"
    )
    return replace(config, batch_size=batch_size)


@functools.cache
def dataset(vocab_size: int, block_size: int) -> TokenDataset:
    tokens = np.random.default_rng(5).integers(vocab_size, size=4096).astype(np.uint16)
    return TokenDataset([tokens], block_size, seed=11, vocab_size=vocab_size)


def run_steps(
    mesh: Mesh, config: RunConfig, steps: int, ops: str = "plain", overflow_at: tuple[int, ...] = ()
) -> Trace:
    """Train on this rank, and keep what there is to compare.

    overflow_at: steps at which one element of the gradient is made infinite on the last rank, after the averaging.
    """
    engine = build_engine(config, mesh, OPS[ops])
    data = dataset(config.model.vocab_size, config.model.block_size)
    trace = Trace()
    engine.accumulate(batches.read_batches(config, mesh, data, 0))
    trace.first_grads = pieces(engine, engine.updater.grads)
    for step in range(steps):
        with_overflow(engine, step in overflow_at and mesh.rank == mesh.world.size - 1)
        report = engine.step(batches.read_batches(config, mesh, data, step))
        trace.losses.append(report.metrics["loss"])
        trace.aux_losses.append(report.metrics["aux_loss"])
        trace.grad_norms.append(report.grad_norm)
        trace.skips.append(report.skipped)
        load = report.metrics.get("expert_load")
        trace.expert_loads.append(None if load is None else load.tolist())
    trace.eval_losses.append(batches.evaluate(replace(config, eval_iters=2), mesh, engine, data)["eval_loss"])
    trace.params = pieces(engine, {name: param.detach() for name, param in engine.params.items()})
    return trace


def with_overflow(engine: Engine, here: bool) -> None:
    """Make the engine's next averaged gradient infinite on this rank, or as it should be."""
    averager = engine.updater.averager
    averager.__dict__.pop("finish", None)
    if here:

        def finish():
            type(averager).finish(averager)
            averager.buckets[0].flat[0] = math.inf

        averager.finish = finish


def single_process(config: RunConfig, steps: int, device: str | torch.device = "cpu", **options) -> Trace:
    """The reference for a run on any mesh: the same global batch in one microbatch after another on one process."""
    alone = replace(config, dp=1, ep=1, pp=1, tp=1, batch_size=config.batch_size * config.replicas)
    return run_steps(abstract_mesh(device=device), alone, steps, **options)


def pieces(engine: Engine, tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {
        name: (engine.table[name].spec.shape, engine.table[name].local_slices, tensor.detach().cpu().numpy().copy())
        for name, tensor in tensors.items()
    }


def assemble(parts: Sequence[dict[str, tuple]]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Whole tensors from the pieces of all ranks, and by name how far the copies of a piece differ.

    An element that no rank holds stays NaN.
    """
    whole: dict[str, torch.Tensor] = {}
    disagreement: dict[str, float] = {}
    for part in parts:
        for name, (shape, slices, values) in part.items():
            values = torch.from_numpy(values)
            into = whole.setdefault(name, torch.full(shape, torch.nan, dtype=values.dtype))[slices]
            unset = into.isnan()
            if not unset.all():
                gap = (into - values)[~unset].abs().max().item()
                disagreement[name] = max(disagreement.get(name, 0.0), gap)
            into[unset] = values[unset]
    return whole, disagreement


def failures(traces: Sequence[Trace], reference: Trace, tolerance: float) -> dict[str, str]:
    """{name of the check: what it found}, empty if the run on a mesh is the reference's. All tolerances are
    relative."""
    found: dict[str, str] = {}
    curves = {
        "losses": "loss",
        "aux_losses": "balance loss",
        "grad_norms": "gradient norm",
        "eval_losses": "evaluation",
    }
    for rank, trace in enumerate(traces):
        for key, check in curves.items():
            for step, (ours, theirs) in enumerate(zip(getattr(trace, key), getattr(reference, key), strict=True)):
                if not (abs(ours - theirs) <= tolerance * abs(theirs) or (math.isnan(ours) and math.isnan(theirs))):
                    found.setdefault(check, f"rank {rank}, step {step}: {ours!r}, not {theirs!r}")
        if trace.skips != reference.skips:
            found.setdefault("agreed skip", f"rank {rank} skipped {trace.skips}, not {reference.skips}")
        if trace.expert_loads != reference.expert_loads:
            found.setdefault("expert load", f"rank {rank}: tokens went to other experts")
    for key, check in {"first_grads": "gradients", "params": "parameters"}.items():
        ours, disagreement = assemble([getattr(trace, key) for trace in traces])
        theirs, _ = assemble([getattr(reference, key)])
        for name, gap in disagreement.items():
            if gap > 0.0:
                found.setdefault(f"copies of {check}", f"{name}: ranks that hold the same piece differ by {gap:.1e}")
        for name, problem in differences(ours, theirs, tolerance).items():
            found.setdefault(check, f"{name}: {problem}")
    return found


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> dict[str, str]:
    """By name, what is wrong with a tensor: missing, superfluous, not finite, or further off than tolerance allows.

    The difference is taken in its largest element, relative to the largest element of the reference.
    """
    found = {name: "on one side only" for name in ours.keys() ^ theirs.keys()}
    for name in ours.keys() & theirs.keys():
        scale = theirs[name].abs().max().item() or 1.0
        gap = (ours[name] - theirs[name]).abs().max().item() / scale
        if not gap <= tolerance:  # NaN too
            found[name] = f"differs by {gap:.1e} of its largest element, {tolerance:.0e} allowed"
    return found
