"""A whole training run as one frozen record: every flag of train.py, declared once with its default and its bounds.

It imports neither torch nor anything slow, as all that reads a command line.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from heiretsu.data.tokenizer import TOKENIZERS
from heiretsu.model.config import PRESETS, ModelConfig
from heiretsu.parallel.schedules import SCHEDULES
from heiretsu.run.flags import Bounds, Flag, flag

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
