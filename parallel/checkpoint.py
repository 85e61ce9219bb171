"""Checkpoints that any topology can resume: torch.distributed.checkpoint, with shards as the placement table has them.

A checkpoint is a set of pieces, by name, and of facts, in run.json. Each piece is wrapped as a DTensor of the whole
tensor, so that what is stored is that, whatever the mesh that wrote it. Whose pieces they are is not known here;
checkpoint_seal.py knows what makes a checkpoint whole, and checkpoint_folder.py where it lies.

How a save comes about: every rank writes its file into the hidden folder and hashes it; rank 0, which
torch.distributed.checkpoint tells when all have, writes .metadata, run.json and then checksums.json, renames the folder
into its place and deletes older ones; and all ranks learn how it went. An error on any rank is an error on all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Replicate, Shard

from heiretsu.parallel.checkpoint_folder import PART, beside, path_of, publish, rotate
from heiretsu.parallel.checkpoint_seal import FORMAT, brief, fingerprint, seal, write_json
from heiretsu.parallel.mesh import WITHIN_STAGE
from heiretsu.parallel.placement import Piece, Placement


class SaveError(RuntimeError):
    """A save that came to nothing; in one line, with the rank that it failed on. What was there before is untouched."""


def save(
    directory: str | os.PathLike, step: int, pieces: Mapping[str, Piece], facts: Mapping[str, Any], keep: int
) -> Path:
    """Save this rank's pieces, as they are after `step` steps. All ranks call it, on one file system.

    facts: for run.json, besides step and format; what must be among them, `read_run` checks. keep: older checkpoints
    beyond so many are deleted, once the new one is in place. Returns its path. Raises SaveError, on every rank alike.
    """
    writer = _Writer(directory, keep, {"format": FORMAT, "step": step, **facts})
    with _quiet(), writer.or_nothing():
        dcp.save(_wrapped(pieces), storage_writer=writer)
    return writer.final


def start(
    directory: str | os.PathLike,
    step: int,
    pieces: Mapping[str, Piece],
    facts: Mapping[str, Any],
    keep: int,
    group: dist.ProcessGroup | None,
    copies: Copies,
    by_first: bool = False,
) -> Saving:
    """The same in the background: returns once the state is copied, and training may go on.

    group: of all ranks, on the CPU, and for nothing but this. copies: in use until the save is done, so that only one
    can be on its way. by_first: of the ranks that hold the same piece, the first writes it, and not each a share.
    """
    writer = _Writer(directory, keep, {"format": FORMAT, "step": step, **facts})
    writer.per_thread_copy_ahead = 0  # nothing is on the GPU any more
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said by the thread of a single process
    with _quiet():
        future = dcp.async_save(
            _wrapped(pieces),
            storage_writer=writer,
            planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=by_first),
            process_group=group,
            async_stager=copies,
            no_dist=group is None,
        )
    assert isinstance(future, Future)
    return Saving(step, writer, future)


@dataclass
class Saving:
    """A save that is on its way."""

    step: int
    writer: _Writer
    future: Future

    def done(self) -> bool:
        """Whether it has ended on this rank, well or not. Other ranks may see that a moment earlier or later."""
        return self.future.done()

    def result(self) -> Path:
        """Its path, once it has ended. Raises SaveError, on every rank alike."""
        with self.writer.or_nothing():
            self.future.result()
        return self.writer.final


class Copies(AsyncStager):
    """The CPU's copies of a rank's pieces, which are written while training goes on: one set, kept for the next save.

    torch.distributed.checkpoint's own stagers run DTensor operations, whose caches keep the mesh, and with it gloo's
    threads, until the process ends.
    """

    def __init__(self) -> None:
        self.pieces: dict[str, torch.Tensor] = {}

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        on_gpu = torch.cuda.is_available()
        staged = {}
        for name, tensor in state_dict.items():
            piece = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            if name not in self.pieces:
                self.pieces[name] = torch.empty(piece.shape, dtype=piece.dtype, device="cpu", pin_memory=on_gpu)
            self.pieces[name].copy_(piece, non_blocking=on_gpu)
            staged[name] = self.pieces[name]
            if isinstance(tensor, DTensor):
                staged[name] = DTensor(self.pieces[name], tensor._spec, requires_grad=False)
        if on_gpu:
            torch.cuda.synchronize()
        return staged

    def synchronize_staging(self) -> None:
        """Nothing to wait for: `stage` returns when all is copied."""

    def close(self) -> None:
        """Nothing to end."""


def read(path: str | os.PathLike, pieces: Mapping[str, Piece]) -> None:
    """Write what is stored under their names into the pieces. All ranks call it, whatever the mesh that saved.

    ValueError on every rank alike, where reading fails on any. A sealed checkpoint was verified; this is for the
    others, and for a disk that fails in between.
    """
    with _quiet():
        try:
            dcp.load(_wrapped(pieces), checkpoint_id=Path(path))
        except (Exception, CheckpointException) as error:
            raise ValueError(f"{path}: cannot be loaded ({_reason(error)}): damaged") from error


def stored_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """The whole shape of each tensor of a checkpoint, by its stored name."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: tuple(meta.size) for name, meta in stored.items() if isinstance(meta, TensorStorageMetadata)}


@dataclass(frozen=True)
class _Written(WriteResult):
    """What a rank tells rank 0 of a piece that it has written: also in which file, and what that file is."""

    file: str
    fingerprint: dict[str, Any]


class _Writer(dcp.FileSystemWriter):
    """Into the hidden folder; hashed by who wrote it; sealed and renamed by rank 0 when all have written."""

    def __init__(self, directory: str | os.PathLike, keep: int, run: dict[str, Any]):
        self.final = path_of(directory, run["step"])
        self.part = beside(self.final, PART)
        self.keep, self.run = keep, run
        self.complaint: str | None = None  # rank 0's, of a save that went well
        super().__init__(self.part)

    def prepare_local_plan(self, plan):
        return plan  # the folder is rank 0's to make

    def prepare_global_plan(self, plans):
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan, planner):
        done: torch.futures.Future = torch.futures.Future()
        try:
            # An empty plan would make an empty file.
            results = super().write_data(plan, planner).wait() if plan.items else []
        except Exception as error:
            raise _first_cause(error) from error
        files = [result.storage_data.relative_path for result in results]
        prints = {file: fingerprint(self.part / file) for file in set(files)}
        done.set_result(
            [
                _Written(result.index, result.size_in_bytes, result.storage_data, file, prints[file])
                for result, file in zip(results, files, strict=True)
            ]
        )
        return done

    def finish(self, metadata, results):
        super().finish(metadata, results)
        write_json(self.part / "run.json", self.run)
        files = {name: fingerprint(self.part / name) for name in (".metadata", "run.json")}
        files |= {result.file: result.fingerprint for written in results for result in written}
        seal(self.part, files)
        publish(self.part, self.final)
        try:
            rotate(self.final.parent, self.keep)
        except OSError as error:
            self.complaint = f"an older checkpoint could not be deleted ({brief(error)})"

    @contextlib.contextmanager
    def or_nothing(self):
        """What the block raises is a SaveError, and of the save nothing is left."""
        try:
            yield
        except (Exception, CheckpointException) as error:
            # All ranks have stopped writing: each error has travelled to all.
            if not dist.is_initialized() or dist.get_rank() == 0:
                shutil.rmtree(self.part, ignore_errors=True)
            for cause, _ in getattr(error, "failures", {}).values():
                if isinstance(cause, (KeyboardInterrupt, SystemExit)):
                    raise cause from None
            raise SaveError(f"{self.final} could not be saved: {_reason(error)}") from error


def _wrapped(pieces: Mapping[str, Piece]) -> dict[str, torch.Tensor]:
    """Each piece as the whole tensor that it is of, sharing its memory. With one process, the piece is the whole."""
    return {name: _wrap(piece.tensor, piece.place) for name, piece in pieces.items()}


def _wrap(tensor: torch.Tensor, place: Placement) -> torch.Tensor:
    if place.mesh.device_mesh is None:
        return tensor
    shape = torch.Size(place.spec.shape)
    shards = {axis: Shard(dim) for dim, axis in place.spec.shards}
    placements = [shards.get(axis, Replicate()) for axis in WITHIN_STAGE]
    stride = torch.empty(shape, device="meta").stride()
    stage = place.mesh.device_mesh[WITHIN_STAGE]  # the ranks that share this rank's pipeline stage
    return DTensor.from_local(tensor, stage, placements, run_check=False, shape=shape, stride=stride)


def _first_cause(error: BaseException) -> BaseException:
    """The system's own error behind it, if there is one: torch.save says of a full disk that it is at another position
    than it thought."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _reason(error: BaseException) -> str:
    """The first error of the first rank that had one, on one line."""
    failures = getattr(error, "failures", None)
    if not failures:
        return brief(error, 300)
    rank, (cause, _) = min(failures.items())
    return f"rank {rank}: {brief(cause, 300)}" if dist.is_initialized() else brief(cause, 300)


@contextlib.contextmanager
def _quiet():
    """Without the warnings that torch.distributed.checkpoint gives a single process for being one, and without its
    pages on what it could not read: that comes as one line."""
    logger, level = logging.getLogger(), logging.getLogger().level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
