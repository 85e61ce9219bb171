"""A run's state as its checkpoints hold it, and back: the updater's pieces, its facts, and the run's configuration."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from heiretsu.model.config import ModelConfig
from heiretsu.parallel import checkpoint
from heiretsu.parallel.checkpoint_seal import read_run, verify
from heiretsu.parallel.engine import Engine

# Of a model whose parameters stay what they are; the rest of it cannot differ from the checkpoint's.
MAY_CHANGE = ("dropout", "aux_loss_coef")


def save(directory: str | os.PathLike, step: int, engine: Engine, config: dict, keep: int, **facts: Any) -> Path:
    """Save what the engine has come to after `step` steps. All ranks call it. Returns the checkpoint's path.

    config: of the run, JSON. keep, and what is raised: see `checkpoint.save`. facts: more for run.json.
    """
    return checkpoint.save(directory, step, engine.updater.pieces(), facts_of(engine, config, facts), keep)


def facts_of(engine: Engine, config: dict, facts: dict[str, Any]) -> dict[str, Any]:
    """What run.json holds besides step and format."""
    return {**engine.updater.facts(), **facts, "config": config}


def load(path: str | os.PathLike, engine: Engine, config: dict, verified: bool = False) -> int:
    """Restore what `save` stored, on any mesh. Returns the number of steps that were done. All ranks call it.

    verified: `verify` has passed it just now. Raises ValueError, in one line, for a torn or damaged checkpoint, another
    format, model or optimizer.
    """
    run = _matching_run(path, engine, config, verified)
    engine.updater.restore(run)
    pieces = engine.updater.pieces()
    split = [[name.partition("/") for name in names] for names in (checkpoint.stored_shapes(path), pieces)]
    theirs, ours = ({kind for kind, _, name in names if name in engine.params} for names in split)
    if theirs != ours:
        held, kept = (" and ".join(sorted(kinds - {"model"})) or "nothing" for kinds in (theirs, ours))
        raise ValueError(
            f"{path}: of another optimizer: it holds {held} of each parameter, and this run's keeps {kept}"
        )
    checkpoint.read(path, pieces)
    return run["step"]


def load_parameters(path: str | os.PathLike, engine: Engine, config: dict, verified: bool = False) -> None:
    """The parameters alone, to begin a new run from. Raises ValueError like `load`."""
    _matching_run(path, engine, config, verified)
    pieces = engine.updater.pieces()
    checkpoint.read(path, {name: piece for name, piece in pieces.items() if name.startswith("model/")})


def _matching_run(path: str | os.PathLike, engine: Engine, config: dict, verified: bool) -> dict:
    """run.json, if the checkpoint is whole, and of the model and dtype that config asks for."""
    if not verified:
        verify(path, engine.mesh)
    run = read_run(path)
    # An earlier version did not know a field: its models were what the default says.
    theirs, ours = asdict(ModelConfig()) | run["config"]["model"], config["model"]
    differing = [key for key in ours if theirs[key] != ours[key] and key not in MAY_CHANGE]
    other = [f"{key} {theirs[key]} (this run: {ours[key]})" for key in differing]
    if other:
        raise ValueError(f"{path}: the checkpoint is of another model: {', '.join(other)}")
    if run["config"]["dtype"] != config["dtype"]:
        raise ValueError(f"{path}: the checkpoint has --dtype {run['config']['dtype']}, not {config['dtype']}")
    return run
