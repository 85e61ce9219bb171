"""The ordinary alternatives to each op: PyTorch's own best form, and public kernel libraries where they are installed.

Each takes a workload's inputs and returns what `Workload.call` returns. A rival that does less (flash-attn draws other
dropout masks, ScatterMoE casts nothing) is left out where the parity check could not accept it.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from heiretsu.bench.workloads import Inputs, Workload

Rival = Callable[[Inputs], tuple]


def for_workload(workload: Workload, device: torch.device) -> dict[str, Rival]:
    """{name: implementation} of what can run here; a library's name is there only if it can be imported."""
    found = dict(_TORCH.get(workload.op, {}))
    if "dropout" in workload.series:
        found = {}  # their masks are others
    if device.type == "cuda":
        libraries = _LIBRARIES.get(workload.op, {}) if "dropout" not in workload.series else {}
        found |= {name: rival for name, (module, rival) in libraries.items() if importlib.util.find_spec(module)}
    return found


def _sdpa(inputs):
    q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4)
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)


def _aten_layer_norm(inputs):
    total = inputs["x"] + inputs["residual"]
    return F.layer_norm(total, total.shape[-1:], inputs["weight"], inputs["bias"]), total


def _cross_entropy(inputs):
    return (F.cross_entropy(F.linear(inputs["x"], inputs["weight"]).float(), inputs["targets"]),)


def _softmax_route(inputs):
    top, _ = inputs["logits"].topk(inputs["top_k"], dim=-1)
    return (top.float().softmax(-1).to(top.dtype),)


def _grouped_mm(inputs):
    """Tokens sorted by expert, two of PyTorch's grouped matrix products, gelu between, a sum over each token's rows."""
    x, gates, experts = inputs["x"], inputs["gates"], inputs["experts"]
    num_experts, top_k = inputs["w1"].shape[0], experts.shape[1]
    sorted_experts, order = experts.flatten().sort(stable=True)
    ends = torch.bincount(sorted_experts, minlength=num_experts).cumsum(0).int()
    hidden = F.grouped_mm(x[order // top_k], inputs["w1"], offs=ends) + inputs["b1"][sorted_experts]
    rows = F.grouped_mm(F.gelu(hidden, approximate="tanh"), inputs["w2"], offs=ends) + inputs["b2"][sorted_experts]
    weighted = rows * gates.flatten()[order, None]
    return (torch.zeros_like(x, dtype=torch.float32).index_add(0, order // top_k, weighted.float()).to(x.dtype),)


def _flash_attn(inputs):
    from flash_attn import flash_attn_qkvpacked_func

    return (flash_attn_qkvpacked_func(inputs["qkv"], causal=True).transpose(1, 2),)


def _liger_layer_norm(inputs):
    from liger_kernel.transformers.functional import liger_layer_norm

    total = inputs["x"] + inputs["residual"]
    return liger_layer_norm(total, inputs["weight"], inputs["bias"], 1e-5), total


def _liger_cross_entropy(inputs):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return (liger_fused_linear_cross_entropy(inputs["x"], inputs["weight"], inputs["targets"]),)


def _scattermoe(inputs):
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    experts, top_k = inputs["experts"], inputs["experts"].shape[1]
    plan = flatten_sort_count(experts, inputs["w1"].shape[0])
    hidden = parallel_linear(inputs["x"], inputs["w1"], top_k, *plan, expert_biases=inputs["b1"], grouped_out=True)
    hidden = F.gelu(hidden, approximate="tanh")
    biases = {"expert_biases": inputs["b2"], "gates": inputs["gates"]}
    return (parallel_linear(hidden, inputs["w2"], 1, *plan, grouped_in=True, **biases),)


_TORCH: dict[str, dict[str, Rival]] = {
    "attention": {"SDPA": _sdpa},
    "layer_norm": {"F.layer_norm": _aten_layer_norm},
    "linear_cross_entropy": {"F.cross_entropy": _cross_entropy},
    "route": {"topk + softmax": _softmax_route},
    "expert_mlp": {"grouped_mm": _grouped_mm},
}
_LIBRARIES: dict[str, dict[str, tuple[str, Rival]]] = {
    "attention": {"flash-attn": ("flash_attn", _flash_attn)},
    "layer_norm": {"Liger": ("liger_kernel", _liger_layer_norm)},
    "linear_cross_entropy": {"Liger": ("liger_kernel", _liger_cross_entropy)},
    "expert_mlp": {"ScatterMoE": ("scattermoe", _scattermoe)},
}
