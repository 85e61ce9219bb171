"""GPT-2 with any range of its layers: the whole model, or one stage of a pipeline, with the same names.

Built from the layers of heiretsu.parallel and handed `ops`, heiretsu.kernels.plain or .fused.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from heiretsu.model.config import ModelConfig, split_layers
from heiretsu.model.copying import HoldsOps
from heiretsu.model.moe import MoE
from heiretsu.model.seeding import INIT_STD, fold
from heiretsu.parallel.mesh import REPLICAS, Mesh
from heiretsu.parallel.metrics import Metric
from heiretsu.parallel.pipeline import Context, Microbatch, Stage, StageOutput
from heiretsu.parallel.placement import Spec, declare
from heiretsu.parallel.profiling import region
from heiretsu.parallel.tensor import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding


class LayerNorm(HoldsOps):
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, mesh: Mesh, features: int, ops, dtype: torch.dtype):
        super().__init__(ops)
        weight, bias = (Spec((features,), partial_over=REPLICAS, fill=fill) for fill in (1.0, 0.0))
        declare(self, mesh, dtype, weight=weight, bias=bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        """norm(x), or (norm(x + residual), x + residual). x: (B, T, C)."""
        return self.ops.layer_norm(x, self.weight, self.bias, residual=residual)


class Attention(HoldsOps):
    """Causal self-attention; heads are split over tp."""

    def __init__(self, mesh: Mesh, config: ModelConfig, ops, residual_std: float, dtype: torch.dtype):
        super().__init__(ops)
        C = config.n_embed
        self.dropout, self.head_dim = config.dropout, config.head_dim
        self.first_head = mesh.tp.index * (config.n_head // mesh.tp.size)
        self.qkv = ColumnParallelLinear(mesh, C, C, INIT_STD, dtype, parts=3)
        self.proj = RowParallelLinear(mesh, C, C, residual_std, dtype)

    def forward(self, x: torch.Tensor, seed: int, first_sample: int) -> torch.Tensor:
        """x: (B, T, C), whole. Returns (B, T, C), whole."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, -1, self.head_dim)  # this rank's heads
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H / tp, T, D), views
        dropout_p = self.dropout if self.training else 0.0
        offsets = (first_sample, self.first_head)
        out = self.ops.attention(q, k, v, causal=True, dropout_p=dropout_p, seed=seed, offsets=offsets)
        return self.proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(HoldsOps):
    def __init__(self, mesh: Mesh, config: ModelConfig, ops, residual_std: float, dtype: torch.dtype):
        super().__init__(ops)
        self.fc = ColumnParallelLinear(mesh, config.n_embed, config.ffn_size, INIT_STD, dtype)
        self.proj = RowParallelLinear(mesh, config.ffn_size, config.n_embed, residual_std, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.ops.bias_gelu(self.fc.project(x), self.fc.bias))


class Block(HoldsOps):
    """Pre-norm transformer block with a dense or a mixture MLP. layer: index in the whole model."""

    def __init__(self, layer: int, mesh: Mesh, config: ModelConfig, ops, seed: int, dtype: torch.dtype):
        super().__init__(ops)
        self.layer, self.config, self.seed = layer, config, seed
        residual_std = INIT_STD / math.sqrt(2 * config.n_layer)  # Radford et al. 2019, section 2.3
        self.ln_1 = LayerNorm(mesh, config.n_embed, ops, dtype)
        self.attn = Attention(mesh, config, ops, residual_std, dtype)
        self.ln_2 = LayerNorm(mesh, config.n_embed, ops, dtype)
        self.mlp = (MoE if config.is_moe(layer) else MLP)(mesh, config, ops, residual_std, dtype)

    def forward(self, x: torch.Tensor, context: Context):
        """x: (B, T, C). Returns x (B, T, C), and (balance loss, tokens per expert) where the MLP is a mixture."""
        attended = self.attn(self.ln_1(x), self._seed(context, "attention"), context.first_sample)
        normed, x = self.ln_2(self._drop(attended, context, "attention output"), residual=x)
        out, routing = self.mlp(normed), None
        if self.config.is_moe(self.layer):
            out, *routing = out
        return x + self._drop(out, context, "mlp output"), routing

    @property
    def _drops(self) -> bool:
        return self.training and self.config.dropout > 0.0

    def _seed(self, context: Context, site: str) -> int:
        return fold(self.seed, context.step, self.layer, site) if self._drops else 0

    def _drop(self, x: torch.Tensor, context: Context, site: str) -> torch.Tensor:
        if not self._drops:
            return x
        return self.ops.dropout(x, self.config.dropout, self._seed(context, site), context.first_sample)


class GPT(HoldsOps, Stage):
    """Layers `layers` of the model, with the embedding below if the first is among them and the head above if the last.

    dtype: of the parameters. compute_dtype: of the activations; matrix products are done in it. seed: of dropout.

    metrics: loss is the mean cross-entropy, in nats; aux_loss the balance loss, unweighted, mean over the mixture
    layers; expert_load (mixture layers, E) the tokens of each expert, for models that have any.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        ops,
        layers: range | None = None,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        seed: int = 0,
    ):
        super().__init__(ops)
        layers = range(config.n_layer) if layers is None else layers
        self.config, self.seed = config, seed
        self.hidden_dtype = compute_dtype or dtype  # of all activations
        self.metrics = {"loss": Metric(), "aux_loss": Metric()}
        if config.moe_layers:
            self.metrics["expert_load"] = Metric((len(config.moe_layers), config.num_experts), "sum")
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.n_layer
        if self.is_first or self.is_last:  # one tensor, tied: embedding below, head above
            V = config.vocab_size, config.padded_vocab_size
            self.wte = VocabParallelEmbedding(mesh, *V, config.n_embed, INIT_STD, dtype)
        if self.is_first:
            self.wpe = PositionEmbedding(mesh, config, dtype)
        self.blocks = nn.ModuleDict({str(i): Block(i, mesh, config, ops, seed, dtype) for i in layers})
        if self.is_last:
            self.ln_f = LayerNorm(mesh, config.n_embed, ops, dtype)

    def hidden_shape(self, batch: Microbatch) -> tuple[int, ...]:
        return (*batch.inputs.shape, self.config.n_embed)

    def forward(self, hidden: torch.Tensor | None, batch: Microbatch) -> StageOutput:
        """hidden: (B, T, C) from the stage before, None on the first. See StageOutput for what comes out."""
        x = self.embed(batch) if self.is_first else hidden
        x, metrics = self.run_blocks(x, batch.context)
        objective = self.config.aux_loss_coef * metrics["aux_loss"]
        if not self.is_last:
            return StageOutput(x, objective, metrics)
        with region("head"):
            normed = self.ln_f(x).flatten(0, 1)
            loss = self.wte.cross_entropy(normed, batch.targets.flatten(), self.ops).mean()
        return StageOutput(None, objective + loss, {"loss": loss, **metrics})

    def run_blocks(self, x: torch.Tensor, context: Context) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x: (B, T, C). Returns x, and what these layers have of the balance loss and of the tokens of each expert."""
        wide = torch.float64 if self.hidden_dtype == torch.float64 else torch.float32
        metrics = {"aux_loss": torch.zeros((), dtype=wide, device=x.device)}
        for name, block in self.blocks.items():
            x, routing = block(x, context)
            if routing is not None:
                balance, tokens = routing
                metrics["aux_loss"] = metrics["aux_loss"] + balance.to(wide) / len(self.config.moe_layers)
                load = metrics.setdefault("expert_load", tokens.new_zeros(self.metrics["expert_load"].shape))
                load[self.config.moe_layers.index(int(name))] = tokens
        return x, metrics

    def next_token_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (B, T) int64. Returns (B, V), the logits of what follows. Needs the whole model on one device."""
        x, _ = self.run_blocks(self.embed(Microbatch(ids, ids)), Context())
        return self.ln_f(x[:, -1]) @ self.wte.weight[: self.config.vocab_size].to(x.dtype).T

    def embed(self, batch: Microbatch) -> torch.Tensor:
        x = self.wte(batch.inputs, self.hidden_dtype) + self.wpe(batch.inputs.shape[1], self.hidden_dtype)
        if self.training and self.config.dropout > 0.0:
            seed = fold(self.seed, batch.context.step, "embedding")
            x = self.ops.dropout(x, self.config.dropout, seed, batch.context.first_sample)
        return x


class PositionEmbedding(nn.Module):
    """Learned positions. weight: (block_size, C)."""

    weight: nn.Parameter

    def __init__(self, mesh: Mesh, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        shape = (config.block_size, config.n_embed)
        declare(self, mesh, dtype, weight=Spec(shape, partial_over=REPLICAS, std=INIT_STD, decay=True))

    def forward(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        return self.weight[:length].to(dtype)


def build_stages(
    config: ModelConfig,
    mesh: Mesh,
    ops,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    seed: int,
    stages_per_rank: int = 1,
) -> list[GPT]:
    """This rank's stages of the model: every pp-th of the pp * stages_per_rank, from stage pp_rank on."""
    stages = split_layers(config, mesh.pp.size, stages_per_rank)[mesh.pp.index :: mesh.pp.size]
    return [GPT(config, mesh, ops, layers, dtype, compute_dtype, seed) for layers in stages]
