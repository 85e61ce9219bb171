"""What a rank finds out by itself, before it meets the others: its device, its kernels, its data, what it resumes.

Nothing here waits for another rank. What is wrong on this one goes into its report, and is said at the roll call.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType

import torch

from heiretsu.data.batches import TokenDataset, open_data
from heiretsu.data.folder import tokenizer_of
from heiretsu.run.agreement import facts
from heiretsu.run.cpu_memory import keep_freed_memory
from heiretsu.run.device import choose_ops, find_device
from heiretsu.run.folders import make_folders
from heiretsu.run.hosts import placed_rank
from heiretsu.run.interfaces import use_interface
from heiretsu.run.options import RunConfig
from heiretsu.run.resume import named_checkpoint
from heiretsu.run.roll_call import Report


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
