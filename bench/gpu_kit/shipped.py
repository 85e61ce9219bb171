"""A parity case for each launch that ships for an architecture class: one that takes each entry of its tiles.

Sizes are the largest that an entry serves, lengths a few tiles and a tail, so that every loop of a kernel runs. The
parity table proper holds small cases, which some entries never see.
"""

from __future__ import annotations

import torch

from heiretsu.kernels.arguments import MOST_EXPERTS
from heiretsu.kernels.gpu import launch
from heiretsu.kernels.recording import recording
from tests.kernels.parity import Case

BF16, FP32 = (torch.bfloat16,), (torch.float32,)
SIZES_OF_ANY = {"head dim": 16, "C": 48, "E": 6}  # for a class with one entry for every size


def cases(arch: str) -> list[Case]:
    """Cases that together launch every entry of a class. Their names say which size they are for."""
    long = arch != "interpreter"  # which takes a second for what a GPU does in no time
    return [*_attention(arch, long), *_rows(arch, long), *_mixture(arch, long), *_cross_entropy(long)]


def launched_by(case: Case, run) -> list[str]:
    """run(case), and the entries that it launched, in words."""
    with recording() as record:
        run(case)
    return [title(entry) for entry in record.entries]


def title(entry: launch.Entry) -> str:
    return entry.row if entry.size is None else f"{entry.row} to {entry.size}"


def every_title(arch: str) -> list[str]:
    return [title(entry) for entry in launch.every_entry(arch)]


def _sizes(arch: str, kernel: str, what: str) -> list[int]:
    if arch == "interpreter":
        return [SIZES_OF_ANY[what]]
    sizes = (entry.size for entry in launch.tiles_named(kernel).entries(arch))
    return sorted({SIZES_OF_ANY[what] if size is None else size for size in sizes})


def _randn(generator, dtype, *shape, scale=1.0):
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()


def _attention(arch, long):
    T = 300 if long else 40

    def inputs(D, H, Hkv, dropout_p):
        def make(generator, dtype):
            q = torch.randn(1, T, H, D, generator=generator).to(dtype).transpose(1, 2)
            # More keys than queries: a query that sees one key has a gradient of 0 in plain, of rounding noise here.
            kv = torch.randn(1, T + 40, 2 * Hkv, D, generator=generator).to(dtype).transpose(1, 2)
            k, v = kv.split(Hkv, dim=1)
            inputs = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
            return inputs | {"dropout_p": dropout_p, "seed": 2**40 + 7}

        return make

    for D in _sizes(arch, "attention_forward", "head dim"):
        for name, H, Hkv, dropout_p in (
            ("", 2, 2, 0.0),
            (" dropout", 2, 2, 0.1),
            (" groups of 4", 4, 1, 0.0),
            (" groups of 4, dropout", 4, 1, 0.1),
        ):
            dtypes = BF16 + (FP32 if Hkv == 2 else ())
            yield Case("attention", f"shipped D{D}{name}", "a launch that ships", inputs(D, H, Hkv, dropout_p), dtypes)


def _rows(arch, long):
    N = 70 if long else 9

    def layer_norm(C):
        def make(generator, dtype):
            names = {"x": (N, C), "residual": (N, C), "weight": (C,), "bias": (C,)}
            return {name: _randn(generator, dtype, *shape) for name, shape in names.items()}

        return make

    widths = set(_sizes(arch, "layer_norm_forward", "C")) | set(_sizes(arch, "layer_norm_backward", "C"))
    for C in sorted(widths):
        yield Case("layer_norm", f"shipped C={C}", "a launch that ships", layer_norm(C), BF16 + FP32)
    F = 1600 if long else 48

    def bias_gelu(generator, dtype):
        return {"x": _randn(generator, dtype, 3 * N, F), "bias": _randn(generator, torch.float32, F)}

    def dropout(generator, dtype):
        return {"x": _randn(generator, dtype, 2, N, F), "p": 0.1, "seed": 3}

    yield Case("bias_gelu", f"shipped F={F}", "a launch that ships", bias_gelu, BF16 + FP32)
    yield Case("dropout", f"shipped C={F}", "a launch that ships", dropout, BF16 + FP32)


def _mixture(arch, long):
    def route(E):
        def make(generator, dtype):
            return {"logits": _randn(generator, dtype, 300 if long else 20, E), "top_k": min(2, E)}

        return make

    def expert_mlp(N, C, F, E, top_k=2):
        def make(generator, dtype):
            return {
                "x": _randn(generator, dtype, N, C),
                "experts": torch.rand(N, E, generator=generator).argsort(1)[:, :top_k],
                "gates": torch.rand(N, top_k, generator=generator).to(dtype).requires_grad_(),
                "w1": _randn(generator, dtype, E, C, F, scale=C**-0.5),
                "b1": _randn(generator, dtype, E, F),
                "w2": _randn(generator, dtype, E, F, C, scale=F**-0.5),
                "b2": _randn(generator, dtype, E, C),
            }

        return make

    for E in (min(size, MOST_EXPERTS) for size in _sizes(arch, "route", "E")):
        yield Case("route", f"shipped E={E}", "a launch that ships", route(E), BF16 + FP32)
    for E in (size - 1 for size in _sizes(arch, "routing_plan", "E")):  # the plan counts one more: of no expert
        yield Case("expert_mlp", f"shipped E={E}", "a launch that ships", expert_mlp(64, 16, 32, E), BF16)
    even, odd = ((600, 256, 512), (300, 200, 264)) if long else ((40, 32, 64), (20, 24, 40))
    yield Case("expert_mlp", "shipped tiles", "a launch that ships", expert_mlp(*even, 4), BF16 + FP32)
    yield Case("expert_mlp", "shipped odd tiles", "a launch that ships", expert_mlp(*odd, 4), BF16)


def _cross_entropy(long):
    N, C, V = (300, 192, 5000) if long else (40, 24, 130)

    def make(generator, dtype):
        return {
            "x": _randn(generator, dtype, N, C),
            "weight": _randn(generator, dtype, V, C, scale=C**-0.5),
            "targets": torch.randint(V, (N,), generator=generator),
        }

    yield Case("linear_cross_entropy", f"shipped V={V}", "a launch that ships", make, BF16 + FP32)
