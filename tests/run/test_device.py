"""--device auto takes what can run what is asked; one that is named and cannot is refused by the name of the flag."""

import pytest
import torch

from heiretsu.kernels import fused, plain
from heiretsu.run import device
from heiretsu.run.device import choose_device
from heiretsu.run.options import parse_args


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
        (["mps"], {"fused": True}, "cannot run --fused, whose kernels run on CUDA and on the CPU: use --device cpu"),
        (["mps"], {"float64": True}, "cannot run --dtype float64: use --device cpu"),
        (["mps"], {"ranks": 2}, "cannot run 2 ranks, between which gloo carries CPU tensors only: use --device cpu"),
        (["mps"], {"amp": "bf16"}, "cannot run --amp bf16 before macOS 14: use --device cpu"),
        ([], {"fused": True}, "is not available on this machine; try --device auto"),
    ],
)
def test_a_device_that_cannot_is_refused_in_one_line(machine, gpus, asked, what):
    machine(*gpus, macos=13)
    with pytest.raises(ValueError) as refused:
        choose_device("mps", **asked)
    assert str(refused.value) == f"--device mps {what}"


def test_a_device_that_is_named_is_taken_where_it_is(machine):
    machine("mps", "cuda")
    assert [choose_device(name) for name in ("auto", "cuda", "mps", "cpu")] == ["cuda", "cuda", "mps", "cpu"]
    assert choose_device("mps", amp="bf16") == "mps" and choose_device("mps", amp="fp16") == "mps"
    machine("mps", macos=13)
    assert choose_device("mps") == "mps" == choose_device("auto", amp="fp16")
    machine()
    with pytest.raises(ValueError, match="^--device cuda is not available on this machine; try --device auto$"):
        choose_device("cuda")


def test_macos_is_asked_for_its_fourteenth(machine, monkeypatch):
    asked = []
    machine("mps")
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: asked.append(version) or True)
    assert choose_device("auto", amp="bf16") == "mps" and asked == [(14, 0)]


def test_a_run_asks_with_all_that_its_device_must_do(monkeypatch):
    asked = []
    monkeypatch.setattr(device, "choose_device", lambda name, **what: asked.append((name, what)) or "mps")
    flags = "--device mps --dp 2 --fused --dtype float64"
    assert device.find_device(parse_args(flags.split(), world_size=2)) == torch.device("mps")
    device.find_device(parse_args(["--amp", "bf16"], world_size=1))
    assert asked == [
        ("mps", {"fused": True, "float64": True, "amp": "none", "ranks": 2}),
        ("auto", {"fused": False, "float64": False, "amp": "bf16", "ranks": 1}),
    ]


def test_ops_are_plain_unless_they_are_to_be_fused():
    assert device.choose_ops(False, torch.device("cpu")) == (plain, "plain PyTorch ops")
    assert device.choose_ops(True, torch.device("cpu")) == (fused, fused.describe(torch.device("cpu")))
