"""What of a run's configuration reaches its engine."""

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run.building import build_engine
from heiretsu.run.options import parse_args

SMALL = "--n_layer 1 --n_head 2 --n_embed 8 --block_size 8".split()


@pytest.mark.parametrize(
    ("flags", "activations", "parameters", "scale"),
    [
        ("", torch.float32, torch.float32, 1.0),
        ("--dtype float64", torch.float64, torch.float64, 1.0),
        ("--dtype float64 --loss_scale 8", torch.float64, torch.float64, 8.0),
        ("--amp bf16", torch.bfloat16, torch.float32, 1.0),
        ("--amp fp16", torch.float16, torch.float32, 65536.0),
        ("--amp fp16 --loss_scale 4 --loss_scale_window 3", torch.float16, torch.float32, 4.0),
    ],
)
def test_precision_and_loss_scale_are_those_of_the_flags(flags, activations, parameters, scale):
    config = parse_args([*SMALL, *flags.split()])
    engine = build_engine(config, abstract_mesh(), plain)
    assert [stage.hidden_dtype for stage in engine.stages] == [activations]
    assert {param.dtype for param in engine.params.values()} == {parameters}
    scaler = engine.updater.scaler
    assert (scaler.scale, scaler.growth) == (scale, config.loss_scale_window if scale > 1.0 else 0)
