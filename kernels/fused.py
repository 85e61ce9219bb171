"""The ops of `heiretsu.kernels.plain` in their fast forms: same names, signatures and meaning.

The device of an op's first tensor chooses the form: on a GPU the Triton kernel runs; on the CPU the fastest CPU form,
unless TRITON_INTERPRET=1 was set before the import, when the Triton kernel itself runs in Triton's interpreter. This
file is the only place that chooses. It works without Triton installed (macOS), on CPU tensors.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from heiretsu.kernels import plain
from heiretsu.kernels.control import CONTROL
from heiretsu.kernels.recording import Call

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from heiretsu.kernels.gpu import launch

INTERPRETED = HAS_TRITON and launch.INTERPRETED
P = ParamSpec("P")
R = TypeVar("R")


def _fast(specification: Callable[P, R], file: str = "") -> Callable[P, R]:
    """The op of `plain` in the form for its first tensor's device: kernels/cpu/<file>.py or kernels/gpu/<file>.py,
    which are named like the op unless given."""
    name = specification.__name__
    first_name = next(iter(inspect.signature(specification).parameters))

    def form(folder: str) -> Callable[P, R]:
        return getattr(importlib.import_module(f"heiretsu.kernels.{folder}.{file or name}"), name)

    cpu_form, triton_form = form("cpu"), form("gpu") if HAS_TRITON else None

    @functools.wraps(specification)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else kwargs.get(first_name)
        device = first.device.type if isinstance(first, torch.Tensor) else "cpu"  # no tensor: for the form to refuse
        use = cpu_form if device == "cpu" and not INTERPRETED and CONTROL.arch is None else triton_form
        if use is None:
            raise ValueError(f"{name}: {device} tensors need Triton; install it, or move them to the CPU")
        result = use(*args, **kwargs)
        if not torch.compiler.is_compiling() and CONTROL.records:
            call = Call.of(specification, args, kwargs)
            for record in CONTROL.records:
                record.calls.append(call)
        return result

    return op


def describe(device: torch.device) -> str:
    """One line for start-up: which forms run on tensors of this device."""
    if device.type == "cpu" and not INTERPRETED:
        return "fused kernels: CPU forms (ATen, chunked, grouped)"
    if not HAS_TRITON:
        raise ValueError(f"fused kernels on {device.type} need Triton; install it, or use the CPU")
    if INTERPRETED:
        return "fused kernels: Triton in the interpreter"
    return f"fused kernels: Triton ({launch.architecture(device)})"


attention = _fast(plain.attention)
attention_lse = _fast(plain.attention_lse, file="attention")
bias_gelu = _fast(plain.bias_gelu)
dropout = _fast(plain.dropout)
expert_mlp = _fast(plain.expert_mlp)
layer_norm = _fast(plain.layer_norm)
linear_cross_entropy = _fast(plain.linear_cross_entropy)
route = _fast(plain.route)
