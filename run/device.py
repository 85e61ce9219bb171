"""What a run computes with: the device that --device names, or that `auto` takes on this machine, and its kernels."""

from __future__ import annotations

import os
from types import ModuleType

import torch

from heiretsu.kernels import fused, plain
from heiretsu.run.config import RunConfig


def find_device(config: RunConfig) -> torch.device:
    """The device of --device, this rank's own on a machine with several. ValueError if it cannot do what is asked."""
    float64, ranks = config.dtype == "float64", config.num_ranks
    kind = choose_device(config.device, fused=config.fused, float64=float64, amp=config.amp, ranks=ranks)
    if config.amp == "fp16" and kind == "cpu":
        raise ValueError("--amp fp16 needs a GPU, and this run is on the cpu: use --amp bf16, which works there")
    if config.amp == "bf16" and kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("--amp bf16 needs a GPU of compute capability 8.0 or later: use --amp fp16")
    if config.autotune and kind != "cuda":
        raise ValueError(f"--autotune measures Triton kernels and needs a GPU, and this run is on the {kind}")
    if kind != "cuda":
        return torch.device(kind)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise ValueError(f"local rank {local_rank} has no GPU: this machine has {gpus}, and each rank needs its own")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_ops(fuse: bool, device: torch.device) -> tuple[ModuleType, str]:
    """The ops that a model is handed, heiretsu.kernels.fused or .plain, and what they are in words."""
    return (fused, fused.describe(device)) if fuse else (plain, "plain PyTorch ops")


def choose_device(name: str, *, fused: bool = False, float64: bool = False, amp: str = "none", ranks: int = 1) -> str:
    """ "cuda", "mps" or "cpu". ValueError, in the words of the flags, where this machine has none or it cannot do what
    is asked.

    auto takes a CUDA GPU where there is one; on a Mac its GPU, mps, for what that can run, and the CPU for the rest:
    mps has neither Triton nor float64, and no process group carries its tensors.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    lacks = {
        "--fused, whose kernels run on CUDA and on the CPU": fused,
        "--dtype float64": float64,
        f"{ranks} ranks, between which gloo carries CPU tensors only": ranks > 1,
        "--amp bf16 before macOS 14": (
            amp == "bf16" and available["mps"] and not torch.backends.mps.is_macos_or_newer(14, 0)
        ),
    }
    beyond_mps = next((what for what, asked in lacks.items() if asked), None)
    if name == "auto":
        return "cuda" if available["cuda"] else "mps" if available["mps"] and beyond_mps is None else "cpu"
    if not available[name]:
        raise ValueError(f"--device {name} is not available on this machine; try --device auto")
    if name == "mps" and beyond_mps is not None:
        raise ValueError(f"--device mps cannot run {beyond_mps}: use --device cpu")
    return name
