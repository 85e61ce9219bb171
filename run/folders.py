"""The folders that a run writes to: made and tried before anything is built, and held for as long as it runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from heiretsu.parallel.checkpoint_folder import tidy
from heiretsu.parallel.collectives import gather_objects
from heiretsu.parallel.mesh import Mesh
from heiretsu.run.config import RunConfig
from heiretsu.run.lock import FolderLock


def agreed(mesh: Mesh, work: Callable[[], None]) -> None:
    """work() on this rank; a ValueError or OSError of any rank is a ValueError on all. A collective."""
    mine = None
    try:
        work()
    except (ValueError, OSError) as error:
        mine = str(error)
    for rank, why in enumerate(gather_objects(mine, mesh.world)):
        if why:
            raise ValueError(why if rank == 0 else f"{why} (on rank {rank})")


@contextlib.contextmanager
def held_folder(config: RunConfig, mesh: Mesh, say: Callable[[str], None] = print) -> Iterator[None]:
    """The folder of --checkpoint_dir is this run's alone, and what a killed run left half done in it is cleared away.

    All ranks call it. Raises ValueError, on all ranks, in one line, if another run is in it.
    """
    lock: FolderLock | None = None

    def take() -> None:
        nonlocal lock
        if config.checkpoint_dir and mesh.rank == 0:
            lock = FolderLock(config.checkpoint_dir)
            if warning := lock.take():
                say(f"warning: {warning}")
            tidy(config.checkpoint_dir)

    try:
        agreed(mesh, take)
        yield
    finally:
        if lock:
            lock.release()


def make_folders(config: RunConfig, rank: int) -> None:
    """Make what this rank writes to. ValueError, with the flag, where that cannot be."""
    if config.checkpoint_dir:
        _make("--checkpoint_dir", Path(config.checkpoint_dir), rank)
    if config.profile:
        _make("--profile", Path(config.profile), rank)
    if config.log_file and rank == 0:
        file = Path(config.log_file)
        _make("--log_file", file.parent, rank)
        if file.exists():
            try:
                open(file, "r+b").close()
            except OSError as error:
                raise ValueError(f"--log_file {file} cannot be written: {error.strerror}") from error


def _make(flag: str, folder: Path, rank: int) -> None:
    """By trying, because permissions do not tell of a file system that is full or read-only."""
    probe = folder / f".writable.{rank}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{flag}: cannot write to the folder {folder}: {error.strerror}") from error
