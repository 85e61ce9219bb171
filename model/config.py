"""What a model is: sizes, presets, and what they cost. Knows nothing of meshes or devices."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

VOCAB_MULTIPLE = 128  # GEMMs like whole tiles; fixed, so that a weight has one global shape on every topology


@dataclass(frozen=True)
class ModelConfig:
    """A GPT-2 (Radford et al. 2019), dense where num_experts is 0, else with a mixture of experts every moe_freq-th
    layer."""

    vocab_size: int = 257
    block_size: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_embed: int = 128
    dropout: float = 0.0
    num_experts: int = 0
    top_k: int = 2
    moe_freq: int = 2
    aux_loss_coef: float = 0.01

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def head_dim(self) -> int:
        return self.n_embed // self.n_head

    @property
    def ffn_size(self) -> int:
        return 4 * self.n_embed

    def is_moe(self, layer: int) -> bool:
        """Every moe_freq-th layer is a mixture: those of index 1, 3, 5, ... for moe_freq 2."""
        return self.num_experts > 0 and (layer + 1) % self.moe_freq == 0

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.n_layer) if self.is_moe(layer)]

    def block_parameters(self, mixture: bool, ep: int = 1, tp: int = 1) -> int:
        """Elements of one block on a rank, as its modules declare them: norms, routers and the biases of what is summed
        over tp are whole, the rest is split over tp, and experts over ep."""
        C, F = self.n_embed, self.ffn_size
        mlp = (2 * C * F + F) // tp + C
        if mixture:
            mlp = self.num_experts // ep * mlp + C * self.num_experts
        return 4 * C + (4 * C * C + 3 * C) // tp + C + mlp

    @property
    def num_parameters(self) -> int:
        """Of the whole model, padding left out; 124,439,808 for gpt2, as published."""
        mixtures = len(self.moe_layers)
        blocks = (self.n_layer - mixtures) * self.block_parameters(False) + mixtures * self.block_parameters(True)
        return blocks + (self.vocab_size + self.block_size + 2) * self.n_embed

    def layer_macs(self, layer: int) -> int:
        """Multiply-adds of one token in one block's forward, attention at half of the square (causal)."""
        C = self.n_embed
        mlp = 2 * C * self.ffn_size
        if self.is_moe(layer):
            mlp = mlp * self.top_k + C * self.num_experts
        return 4 * C * C + self.block_size * C + mlp

    @property
    def head_macs(self) -> int:
        return self.vocab_size * self.n_embed  # padding gets no logit

    @property
    def flops_per_token(self) -> int:
        """Of one training step, without recomputation: 2 a multiply-add, three times (forward, dx, dw). For MFU."""
        return 6 * (sum(map(self.layer_macs, range(self.n_layer))) + self.head_macs)


PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embed": 128, "block_size": 128},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embed": 768, "block_size": 1024},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embed": 1024, "block_size": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embed": 1280, "block_size": 1024},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embed": 1600, "block_size": 1024},
}


def split_layers(config: ModelConfig, num_ranks: int, stages_per_rank: int = 1) -> list[range]:
    """Contiguous layers for each of num_ranks * stages_per_rank pipeline stages, such that the costliest stage is as
    cheap as can be.

    Each stage has a layer at least; the last one also pays for the head. Raises ValueError with fewer layers than
    stages.
    """
    num_stages = num_ranks * stages_per_rank
    if num_stages > config.n_layer:
        asked = f"--pp {num_ranks}" + (f" x --virtual_stages {stages_per_rank}" if stages_per_rank > 1 else "")
        raise ValueError(f"{asked} stages need at least as many layers, but --n_layer is {config.n_layer}")
    up_to = list(accumulate((config.layer_macs(layer) for layer in range(config.n_layer)), initial=0))

    def stage_cost(first: int, stop: int) -> int:
        return up_to[stop] - up_to[first] + (config.head_macs if stop == config.n_layer else 0)

    # The cheapest way to make s stages of the first n layers, for every n: (cost of the costliest of them, the stages)
    best: dict[int, tuple[int, list[range]]] = {0: (0, [])}
    for num_below in range(num_stages):
        longer = {}
        for stop in range(num_below + 1, config.n_layer + 1):
            cost, first = min((max(best[n][0], stage_cost(n, stop)), n) for n in best if n < stop)
            longer[stop] = cost, [*best[first][1], range(first, stop)]
        best = longer
    return best[config.n_layer][1]
