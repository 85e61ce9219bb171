"""The ops of `heiretsu.kernels.plain` in their fast forms: same names, signatures and meaning.

The device of an op's first tensor chooses the form: on a GPU the Triton kernel runs; on the CPU the fastest CPU form,
unless TRITON_INTERPRET=1 was set before the import, when the Triton kernel itself runs in Triton's interpreter. This
file is the only place that chooses. It works without Triton installed (macOS), on CPU tensors.
"""

import functools
import importlib.util
import inspect

import torch

from heiretsu.kernels import plain
from heiretsu.kernels.cpu import attention as cpu_attention
from heiretsu.kernels.cpu import cross_entropy as cpu_cross_entropy
from heiretsu.kernels.cpu import moe as cpu_moe
from heiretsu.kernels.cpu import pointwise as cpu_pointwise

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from heiretsu.kernels.gpu import attention as triton_attention
    from heiretsu.kernels.gpu import bias_gelu as triton_bias_gelu
    from heiretsu.kernels.gpu import cross_entropy as triton_cross_entropy
    from heiretsu.kernels.gpu import dropout as triton_dropout
    from heiretsu.kernels.gpu import launch, moe
    from heiretsu.kernels.gpu import layer_norm as triton_layer_norm

INTERPRETED = HAS_TRITON and launch.INTERPRETED


def _choose(name, cpu_form, triton_form):
    """The op that runs cpu_form or triton_form by the device of its first tensor. triton_form: None without Triton."""
    specification = getattr(plain, name)
    first_name = next(iter(inspect.signature(specification).parameters))

    @functools.wraps(specification)
    def op(*args, **kwargs):
        first = args[0] if args else kwargs.get(first_name)
        device = first.device.type if isinstance(first, torch.Tensor) else "cpu"  # no tensor: for the form to refuse
        if device == "cpu" and not INTERPRETED:
            return cpu_form(*args, **kwargs)
        if triton_form is None:
            raise ValueError(f"{name}: {device} tensors need Triton; install it, or move them to the CPU")
        return triton_form(*args, **kwargs)

    return op


def describe(device) -> str:
    """One line for start-up: which forms run on tensors of this device (a torch.device)."""
    if device.type == "cpu" and not INTERPRETED:
        return "fused kernels: CPU forms (ATen, chunked, grouped)"
    if not HAS_TRITON:
        raise ValueError(f"fused kernels on {device.type} need Triton; install it, or use the CPU")
    if INTERPRETED:
        return "fused kernels: Triton in the interpreter"
    return f"fused kernels: Triton ({launch.architecture(device)})"


attention = _choose("attention", cpu_attention.attention, triton_attention.attention if HAS_TRITON else None)
attention_lse = _choose(
    "attention_lse", cpu_attention.attention_lse, triton_attention.attention_lse if HAS_TRITON else None
)
route = _choose("route", cpu_moe.route, moe.route if HAS_TRITON else None)
expert_mlp = _choose("expert_mlp", cpu_moe.expert_mlp, moe.expert_mlp if HAS_TRITON else None)
bias_gelu = _choose("bias_gelu", cpu_pointwise.bias_gelu, triton_bias_gelu.bias_gelu if HAS_TRITON else None)
dropout = _choose("dropout", cpu_pointwise.dropout, triton_dropout.dropout if HAS_TRITON else None)
layer_norm = _choose("layer_norm", cpu_pointwise.layer_norm, triton_layer_norm.layer_norm if HAS_TRITON else None)
linear_cross_entropy = _choose(
    "linear_cross_entropy",
    cpu_cross_entropy.linear_cross_entropy,
    triton_cross_entropy.linear_cross_entropy if HAS_TRITON else None,
)
