"""What all ranks of a run must have alike, and how a difference is said: flags, code, data, checkpoint."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import heiretsu.data
import heiretsu.kernels
import heiretsu.model
import heiretsu.parallel
import heiretsu.run
from heiretsu.data.batches import TokenDataset
from heiretsu.run.options import RunConfig

# Paths may differ from node to node; what is found there may not.
_OWN_TO_A_RANK = {"data_dir", "vocab_dir", "log_file", "profile", "checkpoint_dir", "resume", "init_from"}
_SOURCES = (heiretsu.data, heiretsu.kernels, heiretsu.model, heiretsu.parallel, heiretsu.run)


def facts(config: RunConfig, runs_on: str, data: Sequence[TokenDataset], resumes_from: Path | None) -> dict[str, Any]:
    """What this rank brings to the roll call, as {what it is called in a message: value}. runs_on: backend, device."""
    flags = config.as_json()
    flat = {
        name: value for name, value in {**flags, **flags["model"]}.items() if name not in _OWN_TO_A_RANK | {"model"}
    }
    return {
        **{f"--{name}": value for name, value in flat.items()},
        "messages and device": runs_on,
        "code": code_digest(),
        "torch": torch.__version__,
        "data": ", ".join(dataset.digest() for dataset in data),
        "a checkpoint folder": config.checkpoint_dir is not None,
        "checkpoint to resume": None if resumes_from is None else resumes_from.name,
        "checkpoint to start from": None if config.init_from is None else Path(config.init_from).name,
    }


def code_digest() -> str:
    """Of every source file of the installed package, by name, and of the script that runs."""
    digest = hashlib.sha256()
    for package in _SOURCES:
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package.__name__}/{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    script = Path(sys.argv[0])
    if script.is_file():
        digest.update(script.read_bytes())
    return digest.hexdigest()[:16]


def disagreement(by_rank: Sequence[dict[str, Any]]) -> str:
    """How the first rank that differs from rank 0 differs; "" if none does."""
    for rank, theirs in enumerate(by_rank):
        names = [name for name in by_rank[0] | theirs if theirs.get(name) != by_rank[0].get(name)]
        if names:
            said = ", ".join(f"{name} {theirs.get(name)} (rank 0: {by_rank[0].get(name)})" for name in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return f"rank {rank} has {said}{more}: all ranks of a run must be started alike"
    return ""
