"""Write down which ops are called and which kernels they launch; make a call's inputs again. Needs no Triton.

    with recording() as record:
        loss(model(batch)).backward()
    record.calls       # [Call]: each call of an op of `fused`, with what it was given
    record.launches    # [Launch]: each launch of a Triton kernel, as Triton specialises it, in any thread
    record.entries     # the entries of the tiles that they took, each once

    with recording(arch="hopper") as record:      # or "ampere", "blackwell", "cdna3"
        fused.bias_gelu(x, bias).sum().backward()  # x, bias: CPU tensors, torch.empty will do

With `arch`, CPU tensors take the Triton forms, with the tiles of that architecture class, and a launch is written down
and *not made*: whatever the op returns is unwritten memory. So the launches of any shape for any GPU can be had (and
compiled: kernel, signature, constexprs, num_warps, num_stages are what Triton's compiler takes) where there is none.
What the host does with values in between, it does with garbage: ops that read none (all of ours) are fine.

What a call was given is kept by its looks: shapes, strides, dtypes, who wants a gradient, how large the numbers are;
of integer tensors the values, since they decide the work. `Call.inputs` makes such tensors again. Calls are picklable,
compare equal if they look alike, and are said in words by str(). A call inside a graph of torch.compile is not seen
(its launches are): record with `torch.compiler.set_stance("force_eager")`.
"""

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from heiretsu.kernels.control import CONTROL, GPUS
from heiretsu.kernels.dtypes import at_least_float32


@dataclasses.dataclass(frozen=True)
class Look:
    """A tensor by its looks. offset: elements from where 16 bytes are aligned. size: root mean square of a float
    tensor, which is no look: another one's numbers are as good. values: of an integer tensor, its bytes in order."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    offset: int
    size: float = dataclasses.field(compare=False)
    values: bytes = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Look":
        given = tensor.detach()
        size, values = 0.0, b""
        if given.is_floating_point():
            norm = torch.linalg.vector_norm(given, dtype=at_least_float32(given.dtype)).item()
            size = norm / math.sqrt(max(1, given.numel())) if math.isfinite(norm) else 1.0
        else:
            values = given.cpu().contiguous().numpy().tobytes()
        offset = int(tensor.storage_offset()) % max(1, 16 // tensor.itemsize)
        wanted = tensor.requires_grad and torch.is_grad_enabled()
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, wanted, offset, size, values)

    def make(self, device: torch.device, generator: torch.Generator) -> torch.Tensor:
        """A leaf that looks like this; floats are normal numbers of its size. generator: on the device."""
        reach = sum((n - 1) * stride for n, stride in zip(self.shape, self.stride, strict=True)) + 1
        memory = torch.zeros(max(0, self.offset + reach), dtype=self.dtype, device=device)
        if self.dtype.is_floating_point:
            numbers = torch.randn(memory.shape, generator=generator, device=device)
            memory.copy_(numbers * self.size)
        made = memory.as_strided(self.shape, self.stride, self.offset)
        if self.values:
            values = torch.frombuffer(bytearray(self.values), dtype=self.dtype).view(self.shape)
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in self.stride)  # of an expanded dim
            made[once].copy_(values[once])
        return made.detach().requires_grad_(self.requires_grad)

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        if self.stride != _contiguous(self.shape):
            words.append(f"strides {'x'.join(map(str, self.stride))}")
        if self.offset:
            words.append(f"from {self.offset}")
        if self.dtype.is_floating_point and not self.requires_grad:
            words.append("frozen")
        return " ".join(words)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


# Numbers that decide which random bits are drawn, and never what is launched.
_DRAWS = ("seed", "offset", "offsets", "vocab_start")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op. arguments: ((name, Look or plain value), ...), without those that are the op's defaults."""

    op: str
    arguments: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, specification: Callable, args: tuple, kwargs: dict) -> "Call":
        signature = inspect.signature(specification)
        arguments = []
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if isinstance(value, torch.Tensor):
                arguments.append((name, Look.of(value)))
            elif value != signature.parameters[name].default:
                arguments.append((name, value))
        return cls(specification.__name__, tuple(arguments))

    @property
    def looks(self) -> dict[str, Look]:
        """Of the tensors that it was given."""
        return {name: value for name, value in self.arguments if isinstance(value, Look)}

    @property
    def elements(self) -> int:
        """Of all its tensors."""
        return sum(math.prod(look.shape) for look in self.looks.values())

    def inputs(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        """Keyword arguments for the op that look like those of this call: fresh leaves, in memory of their own."""
        return {n: v.make(device, generator) if isinstance(v, Look) else v for n, v in self.arguments}

    def __str__(self) -> str:
        """In words, the same for calls that launch the same."""
        alike: dict[str, list[str]] = {}
        for name, value in self.arguments:
            if name not in _DRAWS:
                alike.setdefault(str(value), []).append(name)
        told = (f"{' '.join(names)} {value}" for value, names in alike.items())
        return f"{self.op} {', '.join(told)}"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as Triton's compiler takes it.

    kernel: the @triton.jit function. entry: gpu.launch.Entry, where its parameters are from. signature: {argument:
    Triton type}, ":16" behind a pointer or an integer that 16 divides. constexprs: the other arguments: the kernel's
    constants, arguments that are None, and integers of 1 (strides), which Triton makes constants.
    """

    kernel: Any
    entry: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclasses.dataclass(eq=False)
class Record:
    """What happened inside `recording`, in order."""

    calls: list[Call] = dataclasses.field(default_factory=list)
    launches: list[Launch] = dataclasses.field(default_factory=list)

    @property
    def entries(self) -> list[Any]:
        """Of the launches, each once, in the order of their first use."""
        return list(dict.fromkeys(launch.entry for launch in self.launches))


@contextlib.contextmanager
def recording(arch: str | None = None) -> Iterator[Record]:
    """Inside, the yielded record collects calls and launches, of every thread. arch: see above. ValueError for one that
    is not known."""
    if arch not in (None, *GPUS):
        raise ValueError(f"recording: arch is {arch!r}; it must be one of {', '.join(GPUS)}")
    record, before = Record(), CONTROL.arch
    CONTROL.records.append(record)
    CONTROL.arch = arch or before
    try:
        yield record
    finally:
        CONTROL.records.remove(record)
        CONTROL.arch = before
