"""What an op cannot take is refused in one line, the same on every form, before a tensor is touched."""

import inspect
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from heiretsu.kernels import fused, plain
from heiretsu.kernels.arguments import CHECKS
from tests.kernels.samples import OPS, SAMPLES, all_forms

# {sample: [(what is wrong with it, the line that says so)]}. A callable edits the argument of that name.
REFUSED = {
    "attention, dropout": [
        (dict(q=None), "attention: q is None; it must be a tensor (B, H, T, D)"),
        (dict(k=[1.0]), "attention: k is a list; it must be a tensor (B, Hkv, S, D)"),
        (dict(q=lambda t: t[0]), "attention: q is of shape (4, 5, 8); it must be (B, H, T, D), 4 dims"),
        (
            dict(k=lambda t: t[..., :-1]),
            "attention: k is (2, 2, 5, 7); it must be (B, Hkv, S, D) = (2, 2, 5, 8) beside q (2, 4, 5, 8)",
        ),
        (
            dict(v=lambda t: t[:, :, 1:]),
            "attention: v is (2, 2, 4, 8); it must be (B, Hkv, S, D) = (2, 2, 5, 8) beside k (2, 2, 5, 8)",
        ),
        (
            dict(q=lambda t: t[:, :3]),
            "attention: k is of 2 heads; it must be of a number of heads that divides q's 3",
        ),
        (
            {name: lambda t: t.repeat(1, 1, 1, 33)[..., :257] for name in "qkv"},
            "attention: the head dim D is 257; it must be in 1..256",
        ),
        (
            dict(q=lambda t: t.bfloat16()),
            "attention: q, k, v are torch.bfloat16, torch.float32, torch.float32; they must have one dtype: cast k "
            "and v",
        ),
        (
            dict(k=lambda t: t.long()),
            "attention: k is int64; it must be float32 or bfloat16 or float16 or float64: cast it with k.to(dtype)",
        ),
        (
            dict(v=lambda t: t.to(torch.float8_e4m3fn)),
            "attention: v is float8_e4m3fn; it must be float32 or bfloat16 or float16 or float64: cast it with "
            "v.to(dtype)",
        ),
        (
            dict(q=lambda t: t.to_sparse()),
            "attention: q is a tensor of layout torch.sparse_coo; it must be a dense tensor (B, H, T, D)",
        ),
        (
            dict(k=lambda t: t.to("meta"), v=lambda t: t.to("meta")),
            "attention: its tensors must be on one device; they are q on cpu, k on meta, v on meta",
        ),
        (
            dict(causal=torch.ones(5, 5).bool()),
            "attention: causal is a Tensor; it must be True or False: there is no mask but the causal one",
        ),
        (dict(scale=-1.0), "attention: scale is -1.0; it must be finite and not negative"),
        (dict(scale=float("nan")), "attention: scale is nan; it must be finite and not negative"),
        (dict(scale=torch.tensor(0.1)), "attention: scale is a Tensor; it must be a Python float: float(scale)"),
        (dict(dropout_p=1.0), "attention: dropout_p is 1.0; it must be a probability in [0, 1)"),
        (dict(seed=torch.tensor(3)), "attention: seed is a Tensor; it must be a Python int: int(seed)"),
        (
            dict(seed=2**64),
            f"attention: seed is {2**64}; it must be a number of 64 bits, -2**63 .. 2**64 - 1",
        ),
        (dict(offsets=3), "attention: offsets is 3; it must be two ints, the global (sample, head) of q[0, 0]"),
        (dict(offsets=(0, -1)), f"attention: an offset is -1; it must be in 0..{2**62}"),
    ],
    "bias_gelu": [
        (dict(bias=None), "bias_gelu: bias is None; it must be a tensor (F,)"),
        (dict(bias=lambda t: t[:5]), "bias_gelu: bias is (5,); it must be (F,) = (24,) beside x (2, 5, 24)"),
        (dict(bias=lambda t: t[:1]), "bias_gelu: bias is (1,); it must be (F,) = (24,) beside x (2, 5, 24)"),
        (dict(bias=lambda t: t[None]), "bias_gelu: bias is (1, 24); it must be (F,) = (24,) beside x (2, 5, 24)"),
        (dict(x=lambda t: t[0, 0, 0]), "bias_gelu: x is a scalar; it must be (..., F), 1 dim at least"),
        (
            dict(x=lambda t: t.long()),
            "bias_gelu: x is int64; it must be float32 or bfloat16 or float16 or float64: cast it with x.to(dtype)",
        ),
    ],
    "dropout": [
        (dict(x=lambda t: t[0]), "dropout: x is of shape (5, 24); it must be (B, T, C), 3 dims"),
        (dict(p=1.5), "dropout: p is 1.5; it must be a probability in [0, 1)"),
        (dict(p=-0.1), "dropout: p is -0.1; it must be a probability in [0, 1)"),
        (dict(p=None), "dropout: p is None; it must be a Python float: float(p)"),
        (
            dict(seed=-(2**63) - 1),
            f"dropout: seed is {-(2**63) - 1}; it must be a number of 64 bits, -2**63 .. 2**64 - 1",
        ),
        (dict(seed=0.5), "dropout: seed is a float; it must be a Python int: int(seed)"),
        (dict(offset=-1), f"dropout: offset is -1; it must be in 0..{2**62}, the global sample of x[0]"),
    ],
    "layer_norm, residual": [
        (dict(weight=None), "layer_norm: weight is None; it must be a tensor (C,)"),
        (dict(bias=None), "layer_norm: bias is None; it must be a tensor (C,)"),
        (
            dict(weight=lambda t: t[1:]),
            "layer_norm: weight is (23,); it must be (C,) = (24,) beside x (2, 5, 24)",
        ),
        (dict(bias=lambda t: t[:1]), "layer_norm: bias is (1,); it must be (C,) = (24,) beside x (2, 5, 24)"),
        (
            dict(residual=lambda t: t[:1]),
            "layer_norm: residual is (1, 5, 24); it must be (..., C) = (2, 5, 24) beside x (2, 5, 24)",
        ),
        (
            dict(residual=lambda t: t.long()),
            "layer_norm: residual is int64; it must be float32 or bfloat16 or float16 or float64: cast it with "
            "residual.to(dtype)",
        ),
        (dict(eps=-1e-5), "layer_norm: eps is -1e-05; it must be finite and not negative"),
        (dict(eps=None), "layer_norm: eps is None; it must be a Python float: float(eps)"),
        (
            dict(x=lambda t: t.new_zeros(1, 16385)),
            "layer_norm: the last dim C is 16385; it must be 16384 at most",
        ),
    ],
    "route": [
        (
            dict(logits=lambda t: t[None]),
            "route: logits is of shape (1, 5, 6); it must be (N, E): flatten batch and length into one, 2 dims",
        ),
        (
            dict(logits=lambda t: t.long()),
            "route: logits is int64; it must be float32 or bfloat16 or float16 or float64: cast it with "
            "logits.to(dtype)",
        ),
        (
            dict(logits=lambda t: t.new_zeros(2, 2048)),
            "route: the number of experts E is 2048; it must be 2047 at most",
        ),
        (dict(top_k=0), "route: top_k is 0; it must be in 1..6, the number of experts"),
        (dict(top_k=7), "route: top_k is 7; it must be in 1..6, the number of experts"),
        (dict(top_k=2.0), "route: top_k is a float; it must be a Python int: int(top_k)"),
    ],
    "expert_mlp": [
        (
            dict(x=lambda t: t[:-1]),
            "expert_mlp: experts is (5, 2); it must be (N, K) = (4, 2) beside x (4, 8)",
        ),
        (dict(x=lambda t: t[None]), "expert_mlp: x is of shape (1, 5, 8); it must be (N, C), 2 dims"),
        (
            dict(x=lambda t: t.long()),
            "expert_mlp: x is int64; it must be float32 or bfloat16 or float16 or float64: cast it with x.to(dtype)",
        ),
        (
            dict(experts=lambda t: t.short()),
            "expert_mlp: experts is int16; it must be int64 or int32: cast it with experts.to(dtype)",
        ),
        (
            dict(gates=lambda t: t[:, :1].bfloat16()),
            "expert_mlp: gates is (5, 1); it must be (N, K) = (5, 2) beside experts (5, 2)",
        ),
        (
            dict(gates=lambda t: t[0].bfloat16()),
            "expert_mlp: gates is (2,); it must be (N, K) = (5, 2) beside experts (5, 2)",
        ),
        (
            dict(gates=lambda t: t.bool()),
            "expert_mlp: gates is bool; it must be float32 or bfloat16 or float16 or float64: cast it with "
            "gates.to(dtype)",
        ),
        (
            dict(w1=lambda t: t[:, :7]),
            "expert_mlp: w1 is (3, 7, 16); it must be (E, C, F) = (3, 8, 16) beside x (5, 8)",
        ),
        (dict(b1=lambda t: t[0]), "expert_mlp: b1 is (16,); it must be (E, F) = (3, 16) beside w1 (3, 8, 16)"),
        (
            dict(w2=lambda t: t.repeat(2, 1, 1)),
            "expert_mlp: w2 is (6, 16, 8); it must be (E, F, C) = (3, 16, 8) beside w1 (3, 8, 16)",
        ),
        (
            dict(w2=lambda t: t.transpose(1, 2)),
            "expert_mlp: w2 is (3, 8, 16); it must be (E, F, C) = (3, 16, 8) beside w1 (3, 8, 16)",
        ),
        (dict(b2=lambda t: t[:1]), "expert_mlp: b2 is (1, 8); it must be (E, C) = (3, 8) beside w1 (3, 8, 16)"),
        (dict(b2=0.0), "expert_mlp: b2 is a float; it must be a tensor (E, C), or None"),
    ],
    "linear_cross_entropy": [
        (
            dict(x=lambda t: t[None]),
            "linear_cross_entropy: x is of shape (1, 5, 8); it must be (N, C): flatten batch and length into one, 2 "
            "dims",
        ),
        (
            dict(weight=lambda t: t[:, 1:]),
            "linear_cross_entropy: weight is (33, 7); it must be (V, C) = (33, 8) beside x (5, 8)",
        ),
        (
            dict(targets=lambda t: t[1:]),
            "linear_cross_entropy: targets is (4,); it must be (N,) = (5,) beside x (5, 8)",
        ),
        (
            dict(targets=lambda t: t.int()),
            "linear_cross_entropy: targets is int32; it must be int64: cast it with targets.to(dtype)",
        ),
        (
            dict(vocab_start=-1),
            f"linear_cross_entropy: vocab_start is -1; it must be in 0..{2**62}, the first word of weight",
        ),
    ],
}
ROWS = [
    pytest.param(sample, changes, line, id=f"{sample}-{'-'.join(changes)}-{i}")
    for sample, rows in REFUSED.items()
    for i, (changes, line) in enumerate(rows)
]


class Untouched(TorchDispatchMode):
    """Raises where a tensor is computed with: a check may look at shapes, dtypes and devices alone."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} before the arguments were refused")


@pytest.mark.parametrize(("sample", "changes", "line"), ROWS)
def test_a_wrong_argument_is_refused_alike_by_every_form(sample, changes, line):
    op, build = SAMPLES[sample]
    values = build(5)
    for name, change in changes.items():
        edits = callable(change) and not isinstance(change, torch.Tensor)
        values[name] = change(values[name].detach()) if edits else change
    for name, form in (all_forms(op) | {"fused": getattr(fused, op)}).items():
        with Untouched(), pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
            form(**values)
            pytest.fail(f"{name} took it")


@pytest.mark.parametrize("sample", SAMPLES)
def test_what_is_no_tensor_or_of_no_such_dtype_is_named(sample):
    op, build = SAMPLES[sample]
    values, checked_as = build(5), op.removesuffix("_lse")
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            for wrong, what in (
                ("text", r"a str; it must be a tensor \("),
                (value.detach().bool(), "bool; it must be"),
            ):
                with pytest.raises(ValueError, match=f"^{checked_as}: {name} is {what}"):
                    getattr(plain, op)(**values | {name: wrong})


@pytest.mark.parametrize("sample", SAMPLES)
def test_one_dim_too_many_is_named(sample):
    op, build = SAMPLES[sample]
    values = build(5)
    for name, value in values.items():
        with pytest.raises((ValueError, TypeError)) as refused:
            getattr(plain, op)(**values | {name: "text"})
        any_dims = "a tensor (..., " in str(refused.value)
        if isinstance(value, torch.Tensor) and not any_dims:
            with pytest.raises(ValueError, match=rf"^{op.removesuffix('_lse')}: {name} is .*\(1, "):
                getattr(plain, op)(**values | {name: value.detach()[None]})


@pytest.mark.parametrize("op", OPS)
def test_every_form_is_checked_and_has_the_signature_of_the_specification(op):
    """What a check does not name, or a form lets pass, would be refused by nobody."""
    specification = inspect.signature(getattr(plain, op)).parameters
    for function in (*all_forms(op).values(), getattr(fused, op), CHECKS[op]):
        parameters = inspect.signature(function).parameters
        assert [(p.name, p.default) for p in parameters.values()] == [
            (p.name, p.default) for p in specification.values()
        ]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (dict(bias=torch.ones(3)), "bias_gelu() missing 1 required positional argument: 'x'"),
        (dict(x=torch.ones(3)), "bias_gelu() missing 1 required positional argument: 'bias'"),
        (dict(x=1, bias=2, scale=3), "bias_gelu() got an unexpected keyword argument 'scale'"),
    ],
)
def test_an_argument_too_many_or_missing_is_a_type_error_that_names_it_and_the_op(given, line):
    for form in (*all_forms("bias_gelu").values(), fused.bias_gelu):
        with pytest.raises(TypeError, match=f"^{re.escape(line)}$"):
            form(**given)


@pytest.mark.parametrize("offsets", [(2**31, 0), (2**62, 2**31 + 1)])
def test_offsets_beyond_32_bits_draw_their_low_bits(offsets):
    """They were an error inside the kernel."""
    op, build = SAMPLES["attention, dropout"]
    values = build(5) | {"offsets": offsets}
    torch.testing.assert_close(fused.attention(**values), plain.attention(**values))
