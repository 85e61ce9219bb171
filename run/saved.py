"""A checkpoint as one whole model on one device, whatever the mesh that saved it: for sampling and for export."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from heiretsu.model.config import ModelConfig
from heiretsu.model.gpt import GPT
from heiretsu.parallel import checkpoint
from heiretsu.parallel.checkpoint_folder import newest_whole, say_if_unsealed
from heiretsu.parallel.checkpoint_seal import brief, read_run, verify
from heiretsu.parallel.mesh import Mesh, abstract_mesh
from heiretsu.parallel.placement import Piece, placement_table
from heiretsu.run.options import check_model


def newest_in(path: str | os.PathLike, say: Callable[[str], None], mesh: Mesh | None = None) -> Path:
    """The checkpoint itself where `path` is one, else the newest whole one of the run's folder.

    Every file of it has been read against its checksum. ValueError if there is none. With a mesh, all ranks call it,
    and each reads a share. say: prints a line.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    if (path / "run.json").is_file():
        verify(path, mesh)
        say_if_unsealed(path, say)
        return path
    found = newest_whole(path, say, mesh)
    if found is None:
        raise ValueError(f"{path}: neither a complete checkpoint nor a folder that holds one (step_*/run.json)")
    return found


def load_model(
    path: str | os.PathLike, ops: ModuleType, device: str | torch.device = "cpu", verified: bool = False
) -> tuple[GPT, dict]:
    """The whole model of a checkpoint, in the precision of its parameters, and what its run.json says.

    path: one step's folder, or a run's, whose newest whole one is taken; verified: it is from `newest_in`. ops:
    heiretsu.kernels.plain or .fused. ValueError, in one line, for a damaged checkpoint, or one of another format.
    """
    path = Path(path) if verified else newest_in(path, say_on_stderr)
    run = read_run(path)
    config = _model_config(path, run)
    dtype = getattr(torch, run["config"]["dtype"])
    mesh = abstract_mesh(device=device)
    model = GPT(config, mesh, ops, dtype=dtype)
    table = placement_table(model, mesh)
    named = model.named_parameters()
    checkpoint.read(path, {f"model/{name}": Piece(param.detach(), table[name]) for name, param in named})
    return model.eval(), run


def _model_config(path: Path, run: dict) -> ModelConfig:
    """The model that run.json describes, if the checkpoint's tensors are of its shapes. Allocates nothing."""
    stored = {
        name.removeprefix("model/"): shape for name, shape in checkpoint.stored_shapes(path).items() if "model/" in name
    }
    try:
        config = ModelConfig(**run["config"]["model"])
        check_model(config)
        if config.n_layer > len(stored):
            raise ValueError(f"{config.n_layer} layers, but {len(stored)} tensors")
        model = GPT(config, abstract_mesh(device="meta"), ops=None)
        for name, param in model.named_parameters():
            if stored.get(name) != tuple(param.shape):
                raise ValueError(f"{name} is {tuple(param.shape)}, not {stored.get(name)} as stored")
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: of a size beyond 64 bits
        raise ValueError(f"{path}: run.json has no model that its tensors are of ({brief(error)}): damaged") from error
    return config


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
