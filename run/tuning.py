"""The kernel calls of one run, for measuring them before it: each op at the shapes, strides and dtypes of the model.

Sizes are those of rank 0: its heads, features, words and experts. Handed `ops`, as the model is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from heiretsu.kernels import fused
from heiretsu.kernels.control import CONTROL
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.placement import shard_bounds
from heiretsu.run.building import COMPUTE_DTYPES
from heiretsu.run.options import RunConfig

if fused.HAS_TRITON:
    from heiretsu.kernels.gpu import autotune

Run = Callable[[], dict[str, torch.Tensor]]


def kernel_calls(config: RunConfig, mesh: Mesh, ops) -> dict[str, Callable[[], Run]]:
    """{op, shapes and dtype in words: a function that makes its inputs}, the dearest first.

    That function returns another one, which runs the op's forward and backward and returns every output and gradient
    by name. Experts get as many tokens as they would if all were equally popular. B sequences of T tokens, C wide.
    """
    model, device = config.model, mesh.device
    B, T, C = config.batch_size, model.block_size, model.n_embed
    wide = getattr(torch, config.dtype)
    narrow = COMPUTE_DTYPES.get(config.amp, wide)
    tp, E, K = mesh.tp.size, model.num_experts, model.top_k
    features = model.ffn_size // tp
    words = min(shard_bounds(model.padded_vocab_size, mesh.tp)[1], model.vocab_size)
    calls: dict[str, Callable[[], Run]] = {}
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = narrow) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(dtype).requires_grad_()

    def weight(*shape: int) -> torch.Tensor:
        return (normal(*shape, dtype=wide).detach() * 0.02).requires_grad_()

    def add(op: str, shape: str, function: Callable, inputs: Callable[[], dict[str, torch.Tensor]]) -> None:
        calls[f"{op} {shape} {str(narrow).removeprefix('torch.')}"] = lambda: _forward_and_backward(function, inputs())

    def attention(qkv):
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return ops.attention(q, k, v, causal=True, dropout_p=model.dropout, seed=1)

    def layer_norms(x, residual, weight, bias):  # the two kinds of a block
        return ops.layer_norm(x, weight, bias), *ops.layer_norm(x, weight, bias, residual=residual)

    heads, D = model.n_head // tp, model.head_dim
    dropped = f" dropout {model.dropout}" if model.dropout else ""
    add("attention", f"{B}x{heads}x{T}x{D}{dropped}", attention, lambda: {"qkv": normal(B, T, 3, heads, D)})
    add(
        "linear_cross_entropy",
        f"{B * T}x{C}x{words}",
        ops.linear_cross_entropy,
        lambda: {
            "x": normal(B * T, C),
            "weight": weight(words, C),
            "targets": torch.arange(B * T, device=device) % words,
        },
    )
    if E:
        # Over ep, a row is a token's way to one expert, with the gate left at home (see MoE).
        at_home = mesh.ep.size == 1
        rows, ways = (B * T, K) if at_home else (B * T * K, 1)
        local = E // mesh.ep.size
        add(
            "expert_mlp",
            f"{rows}x{C}x{features}, {ways} of {local}",
            ops.expert_mlp,
            lambda: {
                "x": normal(rows, C),
                "experts": (torch.arange(rows * ways, device=device) % local).view(rows, ways),
                "gates": torch.full((rows, ways), 1 / ways, dtype=wide, device=device).requires_grad_(at_home),
                "w1": weight(local, C, features),
                "b1": weight(local, features),
                "w2": weight(local, features, C),
                "b2": weight(local, C),
            },
        )
        add(
            "route",
            f"{B * T}x{E}, {K}",
            lambda logits: ops.route(logits, K),
            lambda: {"logits": normal(B * T, E, dtype=wide)},
        )
    if len(model.moe_layers) < model.n_layer:
        add(
            "bias_gelu",
            f"{B}x{T}x{features}",
            ops.bias_gelu,
            lambda: {"x": normal(B, T, features), "bias": weight(features)},
        )
    add(
        "layer_norm",
        f"{B}x{T}x{C}",
        layer_norms,
        lambda: {"x": normal(B, T, C), "residual": normal(B, T, C), "weight": weight(C), "bias": weight(C)},
    )
    if model.dropout:
        add(
            "dropout",
            f"{B}x{T}x{C}{dropped}",
            lambda x: ops.dropout(x, model.dropout, 1),
            lambda: {"x": normal(B, T, C)},
        )
    return calls


def _forward_and_backward(function: Callable, inputs: dict[str, torch.Tensor]) -> Run:
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    douts: list[torch.Tensor] = []

    def run() -> dict[str, torch.Tensor]:
        result = function(**inputs)
        outputs = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        differentiable = [output for output in outputs if output.requires_grad]
        if not douts:  # the same for every run
            douts.extend(torch.randn_like(output) for output in differentiable)
        grads = torch.autograd.grad(differentiable, list(leaves.values()), douts)
        named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        return named | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}

    return run


def tune_kernels(config: RunConfig, mesh: Mesh) -> None:
    """--autotune: rank 0 measures while the others wait, and every rank launches what it chose."""
    if mesh.rank == 0 and mesh.world.size > 1:
        print(f"autotune: rank 0 measures for all {mesh.world.size} ranks, which wait for it", flush=True)
    chosen = [autotune.tune(kernel_calls(config, mesh, fused), mesh.device) if mesh.rank == 0 else None]
    if mesh.world.size > 1:
        dist.broadcast_object_list(chosen, src=0)
    CONTROL.chosen.update(chosen[0])
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()  # the training's blocks have other sizes
