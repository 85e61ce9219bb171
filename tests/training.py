"""A few training steps of a tiny model on any mesh, and everything that two such runs can be compared by.

The reference is always the single process with the plain ops: what `python train.py` computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from heiretsu.kernels import fused, plain
from heiretsu.model.build import build_engine
from heiretsu.model.config import ModelConfig
from heiretsu.model.options import RunConfig, parse_args
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.pipeline import Microbatch

OPS = {"plain": plain, "fused": fused}

DENSE = ModelConfig(vocab_size=67, block_size=8, n_layer=4, n_head=4, n_embed=16)
MIXTURE = replace(DENSE, num_experts=4, top_k=2, moe_freq=2, aux_loss_coef=0.05)


@dataclass
class Trace:
    """What a run did on one rank. The numbers of each step are the same on all; tensors are this rank's pieces."""

    losses: list[float]
    aux_losses: list[float]
    grad_norms: list[float]
    expert_loads: list
    eval_losses: list[float]
    first_grads: dict[str, tuple]  # of step 0: name -> (shape of the whole, slices, piece)
    params: dict[str, tuple]


def run_config(model: ModelConfig, global_batch: int = 8, microbatches: int = 4, **changes) -> RunConfig:
    """float64, clipping on, a learning rate that moves things; global_batch is that of the step on any mesh."""
    base = parse_args(["--dtype", "float64", "--grad_clip", "0.5", "--learning_rate", "0.01"])
    config = replace(base, model=model, grad_accum_steps=microbatches, **changes)
    return replace(config, batch_size=global_batch // (microbatches * config.replicas))


def global_batch(config: RunConfig, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All sequences of a step: inputs, targets (sequences, T)."""
    generator = torch.Generator().manual_seed(100 + step)
    size = config.global_batch_size, config.model.block_size + 1
    tokens = torch.randint(config.model.vocab_size, size, generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def microbatches(config: RunConfig, mesh: Mesh, step: int) -> list[Microbatch]:
    """This replica's share of the global batch."""
    inputs, targets = global_batch(config, step)
    size, count = config.batch_size, config.grad_accum_steps
    first = mesh.replica.index * size * count
    starts = range(first, first + size * count, size)
    return [Microbatch(inputs[i : i + size], targets[i : i + size], i, step) for i in starts]


def train(mesh: Mesh, config: RunConfig, steps: int, ops: str = "plain") -> Trace:
    """Train, and keep what there is to compare. Runs on every rank of a mesh."""
    config = replace(config, dp=mesh.dp.size, ep=mesh.ep.size, pp=mesh.pp.size, tp=mesh.tp.size)
    engine = build_engine(config, mesh, OPS[ops])
    trace = Trace([], [], [], [], [], {}, {})
    engine.accumulate(microbatches(config, mesh, 0))
    trace.first_grads = pieces(engine, engine.grads)
    for step in range(steps):
        report = engine.step(microbatches(config, mesh, step))
        trace.losses.append(report.loss)
        trace.aux_losses.append(report.aux_loss)
        trace.grad_norms.append(report.grad_norm)
        trace.expert_loads.append(None if report.expert_load is None else report.expert_load.tolist())
    trace.eval_losses.append(engine.evaluate(microbatches(config, mesh, 999)))
    trace.params = pieces(engine, {name: param.detach() for name, param in engine.params.items()})
    return trace


def pieces(engine, tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {
        name: (engine.table[name].spec.shape, engine.table[name].local_slices, tensor.detach().clone().numpy())
        for name, tensor in tensors.items()
    }


def assemble(parts: list[dict[str, tuple]]) -> dict[str, torch.Tensor]:
    """Whole tensors from the pieces of all ranks. A missing piece stays NaN; copies of a piece must agree exactly."""
    whole: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, (shape, slices, piece) in part.items():
            piece = torch.from_numpy(piece)
            into = whole.setdefault(name, torch.full(shape, torch.nan, dtype=piece.dtype))[slices]
            unset = into.isnan()
            assert torch.equal(into[~unset], piece[~unset]), f"{name}: its copies differ between ranks"
            into[unset] = piece[unset]
    return whole


def difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative difference of any tensor (in its largest element), and its name.

    Raises AssertionError for a tensor that is missing, superfluous or not finite.
    """
    assert ours.keys() == reference.keys(), f"names differ: {sorted(ours.keys() ^ reference.keys())}"
    worst = (0.0, "none")
    for name, expected in reference.items():
        assert ours[name].isfinite().all(), f"{name} has elements that no rank holds, or that are not finite"
        scale = expected.abs().max().item() or 1.0
        worst = max(worst, ((ours[name] - expected).abs().max().item() / scale, name))
    return worst
