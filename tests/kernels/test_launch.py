"""The launch table: which entry a launch takes, and overrides."""

import threading

import torch

from tests.kernels import forms

if forms.HAS_TRITON:
    from heiretsu.kernels.gpu import launch


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


def test_dropout_takes_an_entry_of_its_own_where_the_table_has_one():
    """Once it took the tiles made for none, which spill: 2.4 KB a thread in the forward on B200."""
    own = launch.TABLE["hopper"]["attention_forward/dropout"]
    assert launch.lookup("attention_forward", "hopper", 64, dropout=True) == own[64]
    assert launch.lookup("attention_forward", "hopper", 64) != own[64]
    assert launch.find("attention_forward", "hopper", 64, itemsize=4, dropout=True).row == "attention_forward/fp32"
    assert launch.find("attention_delta", "hopper", 64, dropout=True).row == "attention_delta"
