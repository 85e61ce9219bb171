"""transformers' GPT-2 with dropout by docs/repeat-a-run.md and, for a mixture, experts in place of its MLPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

from tests.oracle.draws import derived_seed, kept, normal

if TYPE_CHECKING:
    from tests.oracle.training import Run


@dataclass
class Place:
    """Where in a run a forward pass is: dropout masks depend on it."""

    seed: int
    step: int = 0
    first_sample: int = 0


class PlacedDropout(nn.Module):
    """Inverted dropout of activations (B, T, C), or of attention's probabilities (B, H, T, S)."""

    def __init__(self, p: float, place: Place, *site: int | str):
        super().__init__()
        self.p, self.place, self.site = p, place, site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        index = np.indices(x.shape, sparse=True)
        sample = index[0] + self.place.first_sample
        if x.dim() == 4:
            counters = index[3], index[2], index[1], sample
        else:
            counters = index[2], index[1], 0, sample
        seed = derived_seed(self.place.seed, self.place.step, *self.site)
        return x * kept(x.shape, self.p, seed, counters) / (1 - self.p)


def attention(module, query, key, value, attention_mask, scaling, **_):
    """Vaswani et al. 2017, equation 1, with the future masked and dropout on the probabilities."""
    T = query.shape[2]
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    weights = module.attn_dropout(scores.softmax(-1))
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("by_hand", attention)


class Mixture(nn.Module):
    """Top-k of E two-layer GELU experts, no token dropped (Shazeer et al. 2017; Fedus et al. 2021)."""

    def __init__(self, width: int, num_experts: int, top_k: int, dropout: nn.Module):
        super().__init__()
        self.top_k, self.dropout = top_k, dropout
        self.router = nn.Parameter(torch.empty(num_experts, width))
        self.w1 = nn.Parameter(torch.empty(num_experts, width, 4 * width))
        self.b1 = nn.Parameter(torch.zeros(num_experts, 4 * width))
        self.w2 = nn.Parameter(torch.empty(num_experts, 4 * width, width))
        self.b2 = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probabilities = (x @ self.router.T).softmax(-1)  # (B, T, E)
        best, chosen = probabilities.topk(self.top_k)
        gates = best / best.sum(-1, keepdim=True)
        num_experts = len(self.router)
        y, self.balance = torch.zeros_like(x), torch.zeros(len(x), dtype=x.dtype)
        for e in range(num_experts):
            hidden = F.gelu(x @ self.w1[e] + self.b1[e], approximate="tanh")
            gate = torch.where(chosen == e, gates, 0).sum(-1, keepdim=True)
            y = y + gate * (hidden @ self.w2[e] + self.b2[e])
            # Fedus et al. 2021, equation 4, for each sequence: E * sum_e f_e P_e
            f = (chosen == e).to(x.dtype).mean((1, 2))
            self.balance = self.balance + num_experts * f * probabilities[..., e].mean(1)
        return self.dropout(y)


@dataclass
class Parameter:
    """One parameter here and in a checkpoint.

    name, shape: in the checkpoint. ours: the module's; `view` shows it in the checkpoint's layout. std: of its initial
    normals; where it has none, the constant `fill`.
    """

    name: str
    shape: tuple[int, ...]
    ours: nn.Parameter
    view: Callable[[torch.Tensor], torch.Tensor]
    std: float | None = None
    fill: float = 0.0

    @property
    def decays(self) -> bool:
        """Radford et al.'s practice since GPT: matrices and embeddings do, biases and norms do not."""
        return self.std is not None

    def published(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor like `ours` as a checkpoint has it: rows that only fill the vocabulary up are zero."""
        seen = self.view(tensor.detach())
        return torch.cat([seen, seen.new_zeros(self.shape[0] - len(seen), *seen.shape[1:])])


def build(run: Run, place: Place) -> tuple[GPT2LMHeadModel, list[Parameter]]:
    """The model of a run, float64, with its initial values."""
    C, V = run.n_embed, 257
    sizes = {"n_positions": run.block_size, "n_embd": C, "n_layer": run.n_layer, "n_head": run.n_head}
    no_text = {"bos_token_id": None, "eos_token_id": None}  # transformers' own are outside this vocabulary
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, **sizes, **no_text, attn_implementation="by_hand")).double()
    gpt = model.transformer
    gpt.drop = PlacedDropout(run.dropout, place, "embedding")
    padded = -(-V // 128) * 128
    parameters = [
        Parameter("wte.weight", (padded, C), gpt.wte.weight, _same, std=0.02),
        Parameter("wpe.weight", (run.block_size, C), gpt.wpe.weight, _same, std=0.02),
    ]
    for layer, block in enumerate(gpt.h):
        parameters += _block(run, place, layer, block)
    parameters += _norm("ln_f", gpt.ln_f)
    for parameter in parameters:
        into = parameter.view(parameter.ours.data)
        if parameter.std is None:
            into.fill_(parameter.fill)
        else:
            into.copy_(normal(run.seed, parameter.name, parameter.shape, parameter.std)[: len(into)])
    return model, parameters


def _block(run: Run, place: Place, layer: int, block: nn.Module) -> list[Parameter]:
    """Give a block its dropout and, where it is a mixture, its experts. Returns its parameters."""
    C, named = run.n_embed, f"blocks.{layer}"
    small = 0.02 / math.sqrt(2 * run.n_layer)  # Radford et al. 2019, section 2.3
    block.attn.attn_dropout = PlacedDropout(run.dropout, place, layer, "attention")
    block.attn.resid_dropout = PlacedDropout(run.dropout, place, layer, "attention output")
    after_mlp = block.mlp.dropout = PlacedDropout(run.dropout, place, layer, "mlp output")
    qkv, proj = block.attn.c_attn, block.attn.c_proj
    parameters = [
        *_norm(f"{named}.ln_1", block.ln_1),
        Parameter(f"{named}.attn.qkv.weight", (3, C, C), qkv.weight, _three, std=0.02),
        Parameter(f"{named}.attn.qkv.bias", (3, C), qkv.bias, _three),
        Parameter(f"{named}.attn.proj.weight", (C, C), proj.weight, _turned, std=small),
        Parameter(f"{named}.attn.proj.bias", (C,), proj.bias, _same),
        *_norm(f"{named}.ln_2", block.ln_2),
    ]
    if run.num_experts and (layer + 1) % run.moe_freq == 0:
        E = run.num_experts
        moe = block.mlp = Mixture(C, E, run.top_k, after_mlp).double()
        return parameters + [
            Parameter(f"{named}.mlp.router.weight", (E, C), moe.router, _same, std=0.02),
            Parameter(f"{named}.mlp.w1", (E, C, 4 * C), moe.w1, _same, std=0.02),
            Parameter(f"{named}.mlp.b1", (E, 4 * C), moe.b1, _same),
            Parameter(f"{named}.mlp.w2", (E, 4 * C, C), moe.w2, _same, std=small),
            Parameter(f"{named}.mlp.b2", (E, C), moe.b2, _same),
        ]
    fc, proj = block.mlp.c_fc, block.mlp.c_proj
    return parameters + [
        Parameter(f"{named}.mlp.fc.weight", (4 * C, C), fc.weight, _turned, std=0.02),
        Parameter(f"{named}.mlp.fc.bias", (4 * C,), fc.bias, _same),
        Parameter(f"{named}.mlp.proj.weight", (C, 4 * C), proj.weight, _turned, std=small),
        Parameter(f"{named}.mlp.proj.bias", (C,), proj.bias, _same),
    ]


def _norm(name: str, norm: nn.LayerNorm) -> list[Parameter]:
    C = len(norm.weight)
    return [
        Parameter(f"{name}.weight", (C,), norm.weight, _same, fill=1.0),
        Parameter(f"{name}.bias", (C,), norm.bias, _same),
    ]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    """transformers' Conv1D keeps (in, out)."""
    return tensor.T


def _three(tensor: torch.Tensor) -> torch.Tensor:
    """Query, key and value, which are (C, 3C) there, or (3C,)."""
    return tensor.t().unflatten(0, (3, -1))
