"""The machine: card, driver, versions, what is installed beside; and the two roofs that it reaches here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import torch

from heiretsu.bench import environment
from heiretsu.bench.gpu_kit.kit import Item, Kit
from heiretsu.bench.timing import measure_roofline

# Nothing here is needed: each is a rival, or a convenience, and is left out with a word where it is absent.
OPTIONAL = {
    "transformers": "its grouped experts are a rival of expert_mlp",
    "liger-kernel": "its layer norm and cross-entropy are rivals",
    "flash-attn": "a rival of attention",
    "scattermoe": "a rival of expert_mlp",
    "matplotlib": "draws the charts",
    "tiktoken": "turns a trained model's sample into text",
    "tqdm": "train.py's progress bar",
    "wandb": "train.py --wandb",
    "rich": "colours",
}
SMI = {
    "nvidia-smi": "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,"
    "temperature.gpu,ecc.mode.current,mig.mode.current",
    "rocm-smi": "--showproductname",
}


def items(kit: Kit, group: str) -> list[Item]:
    return [Item("machine", lambda: machine(kit)), Item("roofs", lambda: roofs(kit))]


def machine(kit: Kit) -> None:
    properties = kit.device.properties
    kit.fact("device", f"{kit.device.name}, {properties.total_memory / 2**30:.0f} GiB")
    kit.fact("GPUs", kit.device.cuda.device_count())
    kit.fact("architecture", kit.device.arch or "none that the audit knows")
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    kit.fact("runtime", runtime if (torch.version.cuda or torch.version.hip) else "none: torch for the CPU")
    cudnn = torch.backends.cudnn
    kit.fact("cuDNN", cudnn.version() if cudnn.is_available() else "none")
    facts = environment.describe(kit.torch_device)
    for name in ("cpu", "load", "python", "torch", "triton", "commit"):
        kit.fact(name, facts.get(name, "not installed"))
    for package, purpose in OPTIONAL.items():
        if (version := installed(package)) is None:
            kit.absent(package, f"not installed ({purpose})")
        else:
            kit.fact(package, version)
    for program, query in SMI.items():
        if path := shutil.which(program):
            form = ["--format=csv,noheader"] if program == "nvidia-smi" else []
            answer = subprocess.run([path, query, *form], capture_output=True, text=True, timeout=30)
            kit.fact(program, answer.stdout.strip() or answer.stderr.strip())
    if not any(map(shutil.which, SMI)):
        kit.absent("driver and clocks", "neither nvidia-smi nor rocm-smi is on the path")
    kit.fact("compiled kernels on disk", triton_cache_size())


def installed(package: str) -> str | None:
    """Its version; None where it cannot be imported."""
    module = {"liger-kernel": "liger_kernel", "flash-attn": "flash_attn"}.get(package, package)
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "a version that it does not say"


def triton_cache_size() -> str:
    """A cold cache means that the kernels below were compiled in this run, by many processes at once."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    count = sum(1 for _ in folder.glob("*")) if folder.is_dir() else 0
    return f"{count} in Triton's cache before the run" if count else "none: the cache is cold"


def roofs(kit: Kit) -> None:
    roofline = measure_roofline(kit.torch_device, torch.bfloat16, kit.device.clock(), tiny=kit.rehearse)
    kit.figure("copy bandwidth", roofline.bytes_per_s, "B/s")
    kit.figure("matrix rate", roofline.flops_per_s, "FLOP/s", dtype="bfloat16")
