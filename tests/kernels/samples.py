"""Small valid calls of every op, for tests that ask the same of all of them, and the forms that they ask.

`SAMPLES`: name -> (op, build). build(n, dtype) gives keyword arguments whose length in question is n: queries, rows or
tokens. All floats require a gradient, and are the same for the same n.
"""

from collections.abc import Callable

import torch

from heiretsu.kernels import plain
from heiretsu.kernels.arguments import CHECKS
from tests.kernels import forms

MASK = dict(dropout_p=0.3, seed=2**40 + 7, offsets=(3, 1))


def _floats(dtype, **shapes):
    generator = torch.Generator().manual_seed(7)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def _attention(Hkv=4, more_keys=0, **options):
    def build(n, dtype=torch.float32):
        keys = (2, Hkv, n + more_keys, 8)
        return _floats(dtype, q=(2, 4, n, 8), k=keys, v=keys) | options

    return build


def _layer_norm(residual):
    def build(n, dtype=torch.float32):
        values = _floats(dtype, x=(2, n, 24), weight=(24,), bias=(24,), residual=(2, n, 24))
        return values if residual else {name: t for name, t in values.items() if name != "residual"}

    return build


def _expert_mlp(biases):
    def build(n, dtype=torch.float32):
        values = _floats(dtype, x=(n, 8), gates=(n, 2), w1=(3, 8, 16), b1=(3, 16), w2=(3, 16, 8), b2=(3, 8))
        experts = torch.rand(n, 3, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :2]
        return values | {"experts": experts} | ({} if biases else {"b1": None, "b2": None})

    return build


def _linear_cross_entropy(n, dtype=torch.float32):
    return _floats(dtype, x=(n, 8), weight=(33, 8)) | {"targets": torch.arange(n) * 7 % 33}


SAMPLES: dict[str, tuple[str, Callable]] = {
    "attention": ("attention", _attention()),
    "attention, groups": ("attention", _attention(Hkv=2)),
    "attention, dropout": ("attention", _attention(Hkv=2, **MASK)),
    "attention_lse": ("attention_lse", _attention(Hkv=2, more_keys=5)),
    "attention_lse, all seen": ("attention_lse", _attention(more_keys=-2, causal=False)),
    "attention_lse, dropout": ("attention_lse", _attention(more_keys=-2, **MASK)),
    "bias_gelu": ("bias_gelu", lambda n, dtype=torch.float32: _floats(dtype, x=(2, n, 24), bias=(24,))),
    "dropout": (
        "dropout",
        lambda n, dtype=torch.float32: _floats(dtype, x=(2, n, 24)) | {"p": 0.3, "seed": 5, "offset": 2},
    ),
    "layer_norm": ("layer_norm", _layer_norm(residual=False)),
    "layer_norm, residual": ("layer_norm", _layer_norm(residual=True)),
    "route": ("route", lambda n, dtype=torch.float32: _floats(dtype, logits=(n, 6)) | {"top_k": 2}),
    "expert_mlp": ("expert_mlp", _expert_mlp(biases=True)),
    "expert_mlp, no biases": ("expert_mlp", _expert_mlp(biases=False)),
    "linear_cross_entropy": ("linear_cross_entropy", _linear_cross_entropy),
}
OPS = sorted(CHECKS)


def all_forms(op: str) -> dict[str, Callable]:
    """Every form of an op, whether this process can launch it or not."""
    every = {"plain": getattr(plain, op), "cpu-form": forms.cpu_form(op)}
    return every | ({"triton": forms.triton_form(op)} if forms.HAS_TRITON else {})


def runnable_forms(op: str) -> dict[str, tuple[Callable, str]]:
    """(form, device of its tensors) of the forms that this process can run, but for plain."""
    every = all_forms(op)
    if forms.TRITON_DEVICE is None:
        return {"cpu-form": (every["cpu-form"], "cpu")}
    found = {"triton": (every["triton"], forms.TRITON_DEVICE)}
    return found if forms.INTERPRETED else found | {"cpu-form": (every["cpu-form"], "cpu")}


def tensors(values: dict) -> dict[str, torch.Tensor]:
    """Those of a call's arguments that are float tensors."""
    return {n: v for n, v in values.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def to(values: dict, device) -> dict:
    """The same call on a device: fresh leaves."""
    moved = {n: v.detach().to(device) for n, v in values.items() if isinstance(v, torch.Tensor)}
    for name, t in moved.items():
        t.requires_grad_(values[name].requires_grad)
    return values | moved


def outputs(result) -> list[torch.Tensor]:
    """The tensors that an op returns, but for indices."""
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t.is_floating_point()]
