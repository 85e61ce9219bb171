"""The specification: each op of the library as the shortest PyTorch that is obviously right.

Differentiable by autograd, any float dtype up to float64. `heiretsu.kernels.fused` has the same names, signatures and
meaning; where the two differ, this file wins. What an op takes, `arguments.py` checks for both: anything else is a
ValueError. An op computes in its inputs' dtypes, under torch.autocast too.

B batch, T queries, S keys, C hidden size, H heads, D head dim, N tokens, E experts, K top-k, F feed-forward size, V
vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heiretsu.kernels.arguments import checked
from heiretsu.kernels.dtypes import at_least_float32
from heiretsu.kernels.random import attention_keep_mask, dropout_keep_mask


@checked
def attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offsets: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention and the log-sum-exp of its scores (Vaswani et al. 2017, eq. 1).

    q: (B, H, T, D). k, v: (B, Hkv, S, D), Hkv divides H; query head h reads key head h // (H // Hkv).
    causal: query i sees keys j <= i + (S - T) (the last query sees every key); a query that sees none gives 0 and
    lse -inf. scale: 1/sqrt(D) unless given. dropout_p, seed, offsets: see `random.attention_keep_mask`.
    Returns out (B, H, T, D) in q's dtype and lse (B, H, T) float32 (float64 for float64).
    """
    H, D, T, S = q.shape[1], q.shape[3], q.shape[2], k.shape[2]
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.transpose(-2, -1)).to(at_least_float32(q.dtype)) * scale  # (B, H, T, S)
    if causal:
        future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores = scores.masked_fill(future, -math.inf)
    lse = scores.logsumexp(-1)
    probs = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()  # a row that sees nothing gives 0
    if dropout_p > 0.0:
        keep = attention_keep_mask(probs.shape, dropout_p, seed, offsets, q.device)
        probs = torch.where(keep, probs / (1.0 - dropout_p), 0.0)
    return probs.to(v.dtype) @ v, lse


@checked
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offsets: tuple[int, int] = (0, 0),
) -> Tensor:
    """`attention_lse` without the lse: (B, H, T, D) in q's dtype."""
    return attention_lse(q, k, v, causal, scale, dropout_p, seed, offsets)[0]


@checked
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias), tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415). x: (..., F). bias: (F,)."""
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


@checked
def dropout(x: Tensor, p: float, seed: int, offset: int = 0) -> Tensor:
    """Inverted dropout whose mask is a function of (seed, global position).

    x: (B, T, C). offset: global sample of x[0].
    """
    if p == 0.0:
        return x
    return torch.where(dropout_keep_mask(x.shape, p, seed, offset, x.device), x / (1.0 - p), 0.0)


@checked
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Any:  # (..., C), or with residual a pair of them
    """Layer norm over the last dim (Ba et al. 2016, arXiv:1607.06450).

    x: (..., C). weight, bias: (C,), any float dtype.

    With residual (same shape as x, any float dtype): returns layer_norm(x + residual) in x's dtype, and x + residual in
    the wider of the two (float32 for float16 beside bfloat16), so that 16-bit branches can feed a float32 stream.
    """
    total = x if residual is None else x + residual
    wide = total.to(at_least_float32(total.dtype))
    wide = F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return wide.to(x.dtype) if residual is None else (wide.to(x.dtype), total)


@checked
def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Top-k routing probabilities, renormalised (Shazeer et al. 2017, arXiv:1701.06538).

    logits: (N, E) float, one row a token. top_k: 1 <= top_k <= E.
    Returns gates (N, K) in logits' dtype, each row summing to 1, and experts (N, K) int64, best first;
    equal logits go to the lower expert.
    """
    experts = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    probs = logits.to(at_least_float32(logits.dtype)).softmax(-1).gather(1, experts)
    return (probs / probs.sum(-1, keepdim=True)).to(logits.dtype), experts


@checked
def expert_mlp(
    x: Tensor, experts: Tensor, gates: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None
) -> Tensor:
    """Mixture of two-layer GELU experts, dropless (Gale et al. 2022, arXiv:2211.15841).

    x: (N, C). experts, gates: (N, K), expert indices (int64 or int32) and their weights; an index outside 0..E-1 adds
    nothing. w1: (E, C, F). w2: (E, F, C). b1: (E, F) or None. b2: (E, C) or None.
    Returns sum_k gates[:, k] * mlp_{experts[:, k]}(x), (N, C) in x's dtype.
    """
    N, C = x.shape
    out = torch.zeros(N, C, dtype=at_least_float32(x.dtype), device=x.device)
    for e in range(w1.shape[0]):  # an expert without tokens adds zero, and gets a zero gradient
        token, slot = (experts == e).nonzero(as_tuple=True)
        hidden = x[token] @ w1[e].to(x.dtype)
        hidden = F.gelu(hidden if b1 is None else hidden + b1[e].to(x.dtype), approximate="tanh")
        y = hidden @ w2[e].to(x.dtype)
        y = y if b2 is None else y + b2[e].to(x.dtype)
        out = out.index_add(0, token, y.to(out.dtype) * gates[token, slot].to(out.dtype)[:, None])
    return out.to(x.dtype)


@checked
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_start: int = 0) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits x @ weight.T and the target's logit; the loss is lse - target_logit.

    x: (N, C). weight: (V, C), rows vocab_start .. vocab_start + V - 1 of the whole vocabulary. targets: (N,) int64,
    whole-vocabulary indices; one outside the shard gives target_logit 0. V = 0 gives lse -inf.
    Returns lse (N,), target_logit (N,), float32 (float64 for float64).
    """
    logits = (x @ weight.to(x.dtype).T).to(at_least_float32(x.dtype))
    local = targets - vocab_start
    inside = (local >= 0) & (local < weight.shape[0])
    if weight.shape[0] == 0:
        return logits.sum(-1) - math.inf, logits.sum(-1)
    picked = logits.gather(1, torch.where(inside, local, 0)[:, None])[:, 0]
    return logits.logsumexp(-1), torch.where(inside, picked, 0.0)
