"""What the parity scripts share: flags, the mesh that torchrun started, and the verdict.

    torchrun --standalone --nproc_per_node=4 tests/tests_equiv.py --dp 2 --tp 2

GPUs are used if there is one for each rank, else CPU processes with gloo. Rank 0 also runs the reference, one process
with the plain ops, and compares. Every rank exits with the same status: 0, or 1 on any difference.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from heiretsu.model.config import ModelConfig
from heiretsu.parallel.mesh import Mesh, make_mesh, process_groups
from heiretsu.run.config import RunConfig
from heiretsu.run.options import check
from tests.training import DENSE, MIXTURE, run_config

# Every axis divides it up to 4, and every stage of four has a layer; experts, when a mesh has ep, in half of the
# layers.
MODEL = replace(DENSE, n_embed=32, block_size=16)


def parser(what: str) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=what)
    for axis in ("dp", "ep", "tp", "pp"):
        flags.add_argument(f"--{axis}", type=int, default=1)
    flags.add_argument("--steps", type=int, default=int(os.environ.get("TRAIN_STEPS", 10)))
    flags.add_argument("--micro_batches", type=int, default=int(os.environ.get("MICRO_BATCHES", 8)))
    flags.add_argument("--thresh", type=float, default=float(os.environ.get("THRESH", 1e-4)), help="relative")
    flags.add_argument("--dtype", choices=("float32", "float64"), default="float64", help="float32 needs more --thresh")
    flags.add_argument("--schedule", choices=("gpipe", "1f1b"), default="1f1b")
    flags.add_argument("--fused", action="store_true", help="run the fused kernels on the mesh, plain in the reference")
    return flags


def model(flags: argparse.Namespace) -> ModelConfig:
    mixture = {name: getattr(MIXTURE, name) for name in ("num_experts", "top_k", "moe_freq", "aux_loss_coef")}
    return replace(MODEL, **mixture) if flags.ep > 1 else MODEL


def config_of(flags: argparse.Namespace) -> RunConfig:
    """A global batch of one sequence for each microbatch and replica."""
    mesh = {axis: getattr(flags, axis) for axis in ("dp", "ep", "pp", "tp")}
    batch = flags.micro_batches * flags.dp * flags.ep
    options = {"dtype": flags.dtype, "schedule": flags.schedule, "fused": flags.fused}
    return run_config(model(flags), batch, flags.micro_batches, **mesh, **options)


def on_mesh(config: RunConfig, verdict: Callable[[Mesh], dict[str, str]]) -> None:
    """Join the mesh, run `verdict` on every rank (its findings count on rank 0), print them, and exit."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    try:
        check(config, world_size)
    except ValueError as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= world_size
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    with process_groups("nccl" if on_gpu else "gloo", world_size):
        failed = on_rank(config, device, verdict)
    sys.exit(1 if failed else 0)


def on_rank(config: RunConfig, device: torch.device, verdict: Callable[[Mesh], dict[str, str]]) -> bool:
    mesh = make_mesh(config.dp, config.ep, config.pp, config.tp, device)
    found = [verdict(mesh)]
    if mesh.world.size > 1:
        dist.broadcast_object_list(found, src=0)
    if mesh.rank == 0:
        where = f"dp={config.dp} ep={config.ep} tp={config.tp} pp={config.pp} on {device.type}"
        for name, message in found[0].items():
            print(f"FAIL {where}: {name}: {message}", flush=True)
        print(f"{'FAILED' if found[0] else 'OK'} {where}", flush=True)
    return bool(found[0])


def gather(mesh: Mesh, value) -> list:
    """Every rank's value, by rank, on rank 0; an empty list on the others."""
    if mesh.world.size == 1:
        return [value]
    values: list | None = [None] * mesh.world.size if mesh.rank == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []
