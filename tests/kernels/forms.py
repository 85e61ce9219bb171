"""Which forms of the fused ops can run in this process, and what each of them is.

cpu-form: `fused` on CPU tensors. interpreter: the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1, which
Triton reads once, at import). gpu: the Triton kernels on the device. Test ids carry the name: a report says what ran.
"""

import importlib.util
import os

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
