"""Records that are passed around cannot be changed on the way; and numbers that stand for something published."""

import dataclasses
import importlib
import inspect
import pkgutil

import pytest
import torch

from heiretsu.kernels import plain, random
from heiretsu.model import config, seeding
from heiretsu.parallel import data as data_parallel
from heiretsu.parallel.engine import StepReport
from heiretsu.parallel.pipeline import Microbatch
from heiretsu.run import building as build

# Those whose fields are set again while a run goes on. Every other dataclass is frozen.
CHANGING = {"LossScaler", "_Bucket", "_InFlight", "Prepared", "Saving", "Peer"}


def dataclasses_of(package: str) -> dict[str, type]:
    found = {}
    for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        module = importlib.import_module(info.name)
        for name, item in vars(module).items():
            if inspect.isclass(item) and dataclasses.is_dataclass(item) and item.__module__ == info.name:
                found[name] = item
    return found


@pytest.mark.parametrize("package", ["model", "parallel", "data", "run"])
def test_records_are_frozen(package):
    for name, record in dataclasses_of(f"heiretsu.{package}").items():
        assert record.__dataclass_params__.frozen == (name not in CHANGING), name


def test_dropout_of_attention_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        random.Dropout(0.1, 0, 0, 0).p = 0.2


def test_ops_have_the_published_defaults():
    attention = {"causal": True, "scale": None, "dropout_p": 0.0, "seed": 0, "offsets": (0, 0)}
    published = {
        "attention": attention,
        "attention_lse": attention,
        "route": {},
        "expert_mlp": {},
        "bias_gelu": {},
        "dropout": {"offset": 0},
        "layer_norm": {"eps": torch.nn.LayerNorm(1).eps, "residual": None},
        "linear_cross_entropy": {"vocab_start": 0},
    }
    for op, defaults in published.items():
        parameters = inspect.signature(getattr(plain, op)).parameters.values()
        assert {p.name: p.default for p in parameters if p.default is not p.empty} == defaults, op


def test_numbers_are_those_of_the_papers_and_of_torch():
    assert seeding.INIT_STD == 0.02  # Radford et al. 2019
    assert config.VOCAB_MULTIPLE == 128  # Megatron-LM's --make-vocab-size-divisible-by
    ddp = torch.nn.parallel.DistributedDataParallel
    assert inspect.signature(ddp).parameters["bucket_cap_mb"].default in (None, 25)  # None: 25 MiB
    assert data_parallel.BUCKET_BYTES == 25 * 1024 * 1024
    assert inspect.signature(data_parallel.GradientAverager).parameters["bucket_bytes"].default == 26_214_400
    scaler = inspect.signature(torch.amp.GradScaler).parameters
    assert build.FP16_LOSS_SCALE == scaler["init_scale"].default == 65536


SIZES = {  # Radford et al. 2019, table 2; heads from the released checkpoints
    "tiny": (4, 4, 128, 128),
    "gpt2": (12, 12, 768, 1024),
    "gpt2-medium": (24, 16, 1024, 1024),
    "gpt2-large": (36, 20, 1280, 1024),
    "gpt2-xl": (48, 25, 1600, 1024),
}


def test_presets_are_the_released_sizes():
    names = ("n_layer", "n_head", "n_embed", "block_size")
    assert {preset: tuple(sizes[name] for name in names) for preset, sizes in config.PRESETS.items()} == SIZES


def test_a_microbatch_that_is_told_nothing_is_the_first_of_a_run():
    context = Microbatch(torch.zeros(1, 1), torch.zeros(1, 1)).context
    assert (context.step, context.first_sample) == (0, 0)


def test_a_report_of_a_step_says_no_more_than_it_was_told():
    report = StepReport({"loss": 2.0}, 1.0, False)
    assert dataclasses.astuple(report) == ({"loss": 2.0}, 1.0, False, 1.0, "", (0.0,), (0,))
