"""Ops of transformers and mixtures of experts, fast and checked.

    from heiretsu.kernels import attention, bias_gelu    # the ops of `fused`: Triton on a GPU, fast forms on a CPU
    from heiretsu.kernels import fused, plain            # the same, and their specification, as modules

Nothing is imported before an op or a module is asked for: neither torch, nor Triton, which need not be there on a CPU.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heiretsu.kernels.fused import *  # noqa: F403


def __getattr__(name: str):
    if not name.startswith("_"):
        from heiretsu.kernels.arguments import CHECKS  # which has every op

        if name in CHECKS:
            return getattr(importlib.import_module("heiretsu.kernels.fused"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
