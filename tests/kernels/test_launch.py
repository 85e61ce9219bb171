"""Tiles: which entry a launch takes, and overrides."""

import threading

import torch

from tests.kernels import forms

if forms.HAS_TRITON:
    from heiretsu.kernels.gpu import launch


def test_override_holds_on_the_threads_in_which_autograd_runs_a_backward(monkeypatch):
    """Once it was a context variable: on a GPU, no backward saw it."""
    monkeypatch.setattr(launch, "architecture", lambda device: "hopper")
    found = []

    tiles = launch.tiles_named("dropout")

    def ask():
        found.append(tiles.parameters(torch.device("cpu")))

    with launch.override(num_warps=2), launch.override(BLOCK_N=1):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    ask()
    table = tiles.find("hopper").parameters
    assert found == [table | {"num_warps": 2, "BLOCK_N": 1}, table]


def test_dropout_takes_an_entry_of_its_own_where_the_table_has_one():
    """Once it took the tiles made for none, which spill: 2.4 KB a thread in the forward on B200."""
    forward, delta = map(launch.tiles_named, ("attention_forward", "attention_delta"))
    own = forward.rows["attention_forward/dropout"]["hopper"]
    assert forward.find("hopper", 64, dropout=True).parameters == own[64]
    assert forward.find("hopper", 64).parameters != own[64]
    assert forward.find("hopper", 64, itemsize=4, dropout=True).row == "attention_forward/fp32"
    assert delta.find("hopper", 64, dropout=True).row == "attention_delta"
