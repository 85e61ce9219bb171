"""Two hosts with two ranks each, on every kind of mesh: the curve of one process."""

import json

import pytest

from heiretsu.bench.network import ROOT
from tests.cluster.launching import ended, launch

pytestmark = pytest.mark.full

STEPS, TOLERANCE = 10, 1e-9
TOPOLOGIES = {
    "dp 4": {"dp": 4},
    "tp 4": {"tp": 4},
    "pp 4": {"pp": 4},
    "ep 4": {"ep": 4},
    "dp 2 x tp 2": {"dp": 2, "tp": 2},
    "dp 2 x pp 2": {"dp": 2, "pp": 2},
    "pp 2 x tp 2": {"pp": 2, "tp": 2},
    "dp 2 x ep 2": {"dp": 2, "ep": 2},
    "ep 2 x tp 2": {"ep": 2, "tp": 2},
    "ep 2 x pp 2": {"ep": 2, "pp": 2},
}
# Which axis has ranks on both hosts: the slowest that fills more than one, and of ep and pp, pp.
CROSSING = ["dp", "tp", "pp", "ep", "dp", "dp", "pp", "dp", "ep", "pp"]


def test_every_mesh_of_two_hosts_trains_as_one_process_does(net, row):
    (status, text), other = ended(launch(net, str(ROOT / "tests/cluster/curves.py"), ranks_per_host=2))
    assert (status, other[0]) == (0, 0), text + other[1]
    found = [json.loads(line) for line in text.splitlines() if line.startswith('{"mesh"')]
    assert [one["mesh"] for one in found] == list(TOPOLOGIES)
    for one, axis in zip(found, CROSSING, strict=True):
        assert one["findings"] == {}, one["mesh"]
        assert one["crossing"] == [axis], one["mesh"]
        assert {host: len(ranks) for host, ranks in one["ranks"].items()} == {"alder": 2, "birch": 2}
    assert found[-1]["ranks"] == {"alder": [0, 2], "birch": [1, 3]}, "ep 2 x pp 2: each host holds one stage"
    for name in ("dp", "tp", "pp", "ep"):
        row(name, f"the curve of one process, {found[['dp', 'tp', 'pp', 'ep'].index(name)]['largest_gap']:.0e} apart")
    mixtures = found[4:]
    names = "; ".join(one["mesh"] for one in mixtures)
    row("mixtures", f"{names}: at most {max(one['largest_gap'] for one in mixtures):.0e} apart")
