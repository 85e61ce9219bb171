"""Where a run begins: which checkpoint it goes on from, and what has changed since that was saved."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heiretsu.parallel.checkpoint_folder import complete, newest_whole, set_aside
from heiretsu.parallel.checkpoint_seal import read_run, step_of
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import Mesh
from heiretsu.run.config import RunConfig
from heiretsu.run.folders import agreed
from heiretsu.run.saved import newest_in
from heiretsu.run.state import MAY_CHANGE, load, load_parameters

# What decides the numbers of a run, besides the model and the data. Topology, schedule and kernels do not.
_DECIDE = "seed tokenizer learning_rate warmup_iters min_lr weight_decay betas grad_clip amp".split()
_NAMES = {key: f"--{key}" for key in (*_DECIDE, *MAY_CHANGE)}
_NAMES |= {"batch": "sequences of a step", "decay": "--max_iters with --min_lr"}


@dataclass(frozen=True)
class Origin:
    """What a run goes on from. path: None for a new run. run_id: of the run, and of all that it is resumed in."""

    path: Path | None
    run_id: str


def named_checkpoint(config: RunConfig) -> Path | None:
    """What --resume names, as this rank sees it before the ranks meet: a path, or the newest complete checkpoint of a
    folder. Whether there is any, and whole, is `find_origin`'s to check."""
    if config.resume == "none":
        return None
    path = Path(config.checkpoint_dir if config.resume == "auto" else config.resume)
    return path if (path / "run.json").is_file() else (complete(path) or [None])[-1]


def find_origin(config: RunConfig, mesh: Mesh, say: Callable[[str], None]) -> Origin:
    """The checkpoint that --resume names: one step's folder, or the newest whole one of a folder; for `auto` of
    --checkpoint_dir, if there is any. Every file of it has been read against its checksum; each rank read a share.

    All ranks call it. say: prints a line, on rank 0. Raises ValueError, on all ranks, where none is whole.
    """
    path = None
    if config.resume == "auto":
        path = newest_whole(config.checkpoint_dir, say, mesh)
    elif config.resume != "none":
        path = newest_in(config.resume, say, mesh)
    if path is None:
        return Origin(None, secrets.token_hex(4))
    run_id = read_run(path).get("run_id")
    return Origin(path, run_id if isinstance(run_id, str) else secrets.token_hex(4))


def check_changes(config: RunConfig, origin: Origin, data: str, say: Callable[[str], None]) -> None:
    """Say what decides the numbers and has changed since the checkpoint. ValueError unless --allow_changes."""
    saved = None if origin.path is None else read_run(origin.path)
    # An imported checkpoint of step 0 has no numbers yet, and a run without steps left will have no others.
    if saved is None or saved["step"] == 0 or saved["step"] >= config.max_iters:
        return
    changed = changes(saved, config.as_json(), data)
    if changed and not config.allow_changes:
        raise ValueError(
            f"{origin.path}: going on would not give the run that was saved: {', '.join(changed)}: give what it had, "
            f"or --allow_changes"
        )
    for change in changed:
        say(f"changed: {change}")


def changes(theirs: dict[str, Any], ours: dict[str, Any], data: str) -> list[str]:
    """What decides a run's numbers and is not as in the checkpoint, in the words of the flags.

    theirs: its run.json. ours: this run's config, as JSON. data: digest of this run's training data. What an earlier
    version did not write down is taken to be the same.
    """
    before = theirs["config"]
    old, new = {**before, **_derived(before)}, {**ours, **_derived(ours)}
    found = [
        f"{name} {_show(new[key])} (the checkpoint: {_show(old[key])})"
        for key, name in _NAMES.items()
        if key in old and key in new and old[key] != new[key]
    ]
    if theirs.get("data") not in (None, data):
        found.append("the training data has other tokens")
    return found


def _derived(config: dict[str, Any]) -> dict[str, Any]:
    """The values that are made of several flags: a global batch may be cut up in any way."""
    derived = {key: config["model"][key] for key in MAY_CHANGE if key in config["model"]}
    sizes = [config.get(key) for key in ("batch_size", "grad_accum_steps", "dp", "ep")]
    if all(isinstance(size, int) for size in sizes):
        derived["batch"] = math.prod(sizes)
    if config.get("min_lr") is not None:
        derived["decay"] = config.get("max_iters")
    return derived


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def restore(config: RunConfig, engine: Engine, origin: Origin, say: Callable[[str], None]) -> int:
    """Load the checkpoint into the engine, or the parameters of --init_from. Returns the step to go on with.

    All ranks call it. Raises ValueError where what is stored is of another model, or damaged.
    """
    first_step = 0
    if origin.path is not None:
        first_step = load(origin.path, engine, config.as_json(), verified=True)
        left = "" if first_step < config.max_iters else ": nothing is left to do"
        say(f"resumed {origin.path}: {first_step} of {config.max_iters} steps are done{left}")
    elif config.init_from:
        path = newest_in(config.init_from, say, engine.mesh)
        load_parameters(path, engine, config.as_json(), verified=True)
        say(f"parameters of {path}")
    make_room(config, engine.mesh, origin, first_step, say)
    return first_step


def make_room(config: RunConfig, mesh: Mesh, origin: Origin, first_step: int, say: Callable[[str], None]) -> None:
    """Move aside the checkpoints of --checkpoint_dir that this run did not come from. All ranks call it."""

    def move() -> None:
        if mesh.rank == 0:
            moved, into = set_aside(config.checkpoint_dir, first_step, origin.run_id)
            if moved:
                steps = ", ".join(str(step_of(path)) for path in moved)
                say(f"{config.checkpoint_dir}: step {steps} is not what this run came from, and was moved to {into}")

    if config.checkpoint_dir:
        agreed(mesh, move)
