"""The launch table's overrides."""

import threading

import torch

from tests.kernels import forms

if forms.HAS_TRITON:
    from heiretsu.kernels import launch


def test_override_holds_on_the_threads_in_which_autograd_runs_a_backward(monkeypatch):
    """Once it was a context variable: on a GPU, no backward saw it."""
    monkeypatch.setattr(launch, "architecture", lambda device: "hopper")
    found = []

    def ask():
        found.append(launch.parameters("dropout", torch.device("cpu")))

    with launch.override(num_warps=2), launch.override(BLOCK_N=1):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    ask()
    table = launch.lookup("dropout", "hopper")
    assert found == [table | {"num_warps": 2, "BLOCK_N": 1}, table]
