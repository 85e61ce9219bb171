"""The head of every result: which machine, which versions, which commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "liger-kernel", "flash-attn", "scattermoe")


def describe(device: torch.device | None = None) -> dict[str, str]:
    """Facts by name, in the order to print them. Versions: of those packages that are installed."""
    facts = {"device": device_name(device or torch.device("cpu"))}
    facts["cpu"] = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    facts["load"] = f"{os.getloadavg()[0]:.1f} processes wanted a core over the last minute"
    facts["python"] = platform.python_version()
    facts |= {name: version for name in PACKAGES if (version := _version(name))}
    facts["commit"] = commit()
    return facts


def as_text(facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {value}" for name, value in facts.items())


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {runtime}"
    return f"CPU, {platform.machine()}"


def cpu_name() -> str:
    """The CPU's model, and the widest vector instructions that matter for bf16."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    wanted = {"amx_bf16", "avx512_bf16", "avx512f", "avx2"}
    flags = sorted(wanted & set(fields.get("flags", "").split()))
    model = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        model += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    return f"{model} {' '.join(flags)}".strip()


def commit() -> str:
    """Short hash of the checkout, "+ changes" where the tree differs from it; "unknown" outside a checkout."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} + changes" if changed else head


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
