"""Which forms of the fused ops can run in this process, and what each of them is.

cpu-form: `fused` on CPU tensors. interpreter: the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1, which
Triton reads once, at import). gpu: the Triton kernels on the device. Test ids carry the name: a report says what ran.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = {"cpu-form": "cpu", "interpreter": "cpu", "gpu": "cuda"}
TRITON_DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None  # None: no kernel can run here


def available() -> list[str]:
    """Forms that this process can run: the interpreter alone under TRITON_INTERPRET=1, else what the machine has."""
    if INTERPRETED:
        return ["interpreter"]
    return ["cpu-form", "gpu"] if torch.cuda.is_available() else ["cpu-form"]


def cpu_form(op: str) -> Callable:
    """The public function of the op's file in kernels/cpu."""
    return _form("cpu", op)


def triton_form(op: str) -> Callable:
    """The public function of the op's file in kernels/gpu, which launches Triton on any tensor."""
    return _form("gpu", op)


def _form(folder: str, op: str) -> Callable:
    file = {"attention_lse": "attention"}.get(op, op)
    return getattr(importlib.import_module(f"heiretsu.kernels.{folder}.{file}"), op)
