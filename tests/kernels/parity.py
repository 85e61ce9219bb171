"""The parity rule, and the table rows it is applied to.

A `Case` is one row: an op, a shape and the reason for that shape. `check` runs it three times with the same inputs and
the same random cotangents: the implementation under test, `kernels.plain` in the same dtype, and `kernels.plain` in
float64, the reference. Every output and every gradient is compared by name.

The rule. An element of size |reference| = a is judged among its peers, the elements of the tensor no larger than 2a (at
least the 64 smallest), and its neighbours, the elements of its row, of its column and so on. Its error may be at most

    2 * (the largest error that same-dtype plain makes among peers and neighbours)
    + 1 ulp of the tensor's dtype + 4 ulps of the accumulator, both of the largest peer's size
    + for a gradient: 4 ulps of the accumulator, of the largest cotangent's size.

One ulp is the final rounding; four of the accumulator (float32, float64 for float64) pay for another order of the
same arithmetic. Gradients are linear in the cotangents, and many vanish by cancellation (one key: the softmax is
constant), so their rounding noise has the cotangent's size, whatever the reference's. Peers and neighbours are what
makes the rule neither elementwise (plain may be exact there by luck: a small element is often what is left of large
ones, whose rounding shows in its row) nor one norm (one huge element would hide errors in all the others).

To add a row, append a `Case` to tests/kernels/cases/<op>.py; to add a planted bug, append a `Mutation` there.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable

import torch

from heiretsu.kernels import plain
from heiretsu.offgpu.scratch import poison_

OUTPUT_NAMES = {  # of the ops that return more than one tensor; layer_norm returns the second one with residual only
    "attention_lse": ("out", "lse"),
    "layer_norm": ("y", "total"),
    "route": ("gates", "experts"),
    "linear_cross_entropy": ("lse", "target_logit"),
}
MARGIN = 64  # poisoned elements around every input: at least 64 bytes, so that alignment is that of the original
PEERS = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the parity table.

    op: name of the function in `kernels.plain` and `fused`. name: unique within the op. why: the purpose of this shape.
    inputs: (generator, dtype) -> keyword arguments of the op. Tensors have requires_grad set as wanted; floats are in
        `dtype`, except parameters that stay float32 beside bfloat16 activations. Views, expanded tensors and unaligned
        slices are welcome: check() copies them with their strides and offset, and poisons everything between.
    backward: names or indices of the outputs that get a cotangent; None for all of them.
    emulate: tiny; runs on the PTX emulator too (`--emulate`).
    """

    op: str
    name: str
    why: str
    inputs: Callable[[torch.Generator, torch.dtype], dict[str, object]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    emulate: bool = False
    backward: tuple[str | int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A wrong edit of kernels/<file> that case `caught_by` must catch: `old`, found `count` times, becomes `new`.

    file: named like the file of the table unless given. op: the op of the case, where several of the table have a case
    of that name.
    """

    name: str
    old: str
    new: str
    caught_by: str
    file: str | None = None
    count: int = 1
    op: str | None = None

    @property
    def id(self) -> str:
        return f"{self.file}:{self.name}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Worst element of one tensor: its error, and what the rule allowed there."""

    error: float
    allowed: float
    message: str = ""


class ParityError(AssertionError):
    """An implementation breaks the parity rule, or does something to its inputs; one line for each tensor."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def build(case: Case, dtype: torch.dtype) -> dict[str, object]:
    """The case's inputs: a function of op, case name and dtype alone."""
    seed = zlib.crc32(f"{case.op}/{case.name}/{dtype_name(dtype)}".encode())
    return case.inputs(torch.Generator().manual_seed(seed), dtype)


def check(case: Case, dtype: torch.dtype, implementation: Callable, device="cpu") -> dict[str, Comparison]:
    """Run `implementation` on the case's inputs, on `device`, and hold it to the rule. Raises ParityError.

    Returns the worst element of each output and each gradient, by name.
    """
    inputs = build(case, dtype)
    own = _Run(case, plain_form(case.op), _copies(inputs, device))
    reference = _Run(case, plain_form(case.op), _copies(inputs, device, torch.float64))
    ours = _Run(case, implementation, _copies(inputs, device))

    cotangents = _cotangents(case, own)
    problems = ours.structure_problems(own)
    if not problems:
        for each in (own, reference, ours):
            each.backward(cotangents)
        problems = ours.aliasing_problems() + ours.modified_problems()
    if problems:
        raise ParityError(_report(case, dtype, problems))

    size = max((c.double().abs().max().item() for c in cotangents.values() if c.numel()), default=0.0)
    results = {}
    for name, value in ours.outputs.items():
        results[name] = compare(value, own.outputs[name], reference.outputs[name])
    for name, value in ours.gradients.items():
        results[name] = compare_gradients(value, own.gradients[name], reference.gradients[name], size)
    problems = [f"{name}: {result.message}" for name, result in results.items() if result.message]
    if problems:
        raise ParityError(_report(case, dtype, problems))
    return results


def run(case: Case, dtype: torch.dtype, implementation: Callable, device="cpu") -> dict[str, torch.Tensor | None]:
    """Outputs and gradients of one implementation, by name, for the inputs and cotangents that `check` uses."""
    result = _Run(case, implementation, _copies(build(case, dtype), device))
    result.backward(_cotangents(case, result))
    return {**result.outputs, **result.gradients}


def plain_form(op: str) -> Callable:
    return getattr(plain, op)


def compare(ours, own, reference, gradient_size: float = 0.0) -> Comparison:
    """The rule for one tensor: ours against the float64 reference, given `own`, plain in the same dtype."""
    if ours.shape != own.shape or ours.dtype != own.dtype:
        return _failure(
            f"is {dtype_name(ours.dtype)} {tuple(ours.shape)}, plain gives {dtype_name(own.dtype)} {tuple(own.shape)}"
        )
    if ours.numel() == 0:
        return Comparison(0.0, 0.0)
    if not ours.dtype.is_floating_point:
        return _compare_exactly(ours, own)
    got, same, want = (t.detach().cpu().double().flatten() for t in (ours, own, reference))
    finite = want.isfinite()
    mismatch = torch.where(finite, ~got.isfinite(), (got != want) & ~(got.isnan() & want.isnan()))
    if mismatch.any():
        i = int(mismatch.nonzero()[0])
        many = f"{int(mismatch.sum())} of {mismatch.numel()} elements"
        return _failure(
            f"[{_index(i, ours)}] is {got[i]:.6g}, float64 plain {want[i]:.6g}: {many} differ in being finite"
        )
    error = torch.where(finite, (got - want).abs(), 0.0)
    plain_error = torch.where(finite & same.isfinite(), (same - want).abs(), 0.0)
    size = torch.where(finite, want.abs(), 0.0)
    allowed = _allowed(size.view(ours.shape), plain_error.view(ours.shape), ours.dtype, gradient_size).flatten()
    worst = int((error / allowed.clamp(min=torch.finfo(torch.float64).tiny)).argmax())
    message = ""
    if error[worst] > allowed[worst]:
        message = (
            f"[{_index(worst, ours)}] is {got[worst]:.9g}, float64 plain {want[worst]:.9g}, plain {same[worst]:.9g}: "
            f"error {error[worst]:.3g}, allowed {allowed[worst]:.3g}; {int((error > allowed).sum())} of {got.numel()} "
            "elements are too far off"
        )
    return Comparison(float(error[worst]), float(allowed[worst]), message)


def compare_gradients(ours, own, reference, gradient_size: float) -> Comparison:
    """As `compare`; a gradient that plain does not have may be missing or exactly zero."""
    if own is None:
        if ours is None or not ours.any():
            return Comparison(0.0, 0.0)
        return _failure("is not zero, but plain has no such gradient")
    if ours is None:
        return _failure("is missing")
    return compare(ours, own, reference, gradient_size)


def _allowed(size, plain_error, dtype, gradient_size):
    """Allowed error of each element, from the sizes of the reference and the errors of same-dtype plain."""
    sizes, order = size.flatten().sort()
    last_peer = torch.searchsorted(sizes, 2 * sizes, right=True).clamp(min=min(PEERS, len(sizes))) - 1
    peer_size, peer_error = torch.zeros_like(sizes), torch.zeros_like(sizes)
    peer_size[order] = sizes[last_peer]
    peer_error[order] = plain_error.flatten()[order].cummax(0).values[last_peer]
    worst = peer_error.view(size.shape).maximum(_worst_of_lines(plain_error))
    accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    ulps = (torch.finfo(dtype).eps + 4 * accumulator) * peer_size + 4 * accumulator * gradient_size
    return 2 * worst + ulps.view(size.shape)


def _worst_of_lines(errors):
    """For each element the largest error along the lines through it: its row, its column, ... None for a lone line."""
    dims = [dim for dim, n in enumerate(errors.shape) if n > 1]
    worst = torch.zeros_like(errors)
    for dim in dims if len(dims) > 1 else ():
        worst = worst.maximum(errors.amax(dim, keepdim=True))
    return worst


def _compare_exactly(ours, own):
    wrong = (ours != own).flatten()
    if not wrong.any():
        return Comparison(0.0, 0.0)
    i = int(wrong.nonzero()[0])
    got, want = ours.flatten()[i].item(), own.flatten()[i].item()
    return _failure(f"[{_index(i, ours)}] is {got}, plain {want}; {int(wrong.sum())} of {wrong.numel()} differ")


def _failure(message):
    return Comparison(math.inf, 0.0, message)


def _index(flat, tensor):
    return ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(flat), tensor.shape))


def _report(case, dtype, problems):
    return "\n".join([f"{case.op}/{case.name} in {dtype_name(dtype)} ({case.why}):", *(f"  {p}" for p in problems)])


class _Run:
    """One implementation on one set of inputs: its outputs, its gradients, and what it did to memory."""

    def __init__(self, case, function, inputs):
        self.inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        self.leaves = {f"d{name}": tensor for name, tensor in self.inputs.items() if tensor.requires_grad}
        self.watched = {f"input {name}": _whole(tensor) for name, tensor in self.inputs.items()}
        self.before = {name: tensor.clone() for name, tensor in self.watched.items()}
        with torch.autograd.graph.saved_tensors_hooks(self._watch_saved, lambda tensor: tensor):
            outputs = function(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        names = OUTPUT_NAMES.get(case.op, ("out",))
        self.outputs = {names[i] if i < len(names) else f"out{i}": out for i, out in enumerate(outputs)}
        self.gradients = {}

    def _watch_saved(self, tensor):
        name = f"saved tensor {len(self.watched)} {tuple(tensor.shape)}"
        if isinstance(tensor, torch.Tensor) and not any(_same_storage(tensor, w) for w in self.watched.values()):
            self.watched[name] = tensor.detach()
            self.before[name] = tensor.detach().clone()
        return tensor

    def backward(self, cotangents):
        """Fill `gradients`: {"dx": tensor or None} for every input that requires a gradient."""
        self.gradients = dict.fromkeys(self.leaves)
        chosen = [name for name in cotangents if self.outputs[name].requires_grad]
        if not chosen or not self.leaves:
            return
        outputs = [self.outputs[name] for name in chosen]
        self.cotangents = [cotangents[name].to(out.dtype, copy=True) for name, out in zip(chosen, outputs, strict=True)]
        for name, cotangent in zip(chosen, self.cotangents, strict=True):
            self.watched[f"cotangent of {name}"], self.before[f"cotangent of {name}"] = cotangent, cotangent.clone()
        gradients = torch.autograd.grad(outputs, list(self.leaves.values()), self.cotangents, allow_unused=True)
        self.gradients = dict(zip(self.leaves, gradients, strict=True))

    def structure_problems(self, own):
        """Outputs that are not there, or through which no gradient can flow although it does in plain."""
        if self.outputs.keys() != own.outputs.keys():
            return [f"returns {list(self.outputs)}, plain returns {list(own.outputs)}"]
        self.own_aliases = _aliases(own)
        # An op's outputs carry gradients together, so ours may carry one that plain does not have: it must be zero.
        return [
            f"{name}: plain carries a gradient, this does not"
            for name, out in self.outputs.items()
            if own.outputs[name].requires_grad and not out.requires_grad
        ]

    def aliasing_problems(self):
        return [f"{a} shares memory with {b}" for a, b in _aliases(self) - self.own_aliases]

    def modified_problems(self):
        return [f"{n} was modified" for n, t in self.watched.items() if not same_bits(t, self.before[n])]


def _aliases(run):
    """Pairs (output or gradient, input) and (gradient, output) that share memory."""
    pairs = [(o, run.outputs[o], i, run.inputs[i]) for o in run.outputs for i in run.inputs]
    for name, gradient in run.gradients.items():
        pairs += [(name, gradient, other, value) for other, value in (run.inputs | run.outputs).items()]
    return {(a, b) for a, x, b, y in pairs if x is not None and _same_storage(x, y)}


def _cotangents(case, own):
    """Random cotangents in the outputs' dtypes, one for each float output of `own` that carries a gradient."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.name} cotangents".encode()))
    cotangents = {}
    for i, (name, out) in enumerate(own.outputs.items()):
        if out.requires_grad and (case.backward is None or name in case.backward or i in case.backward):
            cotangents[name] = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    return cotangents


def _copies(inputs, device, dtype=None):
    """Fresh leaves with the strides, offset and values of `inputs`; floats in `dtype` where given."""
    return {n: _copy(v, device, dtype) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}


def _copy(tensor, device, dtype):
    dtype = dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    offset = MARGIN + tensor.storage_offset()
    buffer = poison_(torch.zeros(offset + last + 1 + MARGIN, dtype=dtype, device=device))
    copy = buffer.as_strided(tensor.shape, tensor.stride(), offset)
    target, source = copy, tensor.detach()
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:  # expanded: one element stands for all, and copy_ would say so
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    target.copy_(source)
    return copy.requires_grad_(tensor.requires_grad)


def _whole(tensor):
    """The whole memory of a tensor, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _same_storage(a, b):
    pointer = a.untyped_storage().data_ptr()
    return pointer != 0 and pointer == b.untyped_storage().data_ptr()


def same_bits(a, b) -> bool:
    """Whether two tensors, or two missing ones, are equal bit for bit, NaN included."""
    if a is None or b is None:
        return a is b
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.shape == b.shape and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
