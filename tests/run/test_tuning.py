"""What --autotune measures are the calls that the model makes: seen by ops that write down what they are given."""

import inspect
import types

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.pipeline import Microbatch
from heiretsu.run.building import build_engine
from heiretsu.run.options import parse_args
from heiretsu.run.tuning import kernel_calls

OPS = ("attention", "bias_gelu", "dropout", "expert_mlp", "layer_norm", "linear_cross_entropy", "route")
SMALL = "--n_layer 2 --n_head 4 --n_embed 16 --block_size 8 --batch_size 3 --fused".split()
EXPERTS = "--num_experts 4 --moe_freq 2".split()


class WatchedOps(types.SimpleNamespace):
    """`plain`, and in `calls` the (op, arguments) of each call: see _look for a tensor."""

    def __init__(self):
        super().__init__(calls=set(), **{name: self._watched(name) for name in OPS})

    def _watched(self, name):
        op = getattr(plain, name)

        def watched(*args, **kwargs):
            given = inspect.signature(op).bind(*args, **kwargs)
            given.apply_defaults()
            for irrelevant in ("seed", "offset", "offsets"):
                given.arguments.pop(irrelevant, None)
            if "experts" in given.arguments:  # of plain's route they are a view; of every fused one they are not
                given.arguments["experts"] = given.arguments["experts"].contiguous()
            self.calls.add((name, *((key, _look(value)) for key, value in given.arguments.items())))
            return op(*args, **kwargs)

        return watched


def _look(value):
    if not isinstance(value, torch.Tensor):
        return value
    return tuple(value.shape), value.stride(), value.dtype, value.requires_grad


def calls_of_the_model(mesh, flags):
    config = parse_args(flags, world_size=mesh.world.size)
    ops = WatchedOps()
    engine = build_engine(config, mesh, ops)
    ids = torch.arange(config.batch_size * config.model.block_size).view(config.batch_size, -1)
    engine.step([Microbatch(ids, ids)])
    return ops.calls


def calls_measured(flags, **sizes):
    config = parse_args(flags, world_size=torch.Size(sizes.values()).numel())
    ops = WatchedOps()
    results = {name: prepare()() for name, prepare in kernel_calls(config, abstract_mesh(**sizes), ops).items()}
    return ops.calls, results


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--amp", "bf16", "--dropout", "0.1"],
        [*EXPERTS, "--dropout", "0.1"],
        [*EXPERTS, "--amp", "bf16"],
        [*EXPERTS[:2], "--moe_freq", "1"],
    ],
    ids=" ".join,
)
def test_calls_are_those_of_a_step_of_the_model(more):
    assert calls_measured(SMALL + more)[0] == calls_of_the_model(abstract_mesh(), SMALL + more)


def test_calls_are_those_of_rank_0_of_a_mesh(ranks):
    """The number of rows that reach an expert's rank depends on the router; all else is known before."""
    flags = [*SMALL, *EXPERTS, "--tp", "2", "--ep", "2"]

    def without_rows(calls):
        def look(op, name, value):
            return (
                (name, value[0][1:], *value[2:]) if op == "expert_mlp" and name in ("x", "experts", "gates") else value
            )

        return {(op, *(look(op, *argument) for argument in arguments)) for op, *arguments in calls}

    seen = ranks(calls_of_the_model, flags, tp=2, ep=2)[0]
    assert without_rows(calls_measured(flags, tp=2, ep=2)[0]) == without_rows(seen)


def test_each_call_gives_every_output_and_gradient_the_same_each_time():
    flags = [*SMALL, *EXPERTS, "--dropout", "0.1"]
    config = parse_args(flags, world_size=1)
    names = {}
    for name, prepare in kernel_calls(config, abstract_mesh(), plain).items():
        run = prepare()
        first, second = run(), run()
        names[name.split()[0]] = [key.removeprefix("gradient of ") for key in first if key.startswith("gradient of ")]
        for key, tensor in first.items():
            assert torch.isfinite(tensor).all() and torch.equal(tensor, second[key]), f"{name}: {key}"
    assert names == {
        "attention": ["qkv"],
        "linear_cross_entropy": ["x", "weight"],
        "expert_mlp": ["x", "gates", "w1", "b1", "w2", "b2"],
        "route": ["logits"],
        "bias_gelu": ["x", "bias"],
        "layer_norm": ["x", "residual", "weight", "bias"],
        "dropout": ["x"],
    }


ALL_OPS = {*OPS}


@pytest.mark.parametrize(
    "more, ops",
    [
        ("--amp bf16", ALL_OPS),
        ("--batch_size 4", ALL_OPS),
        ("--n_embed 32", ALL_OPS - {"route"}),
        ("--n_head 2", {"attention"}),
        ("--dropout 0.2", {"attention", "dropout"}),
        ("--top_k 1", {"expert_mlp", "route"}),
        ("--tokenizer gpt2", {"linear_cross_entropy"}),
    ],
)
def test_names_tell_apart_what_is_measured_apart(more, ops):
    """They are keys of the cache on disk."""
    flags = [*SMALL, *EXPERTS, "--dropout", "0.1"]
    here, there = (
        kernel_calls(parse_args(f, world_size=1), abstract_mesh(), plain) for f in (flags, [*flags, *more.split()])
    )
    assert {name.split()[0] for name in here.keys() - there.keys()} == ops


def test_what_is_measured_lies_on_the_meshs_device_whatever_the_default_is():
    config = parse_args([*SMALL, *EXPERTS, "--dropout", "0.1"], world_size=1)
    with torch.device("meta"):
        for name, make in kernel_calls(config, abstract_mesh(), plain).items():
            assert {tensor.device.type for tensor in make()().values()} == {"cpu"}, name
