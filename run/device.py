"""Which kind of device a run is on: what --device names, or what `auto` takes on this machine."""

from __future__ import annotations

import torch


def choose_device(name: str, *, fused: bool = False, float64: bool = False, amp: str = "none", ranks: int = 1) -> str:
    """ "cuda", "mps" or "cpu". ValueError, in the words of the flags, where this machine has none or it cannot do what
    is asked.

    auto takes a CUDA GPU where there is one; on a Mac its GPU, mps, for what that can run, and the CPU for the rest:
    mps has neither Triton nor float64, and no process group carries its tensors.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    beyond_mps = (
        "--fused, whose kernels run on CUDA and on the CPU"
        if fused
        else "--dtype float64"
        if float64
        else f"{ranks} ranks, between which gloo carries CPU tensors only"
        if ranks > 1
        else "--amp bf16 before macOS 14"
        if amp == "bf16" and available["mps"] and not torch.backends.mps.is_macos_or_newer(14, 0)
        else None
    )
    if name == "auto":
        return "cuda" if available["cuda"] else "mps" if available["mps"] and beyond_mps is None else "cpu"
    if not available[name]:
        raise ValueError(f"--device {name} is not available on this machine; try --device auto")
    if name == "mps" and beyond_mps is not None:
        raise ValueError(f"--device mps cannot run {beyond_mps}: use --device cpu")
    return name
