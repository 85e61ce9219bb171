"""The first lines of a run: what is about to run, and the whole configuration."""

from __future__ import annotations

from heiretsu.data.batches import TokenDataset
from heiretsu.parallel.mesh import Mesh
from heiretsu.run.options import RunConfig


def describe(config: RunConfig, mesh: Mesh, data: TokenDataset, kernels: str) -> str:
    """data: that is trained on. kernels: the ops in words."""
    model = config.model
    experts = ""
    if model.num_experts:
        experts = f", {model.num_experts} experts, top {model.top_k}, every {model.moe_freq} layers"
    schedule = f", {config.schedule} over {config.grad_accum_steps} microbatches" if config.pp > 1 else ""
    if config.stages_per_rank > 1:
        schedule += f", {config.stages_per_rank} stages a rank"
    lines = [
        f"config: {config.to_json()}",
        f"model: {model.num_parameters:,} parameters, {model.n_layer} layers, {model.n_head} heads, "
        f"{model.n_embed} wide, vocabulary {model.vocab_size}, block {model.block_size}{experts}",
        f"mesh: dp {config.dp} x ep {config.ep} x pp {config.pp} x tp {config.tp} on {mesh.device.type}{schedule}",
        f"kernels: {kernels}; activations {config.amp if config.amp != 'none' else config.dtype}"
        f"{', compiled' if config.compile else ''}",
        f"data: {config.data_dir or 'embedded corpus'}, {data.num_tokens:,} training tokens ({config.tokenizer})",
        f"batch: {config.global_batch_size} sequences, {config.tokens_per_step:,} tokens; {config.max_iters} steps",
    ]
    return "\n".join(lines)
