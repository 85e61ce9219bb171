"""Checkpoints that any topology can resume: torch.distributed.checkpoint, with shards as the placement table has them.

Each local piece is wrapped as a DTensor of its whole parameter, so that what is stored is the parameter, whatever the
mesh that wrote it. A save is complete or absent: it is written beside its place, then renamed into it.

    DIR/step_00000200/      run.json (step, config, counters), .metadata and *.distcp (tensors)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard

from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.optimizer import LossScaler

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAY_CHANGE = ("dropout", "aux_loss_coef")  # of a model whose parameters stay what they are


def save(directory: str | os.PathLike, step: int, engine: Engine, config: dict, keep: int) -> Path:
    """Save parameters, optimizer, scaler and counters after `step` steps. All ranks call it, on one file system.

    config: of the run, JSON; "model" in it is what a resumed run must have too. keep: older checkpoints beyond so many
    are deleted, once the new one is in place. Returns its path.
    """
    final = Path(directory) / f"step_{step:08d}"
    beside = final.with_name(f".{final.name}.part")
    mesh = engine.mesh
    if mesh.rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    _barrier(mesh)
    with _quiet():
        dcp.save(_tensors(engine), checkpoint_id=beside)
    if mesh.rank == 0:
        scaler = {"scale": engine.scaler.scale, "growth": engine.scaler.growth, "good_steps": engine.scaler.good_steps}
        run = {"format": FORMAT, "step": step, "optimizer_steps": _optimizer_steps(engine)}
        with open(beside / "run.json", "w") as file:
            json.dump({**run, "scaler": scaler, "config": config}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.replace(beside, final)
        for old in complete(directory)[:-keep]:
            shutil.rmtree(old)
    _barrier(mesh)
    return final


def load(path: str | os.PathLike, engine: Engine, config: dict) -> int:
    """Restore what `save` stored, on any mesh. Returns the number of steps that were done.

    Raises ValueError, by name, for a torn checkpoint, another format or another model.
    """
    run = _matching_run(path, config)
    for param in engine.params.values() if run["optimizer_steps"] else ():  # there are no moments before the first
        moments = {name: torch.zeros_like(param) for name in _MOMENTS}
        steps = torch.full((), float(run["optimizer_steps"]), dtype=torch.float32, device=param.device)
        engine.optimizer.state[param] = {"step": steps, **moments}
    with _quiet():
        dcp.load(_tensors(engine), checkpoint_id=Path(path))
    if run["scaler"]["growth"] == engine.scaler.growth:
        engine.scaler = LossScaler(**run["scaler"])
    return run["step"]


def load_parameters(path: str | os.PathLike, engine: Engine, config: dict) -> None:
    """The parameters alone, to begin a new run from. Raises ValueError like `load`."""
    _matching_run(path, config)
    tensors = {name: tensor for name, tensor in _tensors(engine).items() if name.startswith("model/")}
    with _quiet():
        dcp.load(tensors, checkpoint_id=Path(path))


def _matching_run(path: str | os.PathLike, config: dict) -> dict:
    """run.json, if it is of the model and dtype that config asks for."""
    run = read_run(path)
    theirs, ours = run["config"]["model"], config["model"]
    differing = [key for key in ours if theirs.get(key) != ours[key] and key not in _MAY_CHANGE]
    other = [f"{key} {theirs.get(key)} (this run: {ours[key]})" for key in differing]
    if other:
        raise ValueError(f"{path}: the checkpoint is of another model: {', '.join(other)}")
    if run["config"]["dtype"] != config["dtype"]:
        raise ValueError(f"{path}: the checkpoint has --dtype {run['config']['dtype']}, not {config['dtype']}")
    return run


def read_run(path: str | os.PathLike) -> dict:
    """The run.json of a complete checkpoint. ValueError if the folder is none."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such checkpoint")
    missing = [name for name in ("run.json", ".metadata") if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path}: not a complete checkpoint: {' and '.join(missing)} missing")
    run = json.loads((path / "run.json").read_text())
    if run.get("format") != FORMAT:
        raise ValueError(f"{path}: checkpoint format {run.get('format')}, only {FORMAT} can be read")
    return run


def complete(directory: str | os.PathLike) -> list[Path]:
    """The complete checkpoints in a folder, oldest first. What a broken save left behind is not among them."""
    folder = Path(directory)
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    whole = [path for path in found if (path / "run.json").is_file() and (path / ".metadata").is_file()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")))


def _tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Parameters and moments under their canonical names, sharing memory with the engine's."""
    tensors = {}
    for name, param in engine.params.items():
        tensors[f"model/{name}"] = _wrap(param.detach(), name, engine)
        for moment, value in engine.optimizer.state.get(param, {}).items():
            if moment in _MOMENTS:
                tensors[f"{moment}/{name}"] = _wrap(value, name, engine)
    return tensors


def _wrap(piece: torch.Tensor, name: str, engine: Engine) -> torch.Tensor:
    """A rank's piece as the whole tensor that it is of. With one process, the piece is the whole."""
    if engine.mesh.device_mesh is None:
        return piece
    shape, axes = torch.Size(engine.table[name].spec.shape), ("dp", "ep", "tp")
    shards = {axis: Shard(dim) for dim, axis in engine.table[name].spec.shards}
    placements = [shards.get(axis, Replicate()) for axis in axes]
    stride = torch.empty(shape, device="meta").stride()
    stage = engine.mesh.device_mesh[axes]  # the ranks that share this rank's pipeline stage
    return DTensor.from_local(piece, stage, placements, run_check=False, shape=shape, stride=stride)


def _optimizer_steps(engine: Engine) -> int:
    return max((int(state["step"]) for state in engine.optimizer.state.values()), default=0)


def _barrier(mesh: Mesh) -> None:
    if mesh.world.size > 1:
        dist.barrier()


@contextlib.contextmanager
def _quiet():
    """Without the warnings that torch.distributed.checkpoint gives a single process for being one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
