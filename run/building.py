"""From sizes and a mesh to an engine that is ready to step."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from heiretsu.model.gpt import build_stages
from heiretsu.model.seeding import initialise
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.placement import placement_table
from heiretsu.parallel.schedules import SCHEDULES
from heiretsu.parallel.updater import LossScaler, Updater
from heiretsu.run.config import RunConfig

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FP16_LOSS_SCALE = 2.0**16  # torch.amp.GradScaler's


def adamw(groups: list[dict[str, Any]], config: RunConfig) -> torch.optim.Optimizer:
    """Loshchilov and Hutter 2017, arXiv:1711.05101. groups: as `Updater` makes them."""
    lr, decay = config.learning_rate, config.weight_decay
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, weight_decay=decay, fused=True)


def build_engine(config: RunConfig, mesh: Mesh, ops: ModuleType, make_optimizer: Callable = adamw) -> Engine:
    """The run's engine on this rank, its stages initialised. ops: heiretsu.kernels.plain or .fused. make_optimizer:
    of parameter groups and config."""
    dtype = getattr(torch, config.dtype)
    compute_dtype = COMPUTE_DTYPES.get(config.amp, dtype)
    loss_scale = config.loss_scale or (FP16_LOSS_SCALE if config.amp == "fp16" else None)
    scaler = LossScaler(loss_scale, config.loss_scale_window) if loss_scale else None
    stages_per_rank = config.stages_per_rank
    schedule = SCHEDULES[config.schedule](mesh.pp.size, config.grad_accum_steps, stages_per_rank)
    stages = build_stages(config.model, mesh, ops, dtype, compute_dtype, config.seed, stages_per_rank)
    table = {name: place for stage in stages for name, place in placement_table(stage, mesh).items()}
    for stage in stages:
        initialise(stage, table, config.seed)
        if config.compile:
            for block in stage.blocks.values():
                block.compile()
    params = {name: param for stage in stages for name, param in stage.named_parameters()}
    updater = Updater(params, table, lambda groups: make_optimizer(groups, config), config.grad_clip, scaler)
    return Engine(stages, mesh, schedule, updater)
