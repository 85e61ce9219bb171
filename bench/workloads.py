"""The shapes to measure: each op at realistic sizes, with the work that it cannot avoid.

FLOPs (nominal for the pointwise ops) and bytes are the algorithm's, not an implementation's: every input read once,
every output written once, a backward that recomputes nothing. So rates of different implementations compare, and none
is credited for extra work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Inputs = dict[str, Any]
MAX_SCORES = 2**26


@dataclass(frozen=True)
class Workload:
    """One op at one shape.

    series: cases that differ in size alone are one line of a chart. size: their x. inputs(generator, dtype) makes the
    CPU tensors, gradients wanted where requires_grad. call(ops, inputs) runs one of `kernels.plain` and `kernels.fused`
    and returns a tuple of differentiable tensors. flops, elements: of the forward and of the backward pass.
    part: cut the inputs down to a part whose outputs are a part of the whole's, for a reference in a wider dtype.
    """

    op: str
    series: str
    size_name: str
    size: int
    inputs: Callable[[torch.Generator, torch.dtype], Inputs]
    call: Callable[[object, Inputs], tuple]
    flops: tuple[float, float]
    elements: tuple[float, float]  # moved to or from memory, of the dtype
    part: Callable[[Inputs], Inputs] | None = None

    @property
    def counts_flops(self) -> bool:
        """Whether FLOP/s, not bytes/s, is the rate to quote: pointwise ops do at most 10 an element."""
        return self.flops[0] > 16 * self.elements[0]

    @property
    def name(self) -> str:
        return f"{self.series} {self.size_name}={self.size}"


def _normal(generator, dtype, *shape, scale=1.0):
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()


def attention(series, B, H, T, D, dropout_p=0.0, Hkv=None) -> Workload:
    """Causal self-attention on views of a fused QKV projection, (B, T, H + 2 Hkv, D). Hkv: key heads, H by default."""
    Hkv = Hkv or H

    def inputs(generator, dtype):
        return {"qkv": _normal(generator, dtype, B, T, H + 2 * Hkv, D), "key_heads": Hkv}

    def call(ops, inputs):
        return (ops.attention(*attention_heads(inputs), dropout_p=dropout_p, seed=1),)

    def part(inputs):  # the first heads of the first sample, where the whole score matrix would be too large
        if B * H * T * T <= MAX_SCORES:
            return inputs
        groups = max(1, min(Hkv, MAX_SCORES // T**2 * Hkv // H))
        chosen = [*range(groups * H // Hkv), *range(H, H + groups), *range(H + Hkv, H + Hkv + groups)]
        qkv = inputs["qkv"].detach()[:1, :, chosen].clone().requires_grad_()
        return {"qkv": qkv, "key_heads": groups}

    flops = 4 * B * H * T * T * D / 2
    queries, keys = B * H * T * D, B * Hkv * T * D  # q and out; k and v
    moved = (2 * queries + 2 * keys, 4 * queries + 4 * keys)
    return Workload("attention", series, "T", T, inputs, call, (flops, 2.5 * flops), moved, part)


def attention_heads(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, H, T, D), k and v (B, Hkv, T, D) of an attention workload's inputs."""
    qkv, key_heads = inputs["qkv"], inputs["key_heads"]
    q, k, v = qkv.transpose(1, 2).split([qkv.shape[2] - 2 * key_heads, key_heads, key_heads], dim=1)
    return q, k, v


def bias_gelu(series, N, F_) -> Workload:
    def inputs(generator, dtype):
        return {"x": _normal(generator, dtype, N, F_), "bias": _normal(generator, dtype, F_)}

    def call(ops, inputs):
        return (ops.bias_gelu(inputs["x"], inputs["bias"]),)

    return Workload("bias_gelu", series, "F", F_, inputs, call, (10 * N * F_, 20 * N * F_), (2 * N * F_, 3 * N * F_))


def layer_norm(series, N, C) -> Workload:
    """With the residual added, as every block but the first calls it."""

    def inputs(generator, dtype):
        return {
            "x": _normal(generator, dtype, N, C),
            "residual": _normal(generator, dtype, N, C),
            "weight": _normal(generator, dtype, C),
            "bias": _normal(generator, dtype, C),
        }

    def call(ops, inputs):
        return tuple(ops.layer_norm(inputs["x"], inputs["weight"], inputs["bias"], residual=inputs["residual"]))

    return Workload("layer_norm", series, "C", C, inputs, call, (9 * N * C, 12 * N * C), (4 * N * C, 4 * N * C))


def dropout(series, B, T, C) -> Workload:
    def inputs(generator, dtype):
        return {"x": _normal(generator, dtype, B, T, C)}

    def call(ops, inputs):
        return (ops.dropout(inputs["x"], 0.1, 1),)

    return Workload(
        "dropout", series, "C", C, inputs, call, (2 * B * T * C, 2 * B * T * C), (2 * B * T * C, 2 * B * T * C)
    )


def route(series, N, E, top_k) -> Workload:
    def inputs(generator, dtype):
        return {"logits": _normal(generator, dtype, N, E), "top_k": top_k}

    def call(ops, inputs):
        return (ops.route(inputs["logits"], inputs["top_k"])[0],)

    chosen = 5 * N * top_k  # a gate, and an expert's index: an int64 is four elements of two bytes
    moved = (N * E + chosen, 2 * N * E + chosen)
    return Workload("route", series, "N", N, inputs, call, (4 * N * E, 4 * N * E), moved)


def experts_of_tokens(balance: str, N: int, E: int, top_k: int, generator) -> torch.Tensor:
    """(N, top_k) distinct experts a token. balanced: near equal loads; skewed: Zipf; one-hot: all to the first ones."""
    if balance == "one-hot":
        return torch.arange(top_k).expand(N, top_k).contiguous()
    if balance == "skewed":
        popularity = (1.0 / torch.arange(1, E + 1)).expand(N, E)
        return torch.multinomial(popularity, top_k, generator=generator)
    if balance == "balanced":
        start = torch.randperm(N, generator=generator)[:, None]
        return (start * top_k + torch.arange(top_k)) % E
    raise ValueError(f"balance {balance!r} is none of balanced, skewed, one-hot")


def expert_mlp(series, N, C, F_, E, balance, top_k=2) -> Workload:
    def inputs(generator, dtype):
        return {
            "x": _normal(generator, dtype, N, C),
            "experts": experts_of_tokens(balance, N, E, top_k, generator),
            "gates": torch.rand(N, top_k, generator=generator).to(dtype).requires_grad_(),
            "w1": _normal(generator, dtype, E, C, F_, scale=C**-0.5),
            "b1": _normal(generator, dtype, E, F_, scale=0.1),
            "w2": _normal(generator, dtype, E, F_, C, scale=F_**-0.5),
            "b2": _normal(generator, dtype, E, C, scale=0.1),
        }

    def call(ops, inputs):
        names = ("x", "experts", "gates", "w1", "b1", "w2", "b2")
        return (ops.expert_mlp(*(inputs[name] for name in names)),)

    flops = 4 * N * top_k * C * F_
    used = min(E, N * top_k) if balance != "one-hot" else top_k
    moved = 2 * N * C + 2 * used * C * F_
    return Workload(
        "expert_mlp", f"{series} E={E} {balance}", "N", N, inputs, call, (flops, 2 * flops), (moved, 2 * moved)
    )


def linear_cross_entropy(series, N, C, V=50257) -> Workload:
    """The mean loss of N tokens: what a model's head computes."""

    def inputs(generator, dtype):
        return {
            "x": _normal(generator, dtype, N, C),
            "weight": _normal(generator, dtype, V, C, scale=0.02),
            "targets": torch.randint(V, (N,), generator=generator),
        }

    def call(ops, inputs):
        lse, target_logit = ops.linear_cross_entropy(inputs["x"], inputs["weight"], inputs["targets"])
        return ((lse - target_logit).mean(),)

    flops = 2 * N * V * C
    moved = N * C + V * C
    return Workload("linear_cross_entropy", series, "N", N, inputs, call, (flops, 2 * flops), (moved, 2 * moved))


def on_gpu(quick: bool) -> list[Workload]:
    """GPT-2 small to XL; 16 Ki tokens a step."""
    lengths = (1024, 4096) if quick else (1024, 2048, 4096, 8192, 16384)
    work = [attention("H=12 D=64", max(1, 16384 // T), 12, T, 64) for T in lengths]
    work += [attention("H=16 D=128", max(1, 16384 // T), 16, T, 128) for T in lengths]
    if not quick:
        work += [attention("H=25 D=64", 16, 25, 1024, 64), attention("H=12 D=64 dropout", 16, 12, 1024, 64, 0.1)]
    widths = (768, 1600) if quick else (768, 1024, 1280, 1600)
    work += [bias_gelu("16k tokens", 16384, 4 * C) for C in widths]
    work += [layer_norm("16k tokens", 16384, C) for C in widths]
    work += [dropout("16k tokens", 16, 1024, C) for C in widths]
    work += [route(f"E={E} K=2", 16384, E, 2) for E in (8, 64)]
    tokens = (8192,) if quick else (4096, 16384)
    for balance in ("balanced", "skewed", "one-hot"):
        work += [expert_mlp("C=768 F=3072", N, 768, 3072, E, balance) for E in (8, 64) for N in tokens]
    if not quick:
        work += [expert_mlp("C=1600 F=6400", 8192, 1600, 6400, 8, "balanced")]
    work += [linear_cross_entropy("C=768", N, 768) for N in ((8192,) if quick else (4096, 8192, 16384))]
    work += [linear_cross_entropy("C=1600", N, 1600) for N in (() if quick else (8192,))]
    return work


def on_cpu(quick: bool) -> list[Workload]:
    """What a laptop trains: 6 layers 384 wide, and 12 layers 768 wide; a thousand or two tokens a step."""
    work = [attention("H=6 D=64", 2048 // T, 6, T, 64) for T in ((256, 1024) if quick else (256, 512, 1024, 2048))]
    work += [attention("H=6 D=64 dropout", 2, 6, T, 64, 0.1) for T in ((256,) if quick else (256, 512))]
    work += [attention("H=12 D=64", 1, 12, T, 64) for T in (() if quick else (512, 1024))]
    widths = (384, 768) if quick else (384, 768, 1024)
    work += [bias_gelu("2k tokens", 2048, 4 * C) for C in widths]
    work += [layer_norm("2k tokens", 2048, C) for C in widths]
    work += [dropout("1k tokens", 4, 256, C) for C in widths[: 1 if quick else 3]]
    work += [route(f"E={E} K=2", 2048, E, 2) for E in ((8,) if quick else (8, 64))]
    balances = ("balanced", "one-hot") if quick else ("balanced", "skewed", "one-hot")
    for balance in balances:
        for E in (8,) if quick else (8, 64):
            work += [expert_mlp("C=384 F=1536", N, 384, 1536, E, balance) for N in (512, 2048)[: 1 if quick else 2]]
    work += [linear_cross_entropy("C=384", N, 384) for N in ((256, 512) if quick else (512, 1024, 2048))]
    work += [linear_cross_entropy("C=768", N, 768) for N in (() if quick else (1024,))]
    return work
