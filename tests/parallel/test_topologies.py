"""One model, one loss curve: every topology against the single process, in float64, to 1e-9."""

import functools
from dataclasses import replace

import pytest

from tests.training import DENSE, MIXTURE, failures, run_config, run_steps, single_process

STEPS, TOLERANCE = 10, 1e-9
MODELS = {
    "dense": DENSE,
    "mixture": MIXTURE,
    "dropout": replace(DENSE, dropout=0.2),
    "hot expert": replace(MIXTURE, top_k=1, num_experts=8, moe_freq=1),  # 8 tokens a sequence: many experts get none
}

TOPOLOGIES = [  # model, microbatches, mesh
    ("dense", 2, {"dp": 2}),
    ("dense", 1, {"dp": 4}),
    ("dense", 2, {"tp": 2}),
    ("dense", 1, {"tp": 4}),
    ("dense", 4, {"pp": 2}),
    ("dense", 2, {"pp": 4}),
    ("dense", 2, {"dp": 2, "tp": 2}),
    ("dense", 4, {"dp": 2, "pp": 2}),
    ("dense", 4, {"pp": 2, "tp": 2}),
    ("dense", 4, {"dp": 2, "pp": 2, "tp": 2}),
    ("mixture", 2, {"dp": 2}),
    ("mixture", 2, {"ep": 2}),
    ("mixture", 2, {"ep": 4}),
    ("mixture", 2, {"tp": 2}),
    ("mixture", 4, {"pp": 2}),
    ("mixture", 2, {"dp": 2, "ep": 2}),
    ("mixture", 2, {"ep": 2, "tp": 2}),
    ("mixture", 4, {"ep": 2, "pp": 2}),
    ("mixture", 4, {"ep": 2, "pp": 2, "tp": 2}),
    ("mixture", 1, {"dp": 2, "ep": 4}),
    ("hot expert", 2, {"ep": 4}),
    ("dropout", 2, {"dp": 2, "tp": 2}),
    ("dropout", 2, {"pp": 2}),
]


@functools.cache
def reference(model: str, microbatches: int, ops: str = "plain"):
    return single_process(run_config(MODELS[model], microbatches=microbatches), STEPS, ops=ops)


def label(value) -> str:
    return "x".join(f"{axis}{size}" for axis, size in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("model, microbatches, mesh", TOPOLOGIES, ids=label)
def test_topology_gives_the_run_of_one_process(ranks, model, microbatches, mesh):
    config = run_config(MODELS[model], microbatches=microbatches, **mesh)
    traces = ranks(run_steps, config, STEPS, **mesh)
    assert failures(traces, reference(model, 4), TOLERANCE) == {}


@pytest.mark.parametrize("mesh", [{"pp": 4}, {"dp": 2, "pp": 2}], ids=label)
def test_gpipe_gives_the_run_of_one_process(ranks, mesh):
    config = run_config(DENSE, microbatches=4, schedule="gpipe", **mesh)
    assert failures(ranks(run_steps, config, STEPS, **mesh), reference("dense", 4), TOLERANCE) == {}


@pytest.mark.parametrize(
    "model, microbatches, mesh",
    [("dense", 4, {"pp": 2}), ("dropout", 2, {"pp": 2, "tp": 2}), ("mixture", 4, {"ep": 2, "pp": 2})],
    ids=label,
)
def test_interleaved_stages_give_the_run_of_one_process(ranks, model, microbatches, mesh):
    config = run_config(MODELS[model], microbatches=microbatches, schedule="interleaved", **mesh)
    traces = ranks(run_steps, config, STEPS, **mesh)
    assert failures(traces, reference(model, 4), TOLERANCE) == {}


@pytest.mark.parametrize(
    "model, microbatches, mesh",
    [
        ("dense", 4, {}),
        ("mixture", 2, {}),
        ("dense", 4, {"dp": 2, "pp": 2, "tp": 2}),
        ("mixture", 2, {"ep": 2, "tp": 2}),
        ("hot expert", 2, {"ep": 4}),
        ("dropout", 2, {"dp": 2, "tp": 2}),
    ],
    ids=label,
)
def test_fused_ops_give_the_plain_run_of_one_process(ranks, model, microbatches, mesh):
    config = run_config(MODELS[model], microbatches=microbatches, **mesh)
    traces = ranks(run_steps, config, STEPS, ops="fused", **mesh)
    assert failures(traces, reference(model, 4), TOLERANCE) == {}


def test_microbatches_do_not_change_the_run():
    for microbatches in (1, 2, 8):
        assert failures([reference("mixture", microbatches)], reference("mixture", 4), TOLERANCE) == {}


@pytest.mark.parametrize("mesh", [{}, {"dp": 2}, {"tp": 2}, {"pp": 2}, {"ep": 2}], ids=label)
def test_every_rank_skips_the_step_in_which_one_gradient_overflows(ranks, mesh):
    config = run_config(MIXTURE, microbatches=2, **mesh)
    traces = ranks(run_steps, config, 4, overflow_at=(1,), **mesh)
    single = single_process(config, 4, overflow_at=(1,))
    assert single.skips == [False, True, False, False]
    assert failures(traces, single, TOLERANCE) == {}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"tp": 2}, {"pp": 2}, {"ep": 2}], ids=label)
def test_low_precision_activations_give_the_same_run_up_to_their_rounding(ranks, mesh, amp):
    config = run_config(MIXTURE, microbatches=2, dtype="float32", amp=amp, **mesh)
    traces = ranks(run_steps, config, 3, **mesh)
    # Eight bits of mantissa: 2**-8 a rounding, a few roundings deep. Losses average over 64 tokens.
    losses = single_process(run_config(MIXTURE, microbatches=2), 3).losses
    for trace in traces:
        assert trace.losses == traces[0].losses
        assert trace.skips == [False] * 3
        assert trace.losses == pytest.approx(losses, rel=2**-7)
