"""What every op takes: its checks, once, for every form alike.

`checked` stands on the public function of each form (plain, CPU, Triton), so that all refuse the same input in the same
words, before anything is allocated or launched: one line with the op, the argument, what was given and what it must be.
A check looks at types, shapes, dtypes and devices, and never at a tensor's values: nothing waits for a GPU, and
torch.compile traces through. So targets and expert indices are not checked; each op says what one out of range does.

`checked` keeps one more rule for all of them: **an op computes in its inputs' dtypes, under torch.autocast too.** Cast
what should be narrower, as the projections in front of an op do anyway: inside autocast they give 16 bits.

B batch, T queries, S keys, C hidden size, H heads, D head dim, N tokens, E experts, K top-k, F feed-forward size, V
vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from heiretsu.kernels.random import signed
from heiretsu.kernels.versions import may_carry_tangent, taking_forward_derivatives

P = ParamSpec("P")
R = TypeVar("R")
CHECKS: dict[str, Callable[..., None]] = {}  # {op: its check}, filled by `check_of` below, once and for all

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_HEAD_DIM = 256  # this and the next two: what the Triton kernels have tiles for
LARGEST_NORM = 16384
MOST_EXPERTS = 2047
MOST_SLOTS = 2**31 - 2**16  # tokens x top_k: a routing plan numbers them in 32 bits
FLATTEN = ": flatten batch and length into one"
LARGEST_OFFSET = 2**62  # of a shard in the whole: sums with positions stay within 64 bits


def checked(form: Callable[P, R]) -> Callable[P, R]:
    """`form`, a public function named like its op, which now checks its arguments and keeps to their dtypes."""
    check = CHECKS[form.__name__]
    form = own_dtypes(form)

    @functools.wraps(form)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        check(*args, **kwargs)
        return form(*args, **kwargs)

    return op


def own_dtypes(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose first argument is a tensor, with torch.autocast off."""

    @functools.wraps(function)
    def computes(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        device = first.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # it raises for meta tensors, which have no autocast
            with torch.autocast(device, enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return computes


def reverse_mode_only(op: str, *tensors) -> None:
    """Raise where a tensor carries a forward-mode tangent: an operator of torch.library would answer with one of 0."""
    if not taking_forward_derivatives():
        return
    for t in tensors:
        if t is not None and may_carry_tangent(t):
            raise NotImplementedError(
                f"{op}: the fused form has no forward-mode derivative (torch.func.jvp, jacfwd, hessian); take "
                f"heiretsu.kernels.plain.{op}, or reverse mode (backward, torch.func.vjp, jacrev)"
            )


def attention_options(q, causal, scale, dropout_p, seed, offsets) -> tuple:
    """What attention's operators take behind q, k, v, of checked arguments: causal, scale, p, seed and both offsets."""
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    return causal, scale, float(dropout_p), signed(seed), *offsets


def check_of(*ops: str):
    """Makes a function the check of these ops. Python's words about an argument too many or missing name the op."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        check.__qualname__ = ops[0]
        CHECKS.update(dict.fromkeys(ops, check))
        return check

    return register


def _refuse(op: str, name: str, given, wanted: str):
    raise ValueError(f"{op}: {name} is {given}; it must be {wanted}")


def _kind(value) -> str:
    """What an argument of the wrong type is called."""
    return "None" if value is None else f"a {type(value).__name__}"


def _tensor(op, name, value, letters: str, dtypes=FLOATS, dims: int | None = None, hint: str = ""):
    """Refuse what is no dense tensor of one of the dtypes and, if given, of so many dims. letters: of its shape."""
    if not isinstance(value, torch.Tensor):
        _refuse(op, name, _kind(value), f"a tensor {letters}")
    if value.layout is not torch.strided:
        _refuse(op, name, f"a tensor of layout {value.layout}", f"a dense tensor {letters}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        _refuse(op, name, str(value.dtype).removeprefix("torch."), f"{wanted}: cast it with {name}.to(dtype)")
    if dims is not None and value.dim() != dims:
        _refuse(op, name, f"of shape {tuple(value.shape)}", f"{letters}{hint}, {dims} dims")


def _shape(op, name, tensor, shape: tuple, letters: str, **beside):
    """Refuse another shape than `shape`, which `letters` spell and the one tensor in `beside` decides."""
    if tensor.shape != shape:
        ((other, t),) = beside.items()
        _refuse(op, name, tuple(tensor.shape), f"{letters} = {shape} beside {other} {tuple(t.shape)}")


def _one_device(op, **tensors):
    """Refuse tensors on several devices; None is nowhere."""
    first = next(iter(tensors.values())).device
    if any(t is not None and t.device != first for t in tensors.values()):
        where = ", ".join(f"{name} on {t.device}" for name, t in tensors.items() if t is not None)
        raise ValueError(f"{op}: its tensors must be on one device; they are {where}")


def _integer(op, name, value, low: int, high: int, wanted: str):
    """Refuse what is no Python int in low .. high."""
    if not isinstance(value, int):
        _refuse(op, name, _kind(value), f"a Python int: int({name})")
    if not low <= value <= high:
        _refuse(op, name, value, wanted)


def _number(op, name, value, wanted: str, end: float = math.inf):
    """Refuse what is no Python number in 0 <= value < end."""
    if not isinstance(value, (int, float)):
        _refuse(op, name, _kind(value), f"a Python float: float({name})")
    if not 0.0 <= value < end:
        _refuse(op, name, value, wanted)


def _mask(op, name, p, seed):
    """Refuse what draws no dropout mask."""
    _number(op, name, p, "a probability in [0, 1)", end=1.0)
    _integer(op, "seed", seed, -(2**63), 2**64 - 1, "a number of 64 bits, -2**63 .. 2**64 - 1")


@check_of("attention", "attention_lse")
def _attention(q, k, v, causal=True, scale=None, dropout_p=0.0, seed=0, offsets=(0, 0)):
    op, keys = "attention", "(B, Hkv, S, D)"
    for name, t, letters in (("q", q, "(B, H, T, D)"), ("k", k, keys), ("v", v, keys)):
        _tensor(op, name, t, letters, dims=4)
    (B, H, _, D), Hkv = q.shape, k.shape[1]
    _shape(op, "k", k, (B, Hkv, k.shape[2], D), keys, q=q)
    _shape(op, "v", v, tuple(k.shape), keys, k=k)
    if Hkv == 0 or H % Hkv:
        _refuse(op, "k", f"of {Hkv} heads", f"of a number of heads that divides q's {H}")
    if not 1 <= D <= LARGEST_HEAD_DIM:
        _refuse(op, "the head dim D", D, f"in 1..{LARGEST_HEAD_DIM}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must have one dtype: cast k and v")
    _one_device(op, q=q, k=k, v=v)
    if not isinstance(causal, bool):
        _refuse(op, "causal", _kind(causal), "True or False: there is no mask but the causal one")
    if scale is not None:
        _number(op, "scale", scale, "finite and not negative")
    _mask(op, "dropout_p", dropout_p, seed)
    if not isinstance(offsets, (tuple, list)) or len(offsets) != 2:
        _refuse(op, "offsets", offsets, "two ints, the global (sample, head) of q[0, 0]")
    for offset in offsets:
        _integer(op, "an offset", offset, 0, LARGEST_OFFSET, f"in 0..{LARGEST_OFFSET}")


@check_of("bias_gelu")
def _bias_gelu(x, bias):
    op = "bias_gelu"
    _tensor(op, "x", x, "(..., F)")
    _tensor(op, "bias", bias, "(F,)")
    if x.dim() == 0:
        _refuse(op, "x", "a scalar", "(..., F), 1 dim at least")
    _shape(op, "bias", bias, (x.shape[-1],), "(F,)", x=x)
    _one_device(op, x=x, bias=bias)


@check_of("dropout")
def _dropout(x, p, seed, offset=0):
    op = "dropout"
    _tensor(op, "x", x, "(B, T, C)", dims=3)
    _mask(op, "p", p, seed)
    _integer(op, "offset", offset, 0, LARGEST_OFFSET, f"in 0..{LARGEST_OFFSET}, the global sample of x[0]")


@check_of("layer_norm")
def _layer_norm(x, weight, bias, eps=1e-5, residual=None):
    op = "layer_norm"
    _tensor(op, "x", x, "(..., C)")
    _tensor(op, "weight", weight, "(C,)")
    _tensor(op, "bias", bias, "(C,)")
    if x.dim() == 0:
        _refuse(op, "x", "a scalar", "(..., C), 1 dim at least")
    C = x.shape[-1]
    if C > LARGEST_NORM:
        _refuse(op, "the last dim C", C, f"{LARGEST_NORM} at most")
    _shape(op, "weight", weight, (C,), "(C,)", x=x)
    _shape(op, "bias", bias, (C,), "(C,)", x=x)
    if residual is not None:
        _tensor(op, "residual", residual, "(..., C)")
        _shape(op, "residual", residual, tuple(x.shape), "(..., C)", x=x)
    _one_device(op, x=x, weight=weight, bias=bias, residual=residual)
    _number(op, "eps", eps, "finite and not negative")


@check_of("route")
def _route(logits, top_k):
    op = "route"
    _tensor(op, "logits", logits, "(N, E)", dims=2, hint=FLATTEN)
    E = logits.shape[1]
    if E > MOST_EXPERTS:
        _refuse(op, "the number of experts E", E, f"{MOST_EXPERTS} at most")
    _integer(op, "top_k", top_k, 1, E, f"in 1..{E}, the number of experts")


@check_of("expert_mlp")
def _expert_mlp(x, experts, gates, w1, b1, w2, b2):
    op = "expert_mlp"
    _tensor(op, "x", x, "(N, C)", dims=2)
    _tensor(op, "experts", experts, "(N, K)", (torch.int64, torch.int32), dims=2)
    _tensor(op, "gates", gates, "(N, K)")
    _tensor(op, "w1", w1, "(E, C, F)", dims=3)
    _tensor(op, "w2", w2, "(E, F, C)")
    (N, C), (E, _, F), K = x.shape, w1.shape, experts.shape[1]
    _shape(op, "experts", experts, (N, K), "(N, K)", x=x)
    _shape(op, "gates", gates, (N, K), "(N, K)", experts=experts)
    _shape(op, "w1", w1, (E, C, F), "(E, C, F)", x=x)
    _shape(op, "w2", w2, (E, F, C), "(E, F, C)", w1=w1)
    for name, bias, letters, shape in (("b1", b1, "(E, F)", (E, F)), ("b2", b2, "(E, C)", (E, C))):
        if bias is not None:
            _tensor(op, name, bias, f"{letters}, or None")
            _shape(op, name, bias, shape, letters, w1=w1)
    if E > MOST_EXPERTS:
        _refuse(op, "the number of experts E", E, f"{MOST_EXPERTS} at most")
    if N * K >= MOST_SLOTS:
        _refuse(op, "experts", f"of {N} x {K} slots", f"of fewer than {MOST_SLOTS}")
    _one_device(op, x=x, experts=experts, gates=gates, w1=w1, b1=b1, w2=w2, b2=b2)


@check_of("linear_cross_entropy")
def _linear_cross_entropy(x, weight, targets, vocab_start=0):
    op = "linear_cross_entropy"
    _tensor(op, "x", x, "(N, C)", dims=2, hint=FLATTEN)
    _tensor(op, "weight", weight, "(V, C)", dims=2)
    _tensor(op, "targets", targets, "(N,)", (torch.int64,))
    _shape(op, "weight", weight, (weight.shape[0], x.shape[1]), "(V, C)", x=x)
    _shape(op, "targets", targets, (x.shape[0],), "(N,)", x=x)
    _integer(op, "vocab_start", vocab_start, 0, LARGEST_OFFSET, f"in 0..{LARGEST_OFFSET}, the first word of weight")
    _one_device(op, x=x, weight=weight, targets=targets)
