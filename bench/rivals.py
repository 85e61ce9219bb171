"""The ordinary alternatives to each op: PyTorch's own best form, and public kernel libraries where they are installed.

Each takes a workload's inputs and returns what `Workload.call` returns. A rival that does less (flash-attn draws other
dropout masks, ScatterMoE casts nothing) is left out where the parity check could not accept it.
"""

import functools
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from heiretsu.bench.workloads import Inputs, Workload, attention_heads

CHUNK_TOKENS = 1024

Rival = Callable[[Inputs], tuple]


def for_workload(workload: Workload, device: torch.device) -> dict[str, Rival]:
    """{name: implementation} of what can run here; a library's name is there only if it can be imported."""
    if "dropout" in workload.series:
        return {}  # their masks are others
    found = dict(_TORCH.get(workload.op, {}))
    if device.type == "cuda":
        found |= _TORCH_GPU.get(workload.op, {})
        libraries = _LIBRARIES.get(workload.op, {})
        found |= {name: rival for name, (module, rival) in libraries.items() if importlib.util.find_spec(module)}
    return found


def on_gpu(workload: Workload) -> dict[str, Rival]:
    """Every rival of a GPU that is installed here, whatever the device: to rehearse them."""
    return for_workload(workload, torch.device("cuda"))


def _sdpa(inputs):
    q, k, v = attention_heads(inputs)
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]),)


def _sdpa_by(backend: str) -> Rival:
    def sdpa(inputs):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return _sdpa(inputs)

    return sdpa


def _flex_attention(inputs):
    q, k, v = attention_heads(inputs)
    mask = _causal_mask(q.shape[2], q.device)
    return (_compiled_flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]),)


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=4)
def _causal_mask(T: int, device: torch.device):
    return create_block_mask(lambda b, h, query, key: query >= key, None, None, T, T, device=device)


def _aten_layer_norm(inputs):
    total = inputs["x"] + inputs["residual"]
    return F.layer_norm(total, total.shape[-1:], inputs["weight"], inputs["bias"]), total


def _cross_entropy(inputs):
    return (F.cross_entropy(F.linear(inputs["x"], inputs["weight"]).float(), inputs["targets"]),)


def _chunk_loss(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")


def _compiled_chunks(inputs):
    """A few thousand tokens at a time, whose logits are computed again in the backward pass: what torchtune does."""
    loss = torch.compile(_chunk_loss, dynamic=False)
    rows = zip(inputs["x"].split(CHUNK_TOKENS), inputs["targets"].split(CHUNK_TOKENS), strict=True)
    total = sum(checkpoint(loss, x, inputs["weight"], targets, use_reentrant=False) for x, targets in rows)
    return (total / len(inputs["x"]),)


def _softmax_route(inputs):
    top, _ = inputs["logits"].topk(inputs["top_k"], dim=-1)
    return (top.float().softmax(-1).to(top.dtype),)


def _grouped_mm(inputs):
    """Tokens sorted by expert, two of PyTorch's grouped matrix products, gelu between, a sum over each token's rows."""
    x, gates, experts = inputs["x"], inputs["gates"], inputs["experts"]
    num_experts, top_k = inputs["w1"].shape[0], experts.shape[1]
    sorted_experts, order = experts.flatten().sort(stable=True)
    ends = torch.bincount(sorted_experts, minlength=num_experts).cumsum(0).int()
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # the public name came with torch 2.10
    hidden = grouped_mm(x[order // top_k], inputs["w1"], offs=ends) + inputs["b1"][sorted_experts]
    rows = grouped_mm(F.gelu(hidden, approximate="tanh"), inputs["w2"], offs=ends) + inputs["b2"][sorted_experts]
    weighted = rows * gates.flatten()[order, None]
    return (torch.zeros_like(x, dtype=torch.float32).index_add(0, order // top_k, weighted.float()).to(x.dtype),)


def _transformers_experts(inputs):
    """transformers' grouped form of an experts module without a gate, as its mixture models call it."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    num_experts = inputs["w1"].shape[0]
    module: Any = SimpleNamespace(
        num_experts=num_experts, num_local_experts=num_experts, config=SimpleNamespace(num_experts=num_experts),
        has_gate=False, has_bias=True, is_transposed=True, _is_expert_parallel=False, has_post_expert_norm=False,
        up_proj=inputs["w1"], up_proj_bias=inputs["b1"], down_proj=inputs["w2"], down_proj_bias=inputs["b2"],
        act_fn=lambda x: F.gelu(x, approximate="tanh"),
    )  # fmt: skip
    return (grouped_mm_experts_forward(module, inputs["x"], inputs["experts"], inputs["gates"]),)


def _flash_attn(inputs):
    from flash_attn import flash_attn_func

    q, k, v = (heads.transpose(1, 2) for heads in attention_heads(inputs))
    return (flash_attn_func(q, k, v, causal=True).transpose(1, 2),)


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
_TORCH_GPU: dict[str, dict[str, Rival]] = {
    "attention": {
        "SDPA flash": _sdpa_by("FLASH_ATTENTION"),
        "SDPA cuDNN": _sdpa_by("CUDNN_ATTENTION"),
        "flex_attention": _flex_attention,
    },
    "linear_cross_entropy": {"compiled chunks": _compiled_chunks},
}
_LIBRARIES: dict[str, dict[str, tuple[str, Rival]]] = {
    "attention": {"flash-attn": ("flash_attn", _flash_attn)},
    "layer_norm": {"Liger": ("liger_kernel", _liger_layer_norm)},
    "linear_cross_entropy": {"Liger": ("liger_kernel", _liger_cross_entropy)},
    "expert_mlp": {
        "transformers experts": ("transformers", _transformers_experts),
        "ScatterMoE": ("scattermoe", _scattermoe),
    },
}
