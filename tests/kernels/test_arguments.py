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


# {sample: {tensor: (its letters, what is said behind them of one with a dim more)}}; None: any number of dims will do.
FLATTEN = ": flatten batch and length into one, 2 dims"
LETTERS = {
    "attention, dropout": {
        "q": ("(B, H, T, D)", ", 4 dims"),
        "k": ("(B, Hkv, S, D)", ", 4 dims"),
        "v": ("(B, Hkv, S, D)", ", 4 dims"),
    },
    "bias_gelu": {"x": ("(..., F)", None), "bias": ("(F,)", " = (24,) beside x (2, 5, 24)")},
    "dropout": {"x": ("(B, T, C)", ", 3 dims")},
    "layer_norm, residual": {
        "x": ("(..., C)", None),
        "weight": ("(C,)", " = (24,) beside x (2, 5, 24)"),
        "bias": ("(C,)", " = (24,) beside x (2, 5, 24)"),
        "residual": ("(..., C)", " = (2, 5, 24) beside x (2, 5, 24)"),
    },
    "route": {"logits": ("(N, E)", FLATTEN)},
    "expert_mlp": {
        "x": ("(N, C)", ", 2 dims"),
        "experts": ("(N, K)", ", 2 dims"),
        "gates": ("(N, K)", " = (5, 2) beside experts (5, 2)"),
        "w1": ("(E, C, F)", ", 3 dims"),
        "b1": ("(E, F)", " = (3, 16) beside w1 (3, 8, 16)"),
        "w2": ("(E, F, C)", " = (3, 16, 8) beside w1 (3, 8, 16)"),
        "b2": ("(E, C)", " = (3, 8) beside w1 (3, 8, 16)"),
    },
    "linear_cross_entropy": {
        "x": ("(N, C)", FLATTEN),
        "weight": ("(V, C)", ", 2 dims"),
        "targets": ("(N,)", " = (5,) beside x (5, 8)"),
    },
}
DTYPES = {"experts": "int64 or int32", "targets": "int64"}


@pytest.mark.parametrize("sample", LETTERS)
def test_each_tensor_is_asked_for_in_its_letters(sample):
    op, build = SAMPLES[sample]
    values = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in build(5).items()}
    assert [*LETTERS[sample]] == [n for n in inspect.signature(CHECKS[op]).parameters if hasattr(values.get(n), "dim")]
    for name, (letters, one_dim_more) in LETTERS[sample].items():
        dtypes = DTYPES.get(name, "float32 or bfloat16 or float16 or float64")
        wrong = [
            ("text", f"a str; it must be a tensor {letters}" + ", or None" * (name in ("b1", "b2"))),
            (values[name].bool(), f"bool; it must be {dtypes}: cast it with {name}.to(dtype)"),
        ]
        if one_dim_more is not None:
            of_shape = "of shape " * one_dim_more.endswith(" dims")
            given = values[name][None]
            wrong.append((given, f"{of_shape}{tuple(given.shape)}; it must be {letters}{one_dim_more}"))
        for value, line in wrong:
            with pytest.raises(ValueError, match=f"^{re.escape(f'{op}: {name} is {line}')}$"):
                CHECKS[op](**values | {name: value})


@pytest.mark.parametrize("sample", SAMPLES)
def test_each_tensor_must_be_where_the_others_are(sample):
    op, build = SAMPLES[sample]
    values = build(5)
    tensors = [n for n in inspect.signature(CHECKS[op]).parameters if isinstance(values.get(n), torch.Tensor)]
    for name in tensors if len(tensors) > 1 else ():
        where = ", ".join(f"{other} on {'meta' if other == name else 'cpu'}" for other in tensors)
        line = f"{op.removesuffix('_lse')}: its tensors must be on one device; they are {where}"
        with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
            CHECKS[op](**values | {name: values[name].to("meta")})


def _head_dim(D):
    return {name: lambda t: t[..., :1].expand(*t.shape[:3], D) for name in "qkv"}


def _experts(E):
    return {name: lambda t: t[:1].expand(E, *t.shape[1:]) for name in ("w1", "b1", "w2", "b2")}


def _tokens(N, K=1):
    rows = {name: lambda t: t[:1, :1].expand(N, K) for name in ("experts", "gates")}
    return rows | {"x": lambda t: t[:1].expand(N, 8)}


# The last that is taken, and the first that is not, on both sides of every bound.
TAKEN = {
    "attention, dropout": [
        _head_dim(1), _head_dim(256), dict(k=lambda t: t[:, :1], v=lambda t: t[:, :1]), dict(scale=0.0), dict(scale=2),
        dict(dropout_p=0), dict(dropout_p=1.0 - 2**-53), dict(seed=-(2**63)), dict(seed=2**64 - 1),
        dict(offsets=[2**62, 0]), dict(k=lambda t: t[:, :, :3], v=lambda t: t[:, :, :3]), dict(causal=False),
    ],
    "bias_gelu": [dict(x=lambda t: t[0, 0]), dict(x=lambda t: t[0]), dict(bias=lambda t: t.double())],
    "dropout": [dict(p=0.0), dict(offset=2**62), dict(offset=0)],
    "layer_norm, residual": [
        dict(eps=0.0), dict(eps=1), dict(residual=None), dict(residual=lambda t: t.half()),
        {name: lambda t: t[..., :1].expand(*t.shape[:-1], 16384) for name in ("x", "weight", "bias", "residual")},
        {name: lambda t: t[0, 0] if t.dim() == 3 else t for name in ("x", "residual")},
    ],
    "route": [dict(top_k=1), dict(top_k=6), dict(logits=lambda t: t[:, :1].expand(5, 2047))],
    "expert_mlp": [_experts(2047), _tokens(2**31 - 2**16 - 1), dict(b1=None), dict(b2=None),
                   dict(experts=lambda t: t.int())],
    "linear_cross_entropy": [dict(vocab_start=2**62), dict(weight=lambda t: t[:0])],
}  # fmt: skip
BEYOND = {
    "attention, dropout": [
        (_head_dim(0), "the head dim D is 0; it must be in 1..256"),
        (
            dict(k=lambda t: t[:, :0], v=lambda t: t[:, :0]),
            "k is of 0 heads; it must be of a number of heads that divides q's 4",
        ),
        (dict(scale=float("inf")), "scale is inf; it must be finite and not negative"),
        (dict(dropout_p=-0.5), "dropout_p is -0.5; it must be a probability in [0, 1)"),
        (dict(dropout_p="x"), "dropout_p is a str; it must be a Python float: float(dropout_p)"),
        (dict(offsets=(1, 2, 3)), "offsets is (1, 2, 3); it must be two ints, the global (sample, head) of q[0, 0]"),
        (dict(offsets=(1.5, 0)), "an offset is a float; it must be a Python int: int(an offset)"),
        (dict(offsets=(0, 2**62 + 1)), f"an offset is {2**62 + 1}; it must be in 0..{2**62}"),
        (
            dict(v=lambda t: t.half()),
            "q, k, v are torch.float32, torch.float32, torch.float16; they must have one dtype: cast k and v",
        ),
        (dict(causal=1), "causal is a int; it must be True or False: there is no mask but the causal one"),
    ],
    "dropout": [
        (dict(offset=2**62 + 1), f"offset is {2**62 + 1}; it must be in 0..{2**62}, the global sample of x[0]")
    ],
    "layer_norm, residual": [
        (dict(x=lambda t: t[0, 0, 0]), "x is a scalar; it must be (..., C), 1 dim at least"),
        (dict(eps=float("inf")), "eps is inf; it must be finite and not negative"),
    ],
    "expert_mlp": [
        (_experts(2048), "the number of experts E is 2048; it must be 2047 at most"),
        (
            _tokens(2**30 - 2**15, 2),
            f"experts is of {2**30 - 2**15} x 2 slots; it must be of fewer than {2**31 - 2**16}",
        ),
        (_tokens(2**31 - 2**16), f"experts is of {2**31 - 2**16} x 1 slots; it must be of fewer than {2**31 - 2**16}"),
    ],
    "linear_cross_entropy": [
        (
            dict(vocab_start=2**62 + 1),
            f"vocab_start is {2**62 + 1}; it must be in 0..{2**62}, the first word of weight",
        ),
    ],
}


def changed(values, changes):
    return values | {
        name: change(values[name].detach()) if callable(change) else change for name, change in changes.items()
    }


@pytest.mark.parametrize("sample", TAKEN)
def test_every_bound_is_where_it_is_said_to_be(sample):
    op, build = SAMPLES[sample]
    for changes in TAKEN[sample]:
        CHECKS[op](**changed(build(5), changes))
    for changes, line in BEYOND.get(sample, ()):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{op}: {line}')}$"):
            CHECKS[op](**changed(build(5), changes))


@pytest.mark.parametrize("op", OPS)
def test_the_specification_takes_tensors_of_no_memory_with_autocast_or_without(op):
    """Autocast cannot be asked about there: torch raises."""
    values = {n: v.detach().to("meta") if isinstance(v, torch.Tensor) else v for n, v in SAMPLES[op][1](5).items()}
    if op == "expert_mlp":
        return  # which rows an expert has, meta tensors do not say
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found, expected = getattr(plain, op)(**values), getattr(plain, op)(**SAMPLES[op][1](5))
        for got, want in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (found, expected)), strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype and got.is_meta


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
        (dict(q=1, k=2), "attention() missing 1 required positional argument: 'v'"),
    ],
)
def test_an_argument_too_many_or_missing_is_a_type_error_that_names_it_and_the_op(given, line):
    op = line.partition("(")[0]
    for form in (*all_forms(op).values(), getattr(fused, op)):
        with pytest.raises(TypeError, match=f"^{re.escape(line)}$"):
            form(**given)


@pytest.mark.parametrize("offsets", [(2**31, 0), (2**62, 2**31 + 1)])
def test_offsets_beyond_32_bits_draw_their_low_bits(offsets):
    """They were an error inside the kernel."""
    op, build = SAMPLES["attention, dropout"]
    values = build(5) | {"offsets": offsets}
    torch.testing.assert_close(fused.attention(**values), plain.attention(**values))
