"""Top-k routing on CPU tensors, in ATen operations that autograd differentiates."""

import torch

from heiretsu.kernels.arguments import checked
from heiretsu.kernels.dtypes import at_least_float32


@checked
def route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`plain.route`: gates (N, K) in logits' dtype, experts (N, K) int64.

    A softmax renormalised over the chosen experts is the softmax of their logits alone, so the backward touches K
    values of a row instead of E.
    """
    experts = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = logits.gather(1, experts)
    return chosen.to(at_least_float32(logits.dtype)).softmax(-1).to(logits.dtype), experts
