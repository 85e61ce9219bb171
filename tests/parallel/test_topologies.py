"""One model, one loss curve: every topology against the single process, in float64, to 1e-9."""

import functools

import pytest

from heiretsu.parallel.mesh import make_mesh
from tests.training import DENSE, MIXTURE, assemble, difference, run_config, train

STEPS, TOLERANCE = 10, 1e-9
MODELS = {"dense": DENSE, "mixture": MIXTURE}

TOPOLOGIES = [
    ("dense", {"dp": 2}),
    ("dense", {"dp": 4}),
    ("dense", {"tp": 2}),
    ("dense", {"tp": 4}),
    ("dense", {"pp": 2}),
    ("dense", {"pp": 4}),
    ("dense", {"dp": 2, "tp": 2}),
    ("dense", {"dp": 2, "pp": 2}),
    ("dense", {"pp": 2, "tp": 2}),
    ("dense", {"dp": 2, "pp": 2, "tp": 2}),
    ("mixture", {"dp": 2}),
    ("mixture", {"ep": 2}),
    ("mixture", {"ep": 4}),
    ("mixture", {"tp": 2}),
    ("mixture", {"pp": 2}),
    ("mixture", {"dp": 2, "ep": 2}),
    ("mixture", {"ep": 2, "tp": 2}),
    ("mixture", {"ep": 2, "pp": 2}),
    ("mixture", {"ep": 2, "pp": 2, "tp": 2}),
    ("mixture", {"dp": 2, "ep": 4}),
]


@functools.cache
def reference(model: str):
    return train(make_mesh(), run_config(MODELS[model]), STEPS)


def name(topology: dict) -> str:
    return "x".join(f"{axis}{size}" for axis, size in topology.items())


@pytest.mark.parametrize(
    "model, topology", TOPOLOGIES, ids=lambda value: value if isinstance(value, str) else name(value)
)
def test_topology_gives_the_run_of_one_process(ranks, model, topology):
    microbatches = 1 if topology.get("dp", 1) * topology.get("ep", 1) == 8 else 2 if "pp" not in topology else 4
    config = run_config(MODELS[model], microbatches=microbatches, **topology)
    traces = ranks(train, config, STEPS, **topology)
    single = reference(model)
    for trace in traces:
        assert trace.losses == pytest.approx(single.losses, rel=TOLERANCE)
        assert trace.aux_losses == pytest.approx(single.aux_losses, rel=TOLERANCE)
        assert trace.grad_norms == pytest.approx(single.grad_norms, rel=TOLERANCE)
        assert trace.eval_losses == pytest.approx(single.eval_losses, rel=TOLERANCE)
        assert trace.expert_loads == single.expert_loads
    for kind in ("first_grads", "params"):
        worst, where = difference(
            assemble([getattr(trace, kind) for trace in traces]), assemble([getattr(single, kind)])
        )
        assert worst < TOLERANCE, f"{kind}: {where} differs by {worst:.1e}"
