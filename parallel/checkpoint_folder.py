"""A run's folder of checkpoints: what is in it, what is whole, what is put there and taken away. Knows no tensors.

    DIR/step_00000200/      run.json (step, config, counters), .metadata and *.distcp (tensors)
                            checksums.json: size and SHA-256 of every other file, written last
    DIR/.step_00000300.part, .replaced, .deleted      what a save or a deletion was at when it was killed

A checkpoint is complete or absent: it is written beside its place, sealed by checksums.json and renamed into it, and is
renamed away before its files are deleted. So a process may be killed anywhere, and what has a name is whole; what has
none is cleared away by the next run (`tidy`). What a disk does to the files later, the checksums show.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from heiretsu.parallel.checkpoint_seal import (
    is_sealed,
    problem,
    read_json,
    read_run,
    step_of,
    sync_folder,
    verify,
)
from heiretsu.parallel.collectives import gather_objects
from heiretsu.parallel.mesh import Mesh

PART, REPLACED, DELETED = ".part", ".replaced", ".deleted"
_BESIDE = re.compile(rf"\.(step_\d{{8,15}})({PART}|{REPLACED}|{DELETED})")


def path_of(directory: str | os.PathLike, step: int) -> Path:
    return Path(directory) / f"step_{step:08d}"


def beside(path: Path, ending: str) -> Path:
    """The hidden neighbour of a checkpoint: no reader takes it for one."""
    return path.with_name(f".{path.name}{ending}")


def checkpoints(directory: str | os.PathLike) -> list[Path]:
    """Every folder with a checkpoint's name, oldest first, whole or not."""
    folder = Path(directory)
    found = [path for path in folder.iterdir() if step_of(path) >= 0] if folder.is_dir() else []
    return sorted((path for path in found if path.is_dir()), key=step_of)


def complete(directory: str | os.PathLike) -> list[Path]:
    """The checkpoints that have all their files in full length, oldest first. Their contents are not read."""
    return [path for path in checkpoints(directory) if not problem(read_run, path)]


def newest_whole(directory: str | os.PathLike, say: Callable[[str], None], mesh: Mesh | None = None) -> Path | None:
    """The newest checkpoint whose every file is as written; None in a folder without any. Says which it leaves out.

    With a mesh, all ranks call it, and each reads a share of the files. ValueError where there are some and all are
    damaged: to begin anew then is for the user to decide.
    """
    names = [path.name for path in checkpoints(directory)]
    if mesh:
        names = gather_objects(names, mesh.world)[0]  # as rank 0 sees them
    reasons: list[str] = []
    for name in reversed(names):
        if why := problem(verify, Path(directory, name), mesh):
            reasons.append(why)
            continue
        for reason in reasons:
            say(f"left out {reason}")
        say_if_unsealed(Path(directory, name), say)
        return Path(directory, name)
    if reasons:
        raise ValueError(f"{directory}: no checkpoint in it is whole: {'; '.join(reasons)}")
    return None


def say_if_unsealed(path: Path, say: Callable[[str], None]) -> None:
    if not is_sealed(path):
        say(f"{path}: of an earlier version, without checksums: whether it is as written cannot be checked")


def publish(part: Path, final: Path) -> None:
    """Rename a sealed folder into its place, in which an older one of the same step may lie."""
    old = beside(final, REPLACED)
    if final.exists():
        _remove(old)
        os.replace(final, old)  # killed from here to the next line, `tidy` takes this back
    os.replace(part, final)
    sync_folder(final.parent)
    _remove(old)


def rotate(directory: str | os.PathLike, keep: int) -> None:
    """Delete what is older than the newest `keep` whole ones. Damaged ones do not count: a whole one always stays."""
    whole = complete(directory)
    if len(whole) > keep:
        for path in checkpoints(directory):
            if step_of(path) < step_of(whole[-keep]):
                delete(path)


def delete(path: Path) -> None:
    away = beside(path, DELETED)
    _remove(away)
    os.replace(path, away)
    _remove(away)


def tidy(directory: str | os.PathLike) -> None:
    """Clear away what a killed run was writing or deleting. Only for who holds the folder."""
    folder = Path(directory)
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _BESIDE.fullmatch(path.name):
            final = folder / match[1]
            if match[2] == REPLACED and not final.exists():
                os.replace(path, final)
            else:
                _remove(path)


def set_aside(directory: str | os.PathLike, first_step: int, run_id: str) -> tuple[list[Path], Path | None]:
    """Move away what a run that goes on from first_step did not come from: later steps, and other runs' checkpoints.

    They would be taken for its own by --resume auto and by --keep. Nothing is deleted. Returns them and where they are.
    """
    foreign = [path for path in checkpoints(directory) if step_of(path) > first_step or _is_of_another(path, run_id)]
    if not foreign:
        return [], None
    into = next(path for number in count(1) if not (path := Path(directory, f"set_aside_{number}")).exists())
    into.mkdir()
    for path in foreign:
        os.replace(path, into / path.name)
    return foreign, into


def _remove(path: Path) -> None:
    """Delete a hidden folder; what cannot be deleted now is so by the next `tidy`, and is never read."""
    shutil.rmtree(path, ignore_errors=True)


def _is_of_another(path: Path, run_id: str) -> bool:
    try:
        return read_json(path / "run.json").get("run_id", run_id) != run_id
    except ValueError:
        return False
