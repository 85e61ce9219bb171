"""A checkpoint as one whole model on one device, whatever the mesh that saved it: for sampling and for export."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed.checkpoint as dcp

from heiretsu.model.config import ModelConfig
from heiretsu.model.gpt import GPT
from heiretsu.parallel.checkpoint import complete, read_run
from heiretsu.parallel.mesh import abstract_mesh


def newest(path: str | os.PathLike) -> Path:
    """The checkpoint itself where `path` is one, else the newest of the run's folder. ValueError if there is none."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    if (path / "run.json").is_file():
        return path
    found = complete(path)
    if not found:
        raise ValueError(f"{path}: neither a complete checkpoint nor a folder that holds one (step_*/run.json)")
    return found[-1]


def load_model(path: str | os.PathLike, ops: ModuleType, device: str | torch.device = "cpu") -> tuple[GPT, dict]:
    """The whole model of a checkpoint, in the precision of its parameters, and what its run.json says.

    path: one step's folder, or a run's, whose newest is taken. ops: heiretsu.kernels.plain or .fused. Raises
    ValueError, in one line, for a torn checkpoint or one of another format.
    """
    path = newest(path)
    run = read_run(path)
    dtype = getattr(torch, run["config"]["dtype"])
    model = GPT(ModelConfig(**run["config"]["model"]), abstract_mesh(device=device), ops, dtype=dtype)
    tensors = {f"model/{name}": param.detach() for name, param in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process, and no process group
        dcp.load(tensors, checkpoint_id=path)
    return model.eval(), run
