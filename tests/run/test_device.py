"""--device auto takes what can run what is asked; one that is named and cannot is refused by the name of the flag."""

import pytest
import torch

from heiretsu.run.device import choose_device


@pytest.fixture
def machine(monkeypatch):
    """machine("mps"): as if this were one with these GPUs."""

    def has(*gpus, macos=14):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in gpus)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major)

    return has


@pytest.mark.parametrize(
    "gpus, asked, chosen",
    [
        (["cuda"], {"fused": True, "float64": True, "ranks": 8}, "cuda"),
        (["mps"], {}, "mps"),
        (["mps"], {"amp": "bf16"}, "mps"),
        (["mps"], {"fused": True}, "cpu"),  # what `make train` asks for
        (["mps"], {"float64": True}, "cpu"),
        (["mps"], {"ranks": 2}, "cpu"),
        ([], {}, "cpu"),
    ],
)
def test_auto_takes_what_can_run_the_flags(machine, gpus, asked, chosen):
    machine(*gpus)
    assert choose_device("auto", **asked) == chosen


def test_auto_on_an_old_macos_leaves_bf16_to_the_cpu(machine):
    machine("mps", macos=13)
    assert choose_device("auto", amp="bf16") == "cpu"


@pytest.mark.parametrize(
    "gpus, asked, what",
    [
        (["mps"], {"fused": True}, "--device mps cannot run --fused"),
        (["mps"], {"float64": True}, "--device mps cannot run --dtype float64"),
        (["mps"], {"ranks": 2}, "--device mps cannot run 2 ranks"),
        ([], {}, "--device mps is not available on this machine"),
    ],
)
def test_a_device_that_cannot_is_refused_in_one_line(machine, gpus, asked, what):
    machine(*gpus)
    with pytest.raises(ValueError, match=what) as refused:
        choose_device("mps", **asked)
    assert "\n" not in str(refused.value)
