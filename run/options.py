"""The command line of train.py: every flag, its default, and every check that needs no device.

`parse_args` turns the command line into one frozen `RunConfig`. It imports neither torch nor anything slow, so that a
wrong combination is refused in well under a second, on every rank alike, before a process group exists.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NoReturn

from heiretsu.model.config import PRESETS, ModelConfig, split_layers
from heiretsu.parallel.schedules import SCHEDULES
from heiretsu.run.memory import check_memory

VOCAB_SIZES = {"bytes": 257, "gpt2": 50257}


@dataclass(frozen=True)
class Bounds:
    """What a number of the command line must be, in words too. above, below: excluded; low, high: included. NaN and inf
    never hold."""

    words: str
    low: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    high: float = math.inf

    def hold(self, value: float) -> bool:
        return math.isfinite(value) and self.above < value < self.below and self.low <= value <= self.high


_COUNT = Bounds("be at least 1, and below 2**63", low=1, below=2**63)
_COUNT_OR_NONE = Bounds("be at least 0, and below 2**63", low=0, below=2**63)
_NOT_NEGATIVE = Bounds("be at least 0, and finite", low=0)

# Every number that the parser takes: which it may be, whatever the others are.
BOUNDS: dict[str, Bounds] = {
    **dict.fromkeys("n_layer n_head n_embed block_size batch_size grad_accum_steps".split(), _COUNT),
    **dict.fromkeys("dp ep pp tp virtual_stages num_train_chunks num_val_chunks".split(), _COUNT),
    **dict.fromkeys("max_iters max_skips eval_iters keep loss_scale_window".split(), _COUNT),
    **dict.fromkeys("num_experts top_k moe_freq warmup_iters eval_interval save_interval".split(), _COUNT_OR_NONE),
    **dict.fromkeys("check_replicas sample_tokens".split(), _COUNT_OR_NONE),
    **dict.fromkeys("weight_decay grad_clip min_lr aux_loss_coef".split(), _NOT_NEGATIVE),
    "learning_rate": Bounds("be above 0, and finite", above=0),
    "loss_scale": Bounds("be a number of at least 1, and finite", low=1),
    "dropout": Bounds("be in [0, 1)", low=0, below=1),
    "betas": Bounds("both be in [0, 1)", low=0, below=1),
    "seed": Bounds("be at least 0, and below 2**64", low=0, below=2**64),
    "timeout": Bounds("be above 0, and at most 604800 seconds, a week", above=0, high=604800),
}


@dataclass(frozen=True)
class RunConfig:
    """A whole training run. model: its sizes. The other fields are the flags of the same names.

    tokenizer: None until the folder of --data_dir has been asked (`with_tokenizer`).
    """

    model: ModelConfig
    preset: str
    data_dir: str | None
    tokenizer: str | None
    vocab_dir: str | None
    num_train_chunks: int | None
    num_val_chunks: int | None
    batch_size: int
    grad_accum_steps: int
    max_iters: int
    max_skips: int
    check_replicas: int
    eval_interval: int
    eval_iters: int
    learning_rate: float
    warmup_iters: int
    min_lr: float | None
    weight_decay: float
    betas: tuple[float, float]
    grad_clip: float
    amp: str
    loss_scale: float | None
    loss_scale_window: int
    dtype: str
    compile: bool
    fused: bool
    autotune: bool
    device: str
    dist_backend: str | None
    timeout: float
    seed: int
    dp: int
    ep: int
    pp: int
    tp: int
    schedule: str
    virtual_stages: int
    log_file: str | None
    wandb: bool
    wandb_project: str
    wandb_entity: str | None
    wandb_mode: Literal["online", "offline", "disabled"]
    run_name: str | None
    checkpoint_dir: str | None
    save_interval: int
    resume: str
    allow_changes: bool
    init_from: str | None
    keep: int
    on_save_error: Literal["stop", "continue"]
    local_checkpoints: bool
    profile: str | None
    memory_snapshot: bool
    sample_tokens: int

    @property
    def replicas(self) -> int:
        return self.dp * self.ep

    @property
    def stages_per_rank(self) -> int:
        """Stages of the model that a rank of the pipeline runs: the i-th of rank r is stage i * pp + r of them all."""
        return self.virtual_stages if SCHEDULES[self.schedule].several_stages else 1

    @property
    def global_batch_size(self) -> int:
        """Sequences of one optimizer step, over all replicas and microbatches."""
        return self.batch_size * self.grad_accum_steps * self.replicas

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.model.block_size

    @property
    def num_ranks(self) -> int:
        return self.replicas * self.pp * self.tp

    def backend_on(self, device_type: str) -> str:
        """What carries the messages of this run. ValueError if it cannot carry those of the schedule."""
        backend = self.dist_backend or ("nccl" if device_type == "cuda" else "gloo")
        if backend == "nccl" and self.stages_per_rank > 1 and self.pp == 2:
            # Both ranks send activations to each other on one channel, and NCCL takes what a pair sends one at a time.
            raise ValueError(f"--schedule {self.schedule} with --pp 2 would block on nccl: use --pp 3 or more, or 1f1b")
        return backend

    def with_tokenizer(self, name: str) -> RunConfig:
        return replace(self, tokenizer=name, model=replace(self.model, vocab_size=VOCAB_SIZES[name]))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def as_json(self) -> dict[str, Any]:
        """As it stands in a checkpoint's run.json: what is a tuple here is a list there."""
        return json.loads(self.to_json())


def parse_args(argv: Sequence[str] | None = None, world_size: int | None = None) -> RunConfig:
    """The run that a command line asks for. Exits with status 2 and one line that says what to change.

    world_size: processes that were started; what torchrun says unless given.
    """
    flags = vars(_parser().parse_args(argv))
    if flags["tokenizer"] is None and flags["data_dir"] is None:
        flags["tokenizer"] = "bytes"
    sizes = {**PRESETS[flags["preset"]], "vocab_size": VOCAB_SIZES[flags["tokenizer"] or "gpt2"]}
    for name in ModelConfig.__dataclass_fields__:
        value = flags.pop(name, None)
        if value is not None:
            sizes[name] = value
    flags["betas"] = tuple(flags["betas"])
    config = RunConfig(model=ModelConfig(**sizes), **flags)
    if config.save_interval and config.checkpoint_dir is None:
        config = replace(config, checkpoint_dir=os.path.join("runs", config.run_name or "checkpoints"))
    try:
        check(config, int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size)
    except ValueError as error:
        refuse(error)
    return config


def command_line(values: Mapping[str, object]) -> list[str]:
    """The flags that ask for these values, by name. False and None leave a flag out."""
    words: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def refuse(why: object) -> NoReturn:
    """End this process with status 2 and one line, which the first rank of each host prints: what it refuses may be
    wrong on one of them alone."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(2)  # torchrun ends all ranks when one has ended: the line must be out first
    else:
        print(f"train.py: error: {why}", file=sys.stderr, flush=True)
    sys.exit(2)


class _OneLineParser(argparse.ArgumentParser):
    """argparse, without the page of usage before each error."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{message} (see train.py --help)")


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
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs wandb, which is not installed: pip install 'heiretsu[wandb]', or leave it out")
    if config.memory_snapshot and not config.profile:
        raise ValueError("--memory_snapshot is written beside the traces: it needs --profile DIR")
    if config.data_dir is not None and not os.path.isdir(config.data_dir):
        raise ValueError(f"--data_dir {config.data_dir}: there is no such directory (data/prepare.py makes one)")


def _check_ranges(record: RunConfig | ModelConfig) -> None:
    for name, bounds in BOUNDS.items():
        given = getattr(record, name, None)
        for value in given if isinstance(given, tuple) else [given]:
            if value is not None and not bounds.hold(value):
                shown = " ".join(map(str, given)) if isinstance(given, tuple) else given
                raise ValueError(f"--{name} {shown} must {bounds.words}")


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


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="train.py",
        allow_abbrev=False,
        description="Train a GPT-2 or mixture-of-experts model with data, expert, pipeline and tensor parallelism.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data_dir",
        help="token shards (fineweb_train_*.bin, or what data/prepare.py writes); default: embedded corpus",
    )
    add("--tokenizer", choices=sorted(VOCAB_SIZES), help="default: that of --data_dir, bytes for the embedded corpus")
    add("--vocab_dir", help="folder with GPT-2's encoder.json and vocab.bpe, where tiktoken cannot download them")
    add("--num_train_chunks", type=int, help="read only the first so many training shards")
    add("--num_val_chunks", type=int, help="read only the first so many validation shards")
    add("--batch_size", type=int, default=16, help="sequences per microbatch per data replica")
    add("--block_size", type=int, help="tokens of a sequence; default: the preset's")

    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=sorted(PRESETS), default="tiny", help="sizes; the flags below override it")
    for name in ("n_layer", "n_head", "n_embed"):
        add(f"--{name}", type=int, help="default: the preset's")
    add("--dropout", type=float, default=ModelConfig.dropout)
    add("--num_experts", type=int, default=ModelConfig.num_experts, help="experts of a mixture layer; 0: dense")
    add("--top_k", type=int, default=ModelConfig.top_k, help="experts that serve a token")
    add("--moe_freq", type=int, default=ModelConfig.moe_freq, help="every so many layers, one is a mixture")
    add("--aux_loss_coef", type=float, default=ModelConfig.aux_loss_coef, help="weight of the balance loss")

    add = parser.add_argument_group("optimisation").add_argument
    add("--max_iters", type=int, default=1000, help="optimizer steps")
    add("--max_skips", type=int, default=50, help="steps skipped in a row, for numbers not finite, that end the run")
    add("--check_replicas", type=int, default=0, help="steps between comparisons of what ranks hold alike; 0: none")
    add("--grad_accum_steps", type=int, default=1, help="microbatches of a step; with --pp, what fills the pipeline")
    add("--learning_rate", type=float, default=1e-3)
    add("--warmup_iters", type=int, default=0, help="steps of linear warm-up")
    add("--min_lr", type=float, help="cosine decay to this; default: constant")
    add("--weight_decay", type=float, default=0.1)
    add("--betas", type=float, nargs=2, default=(0.9, 0.95), metavar=("B1", "B2"))
    add("--grad_clip", type=float, default=1.0, help="largest global gradient norm; 0: no clipping")
    add("--seed", type=int, default=1337)

    add = parser.add_argument_group("parallelism").add_argument
    for name, what in {"dp": "data", "ep": "expert", "pp": "pipeline", "tp": "tensor"}.items():
        add(f"--{name}", type=int, default=1, help=f"{what}-parallel ranks")
    schedules = [name for name, schedule in SCHEDULES.items() if not schedule.splits_backward]
    add("--schedule", choices=schedules, default="1f1b", help="order of work in the pipeline")
    add("--virtual_stages", type=int, default=2, help="stages that a rank runs with --schedule interleaved")
    add("--dist_backend", choices=("nccl", "gloo"), help="default: nccl on CUDA, gloo elsewhere")
    add("--timeout", type=float, default=600.0, help="seconds that a rank may wait for the others before the run ends")

    add = parser.add_argument_group("device and precision").add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--amp", choices=("none", "fp16", "bf16"), default="none", help="precision of the activations")
    add(
        "--loss_scale",
        type=float,
        help="dynamic loss scale, to begin with; default: 65536 with --amp fp16, else none",
    )
    add("--loss_scale_window", type=int, default=2000, help="good steps in a row after which the loss scale doubles")
    add("--dtype", choices=("float32", "float64"), default="float32", help="precision of the parameters")
    add("--fused", action="store_true", help="run the fused kernels instead of plain PyTorch")
    add(
        "--autotune",
        action="store_true",
        help="with --fused on a GPU: first measure a few launch parameters for this run's shapes, once; kept in "
        "$HEIRETSU_CACHE or ~/.cache/heiretsu",
    )
    add("--compile", action="store_true", help="torch.compile each block")

    add = parser.add_argument_group("evaluation, logs and checkpoints").add_argument
    add("--eval_interval", type=int, default=250, help="steps between evaluations; 0: none")
    add("--eval_iters", type=int, default=10, help="global batches of an evaluation")
    add("--sample_tokens", type=int, default=300, help="tokens generated at the end, on one process; 0: none")
    add("--log_file", help="JSON lines, one a step")
    add("--checkpoint_dir", help="default with --save_interval: runs/checkpoints, or runs/RUN_NAME")
    add(
        "--save_interval", type=int, default=0, help="steps between checkpoints; 0: only the last, if there is a folder"
    )
    add("--resume", default="none", help="auto: the newest checkpoint of --checkpoint_dir; none; or a path")
    add(
        "--allow_changes",
        action="store_true",
        help="resume although seed, batch, data, learning rate or the like is not what it was",
    )
    add("--init_from", help="start from the parameters of this checkpoint (heiretsu.run.conversion imports GPT-2's)")
    add("--keep", type=int, default=2, help="checkpoints kept")
    add(
        "--local_checkpoints",
        action="store_true",
        help="hosts do not share --checkpoint_dir: the first writes all of it, so that only dp may run between them",
    )
    add("--on_save_error", choices=("stop", "continue"), default="stop", help="what a save that fails does to the run")
    add("--profile", metavar="DIR", help="write torch.profiler traces of three steps there, one for each rank")
    add("--memory_snapshot", action="store_true", help="with --profile on a GPU: also who allocated what")
    add("--wandb", action="store_true")
    add("--wandb_project", default="heiretsu")
    add("--wandb_entity")
    add("--wandb_mode", choices=("online", "offline", "disabled"), default="online")
    add("--run_name")
    return parser
