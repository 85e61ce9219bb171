"""The command line of train.py: every flag, declared once with its default, and every check that needs no device.

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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NoReturn, get_type_hints

from heiretsu.data.tokenizer import TOKENIZERS
from heiretsu.model.config import PRESETS, ModelConfig, split_layers
from heiretsu.parallel.schedules import SCHEDULES
from heiretsu.run.flags import Bounds, Flag, flag, how_to_read
from heiretsu.run.memory import check_memory

_COUNT = Bounds("be at least 1, and below 2**63", low=1, below=2**63)
_COUNT_OR_NONE = Bounds("be at least 0, and below 2**63", low=0, below=2**63)
_NOT_NEGATIVE = Bounds("be at least 0, and finite", low=0)


# The groups of --help, in its order.
GROUPS = DATA, MODEL, OPTIMISATION, PARALLELISM, DEVICE, RESULTS = (
    "data",
    "model",
    "optimisation",
    "parallelism",
    "device and precision",
    "evaluation, logs and checkpoints",
)


@dataclass(frozen=True)
class RunConfig:
    """A whole training run. model: its sizes, whose flags are MODEL_FLAGS. The other fields are the flags of the same
    names, in the order of --help.

    tokenizer: None until the folder of --data_dir has been asked (`with_tokenizer`).
    """

    model: ModelConfig = field(default_factory=ModelConfig)

    data_dir: str | None = flag(
        None, DATA, "token shards (fineweb_train_*.bin, or what data/prepare.py writes); default: embedded corpus"
    )
    tokenizer: str | None = flag(
        None, DATA, "default: that of --data_dir, bytes for the embedded corpus", choices=sorted(TOKENIZERS)
    )
    vocab_dir: str | None = flag(
        None, DATA, "folder with GPT-2's encoder.json and vocab.bpe, where tiktoken cannot download them"
    )
    num_train_chunks: int | None = flag(None, DATA, "read only the first so many training shards", _COUNT)
    num_val_chunks: int | None = flag(None, DATA, "read only the first so many validation shards", _COUNT)
    batch_size: int = flag(16, DATA, "sequences per microbatch per data replica", _COUNT)

    preset: str = flag("tiny", MODEL, "sizes; the flags below override it", choices=sorted(PRESETS))

    max_iters: int = flag(1000, OPTIMISATION, "optimizer steps", _COUNT)
    max_skips: int = flag(50, OPTIMISATION, "steps skipped in a row, for numbers not finite, that end the run", _COUNT)
    check_replicas: int = flag(
        0, OPTIMISATION, "steps between comparisons of what ranks hold alike; 0: none", _COUNT_OR_NONE
    )
    grad_accum_steps: int = flag(1, OPTIMISATION, "microbatches of a step; with --pp, what fills the pipeline", _COUNT)
    learning_rate: float = flag(1e-3, OPTIMISATION, bounds=Bounds("be above 0, and finite", above=0))
    warmup_iters: int = flag(0, OPTIMISATION, "steps of linear warm-up", _COUNT_OR_NONE)
    min_lr: float | None = flag(None, OPTIMISATION, "cosine decay to this; default: constant", _NOT_NEGATIVE)
    weight_decay: float = flag(0.1, OPTIMISATION, bounds=_NOT_NEGATIVE)
    betas: tuple[float, float] = flag(
        (0.9, 0.95), OPTIMISATION, bounds=Bounds("both be in [0, 1)", low=0, below=1), metavar=("B1", "B2")
    )
    grad_clip: float = flag(1.0, OPTIMISATION, "largest global gradient norm; 0: no clipping", _NOT_NEGATIVE)
    seed: int = flag(1337, OPTIMISATION, bounds=Bounds("be at least 0, and below 2**64", low=0, below=2**64))

    dp: int = flag(1, PARALLELISM, "data-parallel ranks", _COUNT)
    ep: int = flag(1, PARALLELISM, "expert-parallel ranks", _COUNT)
    pp: int = flag(1, PARALLELISM, "pipeline-parallel ranks", _COUNT)
    tp: int = flag(1, PARALLELISM, "tensor-parallel ranks", _COUNT)
    schedule: str = flag(
        "1f1b",
        PARALLELISM,
        "order of work in the pipeline",
        choices=[name for name, schedule in SCHEDULES.items() if not schedule.splits_backward],
    )
    virtual_stages: int = flag(
        2, PARALLELISM, "stages that a rank runs, with a schedule of several (interleaved)", _COUNT
    )
    dist_backend: Literal["nccl", "gloo"] | None = flag(None, PARALLELISM, "default: nccl on CUDA, gloo elsewhere")
    timeout: float = flag(
        600.0,
        PARALLELISM,
        "seconds that a rank may wait for the others before the run ends",
        Bounds("be above 0, and at most 604800 seconds, a week", above=0, high=604800),
    )

    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", DEVICE)
    amp: Literal["none", "fp16", "bf16"] = flag("none", DEVICE, "precision of the activations")
    loss_scale: float | None = flag(
        None,
        DEVICE,
        "dynamic loss scale, to begin with; default: 65536 with --amp fp16, else none",
        Bounds("be a number of at least 1, and finite", low=1),
    )
    loss_scale_window: int = flag(2000, DEVICE, "good steps in a row after which the loss scale doubles", _COUNT)
    dtype: Literal["float32", "float64"] = flag("float32", DEVICE, "precision of the parameters")
    fused: bool = flag(False, DEVICE, "run the fused kernels instead of plain PyTorch")
    autotune: bool = flag(
        False,
        DEVICE,
        "with --fused on a GPU: first measure a few launch parameters for this run's shapes, once; kept in "
        "$HEIRETSU_CACHE or ~/.cache/heiretsu",
    )
    compile: bool = flag(False, DEVICE, "torch.compile each block")

    eval_interval: int = flag(250, RESULTS, "steps between evaluations; 0: none", _COUNT_OR_NONE)
    eval_iters: int = flag(10, RESULTS, "global batches of an evaluation", _COUNT)
    sample_tokens: int = flag(300, RESULTS, "tokens generated at the end, on one process; 0: none", _COUNT_OR_NONE)
    log_file: str | None = flag(None, RESULTS, "JSON lines, one a step")
    checkpoint_dir: str | None = flag(None, RESULTS, "default with --save_interval: runs/checkpoints, or runs/RUN_NAME")
    save_interval: int = flag(
        0, RESULTS, "steps between checkpoints; 0: only the last, if there is a folder", _COUNT_OR_NONE
    )
    resume: str = flag("none", RESULTS, "auto: the newest checkpoint of --checkpoint_dir; none; or a path")
    allow_changes: bool = flag(
        False, RESULTS, "resume although seed, batch, data, learning rate or the like is not what it was"
    )
    init_from: str | None = flag(
        None, RESULTS, "start from the parameters of this checkpoint (convert.py imports GPT-2's)"
    )
    keep: int = flag(2, RESULTS, "checkpoints kept", _COUNT)
    local_checkpoints: bool = flag(
        False,
        RESULTS,
        "hosts do not share --checkpoint_dir: the first writes all of it, so that only dp may run between them",
    )
    on_save_error: Literal["stop", "continue"] = flag("stop", RESULTS, "what a save that fails does to the run")
    profile: str | None = flag(
        None, RESULTS, "write torch.profiler traces of three steps there, one for each rank", metavar="DIR"
    )
    memory_snapshot: bool = flag(False, RESULTS, "with --profile on a GPU: also who allocated what")
    wandb: bool = flag(False, RESULTS)
    wandb_project: str = flag("heiretsu", RESULTS)
    wandb_entity: str | None = flag(None, RESULTS)
    wandb_mode: Literal["online", "offline", "disabled"] = flag("online", RESULTS)
    run_name: str | None = flag(None, RESULTS)

    @property
    def mesh(self) -> tuple[int, int, int, int]:
        """Ranks on each axis, as `make_mesh` takes them."""
        return self.dp, self.ep, self.pp, self.tp

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
        return math.prod(self.mesh)

    def backend_on(self, device_type: str) -> str:
        """What carries the messages of this run. ValueError if it cannot carry those of the schedule."""
        backend = self.dist_backend or ("nccl" if device_type == "cuda" else "gloo")
        if backend == "nccl" and self.stages_per_rank > 1 and self.pp == 2:
            # Both ranks send activations to each other on one channel, and NCCL takes what a pair sends one at a time.
            raise ValueError(f"--schedule {self.schedule} with --pp 2 would block on nccl: use --pp 3 or more, or 1f1b")
        return backend

    def with_tokenizer(self, name: str) -> RunConfig:
        return replace(self, tokenizer=name, model=replace(self.model, vocab_size=TOKENIZERS[name]))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def as_json(self) -> dict[str, Any]:
        """As it stands in a checkpoint's run.json: what is a tuple here is a list there."""
        return json.loads(self.to_json())


# The flags of ModelConfig's fields, which have their types and defaults there; but what a preset names, it decides.
MODEL_FLAGS = {
    "block_size": Flag(DATA, "tokens of a sequence; default: the preset's", _COUNT),
    "n_layer": Flag(MODEL, "default: the preset's", _COUNT),
    "n_head": Flag(MODEL, "default: the preset's", _COUNT),
    "n_embed": Flag(MODEL, "default: the preset's", _COUNT),
    "dropout": Flag(MODEL, bounds=Bounds("be in [0, 1)", low=0, below=1)),
    "num_experts": Flag(MODEL, "experts of a mixture layer; 0: dense", _COUNT_OR_NONE),
    "top_k": Flag(MODEL, "experts that serve a token", _COUNT_OR_NONE),
    "moe_freq": Flag(MODEL, "every so many layers, one is a mixture", _COUNT_OR_NONE),
    "aux_loss_coef": Flag(MODEL, "weight of the balance loss", _NOT_NEGATIVE),
}
FLAGS: dict[str, Flag] = {f.name: f.metadata["flag"] for f in fields(RunConfig) if f.name != "model"} | MODEL_FLAGS


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
