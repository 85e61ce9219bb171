"""The command line of train.py, and every check that needs no device.

`parse_args` turns the command line into one frozen `RunConfig`. It imports neither torch nor anything slow, so that a
wrong combination is refused in well under a second, on every rank alike, before a process group exists.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn, get_type_hints

from heiretsu.data.tokenizer import TOKENIZERS
from heiretsu.model.config import PRESETS, ModelConfig, split_layers
from heiretsu.parallel.schedules import SCHEDULES
from heiretsu.run.config import FLAGS, GROUPS, MODEL_FLAGS, RunConfig
from heiretsu.run.flags import how_to_read
from heiretsu.run.memory import check_memory


def parse_args(argv: Sequence[str] | None = None, world_size: int | None = None) -> RunConfig:
    """The run that a command line asks for. Exits with status 2 and one line that says what to change.

    world_size: processes that were started; what torchrun says unless given.
    """
    flags = vars(_parser().parse_args(argv))
    if flags["tokenizer"] is None and flags["data_dir"] is None:
        flags["tokenizer"] = "bytes"
    sizes = {**PRESETS[flags["preset"]], "vocab_size": TOKENIZERS[flags["tokenizer"] or "gpt2"]}
    given = {name: flags.pop(name) for name in MODEL_FLAGS}
    sizes |= {name: value for name, value in given.items() if value is not None}
    flags["betas"] = tuple(flags["betas"])
    config = RunConfig(model=ModelConfig(**sizes), **flags)
    if config.save_interval and config.checkpoint_dir is None:
        config = replace(config, checkpoint_dir=os.path.join("runs", config.run_name or "checkpoints"))
    try:
        check(config, int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size)
    except ValueError as error:
        refuse(error)
    return config


class _OneLineParser(argparse.ArgumentParser):
    """argparse, without the page of usage before each error."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{message} (see train.py --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="train.py",
        allow_abbrev=False,
        description="Train a GPT-2 or mixture-of-experts model with data, expert, pipeline and tensor parallelism.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    types = get_type_hints(ModelConfig) | get_type_hints(RunConfig)
    for group in GROUPS:
        add = parser.add_argument_group(group).add_argument
        for name, about in FLAGS.items():
            if about.group == group:
                default = getattr(ModelConfig if name in MODEL_FLAGS else RunConfig, name)
                default = None if name in PRESETS["tiny"] else default
                add(f"--{name}", default=default, help=about.help, **how_to_read(types[name], about))
    return parser


def refuse(why: object) -> NoReturn:
    """End this process with status 2 and one line, which the first rank of each host prints: what it refuses may be
    wrong on one of them alone."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(2)  # torchrun ends all ranks when one has ended: the line must be out first
    else:
        print(f"train.py: error: {why}", file=sys.stderr, flush=True)
    sys.exit(2)


def check(config: RunConfig, world_size: int) -> None:
    """Raise ValueError, in the words of the flags, for a combination that cannot run."""
    _check_ranges(config)
    check_model(config.model)
    check_memory(config)
    _check_topology(config, world_size)
    if config.amp != "none" and config.dtype == "float64":
        raise ValueError(f"--amp {config.amp} lowers precision and --dtype float64 raises it: choose one of them")
    if config.autotune and not config.fused:
        raise ValueError("--autotune measures launch parameters of the fused kernels: it needs --fused")
    if config.autotune and config.device in ("cpu", "mps"):
        raise ValueError(f"--autotune measures Triton kernels and needs a GPU, but --device is {config.device}")
    if config.amp == "fp16" and config.device == "cpu":
        raise ValueError("--amp fp16 needs a GPU, but --device is cpu: use --amp bf16, which works on a CPU")
    if config.min_lr is not None and config.min_lr > config.learning_rate:
        raise ValueError(f"--min_lr {config.min_lr} is above --learning_rate {config.learning_rate}")
    if config.warmup_iters > config.max_iters:
        raise ValueError(f"--warmup_iters {config.warmup_iters} is more than --max_iters {config.max_iters}")
    if config.resume == "auto" and config.checkpoint_dir is None:
        raise ValueError("--resume auto looks in --checkpoint_dir, which is not given")
    if config.init_from and config.resume not in ("none", "auto"):
        raise ValueError("--init_from starts a new run and --resume goes on with one: choose one of them")
    if config.resume not in ("none", "auto") and not os.path.isdir(config.resume):
        raise ValueError(f"{config.resume}: there is no such folder")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs wandb, which is not installed: pip install 'heiretsu[wandb]', or leave it out")
    if config.memory_snapshot and not config.profile:
        raise ValueError("--memory_snapshot is written beside the traces: it needs --profile DIR")
    if config.data_dir is not None and not os.path.isdir(config.data_dir):
        raise ValueError(f"--data_dir {config.data_dir}: there is no such directory (data/prepare.py makes one)")


def _check_ranges(record: RunConfig | ModelConfig) -> None:
    for name, about in FLAGS.items():
        given = getattr(record, name, None) if about.bounds else None
        for value in given if isinstance(given, tuple) else [given]:
            if value is not None and not about.bounds.hold(value):
                shown = " ".join(map(str, given)) if isinstance(given, tuple) else given
                raise ValueError(f"--{name} {shown} must {about.bounds.words}")


def check_model(model: ModelConfig) -> None:
    _check_ranges(model)
    if model.n_embed % model.n_head:
        raise ValueError(f"--n_head {model.n_head} does not divide --n_embed {model.n_embed}: heads have equal sizes")
    if model.num_experts:
        if not 1 <= model.top_k <= model.num_experts:
            raise ValueError(f"--top_k {model.top_k} must be in 1..{model.num_experts}, the number of --num_experts")
        if not 1 <= model.moe_freq <= model.n_layer:
            raise ValueError(
                f"--moe_freq {model.moe_freq} must be in 1..{model.n_layer} (--n_layer), or no layer has experts"
            )


def _check_topology(config: RunConfig, world_size: int) -> None:
    model = config.model
    if config.num_ranks != world_size:
        raise ValueError(
            f"--dp {config.dp} x --ep {config.ep} x --pp {config.pp} x --tp {config.tp} = {config.num_ranks} ranks, "
            f"but {world_size} process{'es' * (world_size > 1)} started: use torchrun "
            f"--nproc_per_node={config.num_ranks}"
        )
    if model.n_head % config.tp:
        fitting = ", ".join(str(n) for n in range(1, model.n_head + 1) if model.n_head % n == 0)
        raise ValueError(
            f"--tp {config.tp} does not divide --n_head {model.n_head}: each tp rank needs a whole number of heads "
            f"(try --tp {fitting})"
        )
    if config.ep > 1 and not model.num_experts:
        raise ValueError(f"--ep {config.ep} splits experts, but --num_experts is 0: set --num_experts, or use --dp")
    if model.num_experts % config.ep:
        raise ValueError(f"--ep {config.ep} does not divide --num_experts {model.num_experts}")
    if SCHEDULES[config.schedule].several_stages and config.pp == 1:
        raise ValueError(
            f"--schedule {config.schedule} deals out a pipeline's stages, but --pp is 1: use --schedule 1f1b"
        )
    split_layers(model, config.pp, config.stages_per_rank)
