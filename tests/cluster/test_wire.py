"""bench/parallel.py between two hosts with a limit: what it counts, and that gradients leave while backward runs."""

import json
import subprocess

import pytest

from heiretsu.bench import parallel as bench
from heiretsu.bench.network import ROOT
from tests.cluster.launching import PYTHON

pytestmark = pytest.mark.full

# Ethernet, IP and TCP: 66 bytes of 1514 at most for a segment, as much for each acknowledgement, and gloo's own
# message headers and torch's beats.
HEADERS_AT_MOST = 1.10


def test_counted_and_sent_bytes_agree_and_gradients_leave_during_backward(tmp_path, row):
    file = tmp_path / "wire.json"
    command = [PYTHON, "bench/parallel.py", "--hosts", "2", "--rate", "100mbit", "--steps", "3", "--json", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert set(found) == set(bench.AXES)
    for axis, figures in found.items():
        assert figures["counted"] > 100_000, axis
        assert 1 <= figures["wire"] / figures["counted"] <= HEADERS_AT_MOST, axis
        assert 0 < figures["waits"] < 1, axis
    assert found["dp"]["sent_in_backward"] > 0.05
    ratios = [figures["wire"] / figures["counted"] for figures in found.values()]
    early = 100 * found["dp"]["sent_in_backward"]
    row("wire", f"interface / counted bytes {min(ratios):.3f} to {max(ratios):.3f}; dp: {early:.0f}% sent in backward")
