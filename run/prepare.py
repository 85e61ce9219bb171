"""What a rank finds out by itself, before it meets the others: its device, its kernels, its data, what it resumes.

Nothing here waits for another rank. What is wrong on this one goes into its report, and is said at the roll call.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import heiretsu.data
import heiretsu.kernels
import heiretsu.model
import heiretsu.parallel
import heiretsu.run
from heiretsu.data.batches import TokenDataset, open_data
from heiretsu.data.folder import tokenizer_of
from heiretsu.run.config import RunConfig
from heiretsu.run.cpu_memory import keep_freed_memory
from heiretsu.run.device import choose_ops, find_device
from heiretsu.run.folders import make_folders
from heiretsu.run.hosts import placed_rank
from heiretsu.run.interfaces import use_interface
from heiretsu.run.resume import named_checkpoint
from heiretsu.run.roll_call import Report

# Paths may differ from node to node; what is found there may not.
_OWN_TO_A_RANK = {"data_dir", "vocab_dir", "log_file", "profile", "checkpoint_dir", "resume", "init_from"}
_SOURCES = (heiretsu.data, heiretsu.kernels, heiretsu.model, heiretsu.parallel, heiretsu.run)


@dataclass
class Prepared:
    """A rank that is ready for the roll call; where its report refuses the run, what comes after is not all there.

    config: with the tokenizer of its data. rank: in the mesh. kernels: the ops that the model will be handed, in words.
    """

    config: RunConfig
    rank: int
    report: Report | None = None
    backend: str = ""
    device: torch.device | None = None
    ops: ModuleType | None = None
    kernels: str = ""
    train_data: TokenDataset | None = None
    val_data: TokenDataset | None = None

    def describe(self) -> str:
        """The first lines of a run: the whole configuration, and what is about to run."""
        config, model = self.config, self.config.model
        experts = ""
        if model.num_experts:
            experts = f", {model.num_experts} experts, top {model.top_k}, every {model.moe_freq} layers"
        schedule = f", {config.schedule} over {config.grad_accum_steps} microbatches" if config.pp > 1 else ""
        if config.stages_per_rank > 1:
            schedule += f", {config.stages_per_rank} stages a rank"
        lines = [
            f"config: {config.to_json()}",
            f"model: {model.num_parameters:,} parameters, {model.n_layer} layers, {model.n_head} heads, "
            f"{model.n_embed} wide, vocabulary {model.vocab_size}, block {model.block_size}{experts}",
            f"mesh: dp {config.dp} x ep {config.ep} x pp {config.pp} x tp {config.tp} on {self.device.type}{schedule}",
            f"kernels: {self.kernels}; activations {config.amp if config.amp != 'none' else config.dtype}"
            f"{', compiled' if config.compile else ''}",
            f"data: {config.data_dir or 'embedded corpus'}, {self.train_data.num_tokens:,} training tokens "
            f"({config.tokenizer})",
            f"batch: {config.global_batch_size} sequences, {config.tokens_per_step:,} tokens; {config.max_iters} steps",
        ]
        return "\n".join(lines)


def prepare(config: RunConfig) -> Prepared:
    mine = Prepared(config, placed_rank(os.environ, config.ep, config.pp, config.tp))
    try:
        _find_out(mine)
    except ValueError as error:
        mine.report = Report(refused=str(error))
    return mine


def _find_out(mine: Prepared) -> None:
    """Fill it in, in the order in which a user would want to be told what is wrong."""
    config = mine.config
    mine.device = find_device(config)
    mine.backend = config.backend_on(mine.device.type)
    if mine.device.type == "cpu":
        keep_freed_memory()
    mine.ops, mine.kernels = choose_ops(config.fused, mine.device)
    make_folders(config, mine.rank)
    resume_from = named_checkpoint(config)
    if config.tokenizer is None:
        mine.config = config = config.with_tokenizer(tokenizer_of(config.data_dir))
    mine.train_data, mine.val_data = open_data(
        config.data_dir,
        config.model.block_size,
        config.seed,
        config.model.vocab_size,
        config.num_train_chunks,
        config.num_val_chunks,
        config.tokenizer,
        config.vocab_dir,
    )
    use_interface(mine.backend, os.environ)
    runs_on, data = f"{mine.backend} on {mine.device.type}", (mine.train_data, mine.val_data)
    shared = None if config.local_checkpoints else config.checkpoint_dir
    mine.report = Report(facts(config, runs_on, data, resume_from), folder=shared)


def facts(config: RunConfig, runs_on: str, data: Sequence[TokenDataset], resumes_from: Path | None) -> dict[str, Any]:
    """What all ranks must have alike, as {what it is called in a message: value}. runs_on: backend, device."""
    flags = config.as_json()
    flags |= flags.pop("model")
    return {
        **{f"--{name}": value for name, value in flags.items() if name not in _OWN_TO_A_RANK},
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
