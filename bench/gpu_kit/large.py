"""Offsets beyond 2**31 elements, for every op: the arithmetic that int32 gets silently wrong.

Two ways. Far: the values of a small case, laid out so that one dim of an input strides over more than 2**31 elements;
the op must compute what it computes on the same values close together. Whole: inputs and outputs that have more than
2**31 elements themselves; with cotangents that are zero but at the end, outputs and gradients there must be those of
the op on the end alone. Neither needs a reference in a wider dtype, so both cost a few passes over memory
(of 50 GB at most).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from heiretsu.bench.gpu_kit.kit import Kit
from heiretsu.kernels import fused
from heiretsu.kernels.agreement import ULPS, disagreements
from tests.kernels.parity import Case

SPAN = 2**31 + 2**20
REHEARSED_SPAN = 2**13
TAIL = 8  # rows at the end that are compared


def far_dims(case: Case, dtype: torch.dtype) -> list[tuple[str, int]]:
    """(input, dim) for each dim but the last that has more than one element."""
    inputs = case.inputs(torch.Generator().manual_seed(0), dtype)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return [(name, dim) for name, x in tensors.items() for dim in range(x.dim() - 1) if x.shape[dim] > 1]


def check_far(kit: Kit, case: Case, dtype: torch.dtype, name: str, dim: int) -> None:
    """The op with `dim` of input `name` stretched, against the op on the same values. Raises AssertionError."""
    span = REHEARSED_SPAN if kit.rehearse else SPAN
    inputs = case.inputs(torch.Generator().manual_seed(0), dtype)
    near: dict = {
        key: value.to(kit.torch_device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
    }
    ours = _run(case.op, near | {name: far(near[name], dim, span)})
    agree(ours, _run(case.op, near), f"with {name} strided over {span:,} elements in dim {dim}")


def far(x: torch.Tensor, dim: int, span: int) -> torch.Tensor:
    """The values of x, one step in `dim` being so many elements that the last begins beyond `span` of them."""
    rest = [size for other, size in enumerate(x.shape) if other != dim]
    step = max(span // (x.shape[dim] - 1) + 1, torch.Size(rest).numel())
    step = (step + 15) // 16 * 16  # as far apart as aligned rows are
    strides = list(torch.empty(rest, device="meta").stride())
    strides.insert(dim, step)
    buffer = torch.empty(step * (x.shape[dim] - 1) + torch.Size(rest).numel(), dtype=x.dtype, device=x.device)
    view = buffer.as_strided(x.shape, strides)
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


@dataclass(frozen=True)
class Whole:
    """An op on a tensor of more than `span` elements. rows: of the dim that grows. inputs(rows, make) -> arguments.

    batched: the inputs whose first dim that is; so is that of every output. shifted(inputs, rows): the arguments of the
    same op on the last rows alone, beside the tensors themselves: an offset, other indices.
    """

    op: str
    why: str
    rows: int
    inputs: Callable
    batched: tuple[str, ...]
    shifted: Callable[[int], dict] = field(default=lambda skipped: {})


def wholes(span: int) -> list[Whole]:
    """One for each op, and two for those that read a large weight, too."""
    small = span < 2**20

    def size(full: int, tiny: int) -> int:
        return tiny if small else full

    F, C, H, T, D = size(512, 32), size(1024, 32), size(4, 2), size(128, 16), size(64, 16)
    E, wide = size(64, 4), size(2048, 32)

    def rows(width: int) -> int:
        return span // width + TAIL

    return [
        Whole("bias_gelu", "x and out", rows(F), lambda n, t: {"x": t(n, F), "bias": t(F)}, ("x",)),
        Whole(
            "layer_norm",
            "x, residual, y and total",
            rows(C),
            lambda n, t: {"x": t(n, C), "residual": t(n, C), "weight": t(C), "bias": t(C)},
            ("x", "residual"),
        ),
        Whole(
            "dropout",
            "x and out",
            rows(T * F),
            lambda n, t: {"x": t(n, T, F), "p": 0.1, "seed": 3},
            ("x",),
            lambda skipped: {"offset": skipped},
        ),
        Whole("route", "logits", rows(E), lambda n, t: {"logits": t(n, E), "top_k": 2}, ("logits",)),
        Whole(
            "attention",
            "q, k, v and out, with dropout",
            rows(H * T * D),
            lambda n, t: {name: t(n, H, T, D) for name in "qkv"} | {"dropout_p": 0.1, "seed": 3},
            ("q", "k", "v"),
            lambda skipped: {"offsets": (skipped, 0)},
        ),
        Whole(
            "expert_mlp",
            "x, y and out",
            rows(wide),
            lambda n, t: {
                "x": t(n, wide),
                "experts": torch.arange(n, device=t.device)[:, None] % 4,
                "gates": t(n, 1),
                "w1": t(4, wide, 64, scale=0.1),
                "b1": t(4, 64),
                "w2": t(4, 64, wide, scale=0.1),
                "b2": t(4, wide),
            },
            ("x", "experts", "gates"),
        ),
        Whole(
            "linear_cross_entropy",
            "x",
            rows(C),
            lambda n, t: {
                "x": t(n, C, scale=0.1),
                "weight": t(64, C),
                "targets": torch.arange(n, device=t.device) % 64,
            },
            ("x", "targets"),
        ),
    ]


class Make:
    """Random leaves on the device, drawn there: on a CPU, 2**31 of them would take longer than all else."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(std=scale).requires_grad_()


def check_whole(kit: Kit, whole: Whole) -> None:
    """Outputs and gradients at the end of a large tensor, against the op on the end alone. Raises AssertionError."""
    rows = whole.rows
    inputs = whole.inputs(rows, Make(kit.torch_device))
    skipped = rows - TAIL
    tail = {
        name: x.detach()[skipped:].clone().requires_grad_(x.requires_grad) if name in whole.batched else x
        for name, x in inputs.items()
    } | whole.shifted(skipped)
    alone, cotangents = _run_with(whole.op, tail, None)
    padded = [None if c is None else torch.cat([c.new_zeros(skipped, *c.shape[1:]), c]) for c in cotangents]
    ours, _ = _run_with(whole.op, inputs, padded)
    batched = {f"d{name}" for name in whole.batched} | {name for name in ours if name.startswith("output")}
    ours = {name: value[skipped:] if name in batched else value for name, value in ours.items()}
    agree(ours, alone, f"in the last {TAIL} of {rows:,} rows ({whole.why})")


def check_large_weights(kit: Kit, op: str) -> None:
    """A weight of more than 2**31 elements, of which only the end is used, against that end alone."""
    span = REHEARSED_SPAN if kit.rehearse else SPAN
    make = Make(kit.torch_device)
    N, C = (16, 32) if kit.rehearse else (64, 2048)
    if op == "expert_mlp":
        F = C
        E = span // (C * F) + 2
        weights = {
            "w1": make(E, C, F, scale=C**-0.5),
            "b1": make(E, F),
            "w2": make(E, F, C, scale=F**-0.5),
            "b2": make(E, C),
        }
        used, kept = {"experts": torch.arange(N, device=make.device)[:, None] % 2}, 2
        whole = {"experts": used["experts"] + E - 2}
        inputs = {"x": make(N, C), "gates": make(N, 1)}
    else:
        V, kept = span // C + 128, 128
        weights = {"weight": make(V, C, scale=0.05)}
        used = {"targets": torch.arange(N, device=make.device) % 128}
        whole = {"targets": used["targets"] + V - 128}
        inputs = {"x": make(N, C)}
        weights["weight"].data[: V - 128] = 0.0  # the words before have a logit of 0: they add V - 128 to the sum
    end = {name: w.detach()[-kept:].clone().requires_grad_() for name, w in weights.items()}
    alone, cotangents = _run_with(op, inputs | end | used, None)
    if op == "linear_cross_entropy":
        _check_lse(inputs, end, whole, weights, alone)
        return
    ours, _ = _run_with(op, inputs | weights | whole, cotangents)
    for name in weights:
        assert not ours[f"d{name}"][:-kept].any(), f"experts without tokens have a d{name} that is not zero"
        ours[f"d{name}"] = ours[f"d{name}"][-kept:]
    agree(ours, alone, f"with a weight of {span:,} elements, of which the last experts are used")


def _check_lse(inputs, end, whole, weights, alone) -> None:
    """lse over all words = log(exp(lse of the last) + the number of the others); target logits and dweight likewise."""
    others = weights["weight"].shape[0] - end["weight"].shape[0]
    targets = whole["targets"]
    lse, logit = fused.linear_cross_entropy(inputs["x"], weights["weight"], targets)
    expected = torch.logaddexp(alone["output 0"].double(), torch.tensor(float(others)).log().double().to(lse.device))
    agree(
        {"lse": lse, "target_logit": logit},
        {"lse": expected.float(), "target_logit": alone["output 1"]},
        "over all words",
    )
    (gradient,) = torch.autograd.grad((lse - logit).sum(), weights["weight"])
    x, last = inputs["x"].detach().float(), end["weight"].detach().float()
    dlogits = (x @ last.T - lse.detach()[:, None]).exp()
    dlogits[torch.arange(len(x)), targets - others] -= 1.0
    agree({"dweight": gradient[-len(last) :]}, {"dweight": (dlogits.T @ x).to(gradient.dtype)}, "of the last words", 16)


def agree(ours: dict, theirs: dict, where: str, ulps: int = ULPS) -> None:
    """Every tensor within some ulps of its largest element, integers equal. Raises AssertionError."""
    wrong = disagreements(ours, theirs, ulps=ulps)
    assert not wrong, f"{where}: " + "; ".join(wrong)


def _run(op: str, inputs: dict) -> dict[str, torch.Tensor]:
    return _run_with(op, inputs, None)[0]


def _run_with(op: str, inputs: dict, cotangents: list | None) -> tuple[dict[str, torch.Tensor], list]:
    """Outputs and gradients by name, and the cotangents that were used: random ones unless given."""
    outputs = getattr(fused, op)(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if cotangents is None:
        generator = torch.Generator().manual_seed(5)
        cotangents = [
            torch.randn(out.shape, generator=generator).to(out.device, out.dtype) if out.requires_grad else None
            for out in outputs
        ]
    leaves = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    carrying = [(out, c) for out, c in zip(outputs, cotangents, strict=True) if c is not None]
    gradients = torch.autograd.grad(
        [out for out, _ in carrying], list(leaves.values()), [c for _, c in carrying], allow_unused=True
    )
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    named |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return named, cotangents


def far_checks(cases: list[Case], dtype: torch.dtype) -> list[tuple[Case, str, int]]:
    """Every (case, input, dim) to stretch, of the first case of each op."""
    first = {case.op: case for case in reversed(cases) if dtype in case.dtypes}
    return [(case, name, dim) for case in first.values() for name, dim in far_dims(case, dtype)]
