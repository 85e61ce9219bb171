"""The calls of the ops that the audit compiles: shapes, dtypes and options that matter, and names for what they launch.

A call is what a user writes, forward and backward, on CPU tensors whose values nobody reads. Sizes are those of models:
they decide which integers 16 divides, which loops need a mask, and which tiles are taken.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from heiretsu.kernels import fused
from heiretsu.kernels.recording import Launch, recording
from heiretsu.offgpu.machines import Machine

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Call:
    """label: stands behind the names of its launches. run: makes the inputs and calls the op, forward and backward.
    quick: whether a quick audit takes it. only: of its launches, those whose title begins so."""

    label: str
    run: Callable[[], None]
    quick: bool = True
    only: str = ""


def forward_and_backward(function: Callable, *inputs, **options) -> None:
    """Call it, and take the gradients of all of its outputs that have one."""
    outputs = function(*inputs, **options)
    outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


def _attention(D: int, dtype: torch.dtype = BF16, groups: int = 1, dropout_p: float = 0.0) -> None:
    B, T, H = 2, 1024, 8
    heads = torch.empty(B, T, H + 2 * H // groups, D, dtype=dtype).transpose(1, 2)  # one projection gives q, k and v
    q, k, v = (part.requires_grad_() for part in heads.split([H, H // groups, H // groups], 1))
    forward_and_backward(fused.attention, q, k, v, dropout_p=dropout_p, seed=2**40)


def _attention_lse() -> None:
    forward_and_backward(fused.attention_lse, *(empty(2, 8, 1024, 64, dtype=BF16) for _ in range(3)))


def _bias_gelu() -> None:
    forward_and_backward(fused.bias_gelu, empty(1024, 3072, dtype=BF16), empty(3072))


def _dropout() -> None:
    forward_and_backward(fused.dropout, empty(2, 512, 768, dtype=BF16), p=0.1, seed=2**40)


def _layer_norm(C: int, add: int) -> None:
    residual = empty(1024, C, dtype=BF16) if add else None
    forward_and_backward(fused.layer_norm, empty(1024, C, dtype=BF16), empty(C), empty(C), residual=residual)


def _route(E: int) -> None:
    forward_and_backward(fused.route, empty(2048, E, dtype=BF16), top_k=2)


def _expert_mlp(C: int = 768, F: int = 1024, E: int = 8, dtype: torch.dtype = BF16) -> None:
    """Weights and biases are float32 masters."""
    N, top_k = 2048, 2
    x, gates = empty(N, C, dtype=dtype), empty(N, top_k, dtype=dtype)
    experts = torch.zeros(N, top_k, dtype=torch.int64)
    forward_and_backward(fused.expert_mlp, x, experts, gates, empty(E, C, F), empty(E, F), empty(E, F, C), empty(E, C))


def _linear_cross_entropy(dtype: torch.dtype = BF16) -> None:
    """GPT-2's vocabulary, a float32 master, and tokens enough for two blocks of it."""
    N, C, V = 2048, 768, 50257
    targets = torch.zeros(N, dtype=torch.int64)
    forward_and_backward(fused.linear_cross_entropy, empty(N, C, dtype=dtype), empty(V, C), targets)


def _dims(**options) -> list[tuple[int, partial]]:
    return [(D, partial(_attention, D, **options)) for D in (64, 128, 256)]


CALLS: tuple[Call, ...] = (
    *(Call(f"D{D}", run) for D, run in _dims()),
    *(Call(f"D{D} dropout", run, quick=False) for D, run in _dims(dropout_p=0.1)),
    # How many heads share a key changes one index of the other kernels, and a loop of this one.
    *(Call(f"D{D} groups of 4", run, quick=False, only="attention_dkdv") for D, run in _dims(groups=4)),
    *(Call(f"D{D} dropout, groups of 4", run, quick=False, only="attention_dkdv")
      for D, run in _dims(groups=4, dropout_p=0.1) if D < 256),
    Call("D64 lse", _attention_lse, only="attention_delta"),  # its backward has a gradient of lse besides
    *(Call(f"D{D} fp32", run, quick=False) for D, run in _dims(dtype=FP32)),
    Call("", _bias_gelu),
    Call("", _dropout),
    Call("", _expert_mlp),
    Call("E=64", partial(_expert_mlp, 64, 64, 64), only="routing_plan"),
    Call("odd sizes", partial(_expert_mlp, 300, 1202), quick=False),  # no multiples of 16
    Call("fp32", partial(_expert_mlp, dtype=FP32), quick=False),
    *(Call(f"C={C}{' residual' * add}", partial(_layer_norm, C, add)) for C in (768, 1600, 8192) for add in (0, 1)),
    Call("", _linear_cross_entropy),
    Call("fp32", partial(_linear_cross_entropy, FP32), quick=False),
    Call("", partial(_route, 64)),
)  # fmt: skip


def title(launch: Launch) -> str:
    """What it is launched for: else than below, its module's and its function's name, as in "bias_gelu_forward"."""
    module = launch.kernel.__module__.rpartition(".")[2]
    name = launch.kernel.__name__.removesuffix("_kernel").strip("_")
    constants = launch.constexprs
    match module, name:
        case ("attention_forward", "forward"):
            return "attention_forward"
        case ("attention_backward", _):
            return f"attention_{name}"
        case ("expert_mlp", "combine"):
            return "expert_mlp moe_combine" if constants["GATED"] else "expert_mlp moe_combine dx"
        case ("expert_mlp", "sum_tiles"):
            return f"expert_mlp moe_sum_tiles of {constants['TILE_ROWS']} rows"
        case ("expert_mlp", _):
            return f"expert_mlp moe_{name}"
        case ("grouped_gemm", "weight_gradient"):
            return "expert_mlp dW1 (x^T dh)" if constants["GATHER_A"] else "expert_mlp dW2 (a^T dout)"
        case ("grouped_gemm", "grouped_gemm") if constants["EPILOGUE"] == "gelu":
            return "expert_mlp hidden (x W1, bias, GELU)"
        case ("grouped_gemm", "grouped_gemm") if constants["EPILOGUE"] == "dgelu":
            return "expert_mlp dhidden (dout W2^T, GELU backward)"
        case ("grouped_gemm", "grouped_gemm"):
            return "expert_mlp output (a W2, bias)" if constants["HAS_BIAS"] else "expert_mlp dx (dh W1^T)"
        # The vocabulary goes in blocks: 16 divides the size of all but the last, and dx adds to the first one's.
        case ("linear_cross_entropy", "dlogits"):
            return f"linear_cross_entropy dlogits{', whole block' * launch.signature['V'].endswith(':16')}"
        case ("linear_cross_entropy", "gemm") if "stride_am" in constants:
            return "linear_cross_entropy dweight"
        case ("linear_cross_entropy", "gemm"):
            return f"linear_cross_entropy dx{'' if constants['ADD'] else ', first block'}"
        case ("linear_cross_entropy" | "route" | "routing_plan", _):
            return f"{module} {name}"
    return f"{module}_{name}".strip("_")


@dataclass(frozen=True)
class Configuration:
    """What the compiler is given for one launch, under the name of the audit. fn: the @triton.jit function. signature
    and constexprs: as in kernels.recording.Launch. quick: whether a quick audit takes the call."""

    name: str
    fn: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    quick: bool

    def __reduce__(self):
        """Pickled with the function by its name, for the processes that compile."""
        values = {**vars(self), "fn": (self.fn.__module__, self.fn.__name__)}
        return _unpickled, (values,)

    @property
    def code(self) -> tuple:
        """What the compiler sees: the same for launches that are compiled once."""
        return self.fn, self.signature, self.constexprs, self.num_warps, self.num_stages


def _unpickled(values: dict) -> Configuration:
    module, name = values["fn"]
    return Configuration(**{**values, "fn": getattr(sys.modules[module], name)})


def configurations(machine: Machine, calls: Iterable[Call] = CALLS) -> list[Configuration]:
    """All launches of the calls on a machine, each code once, by the name under which it comes first.

    ValueError if one name would stand for two codes.
    """
    found: dict[str, Configuration] = {}
    for call in calls:
        with recording(arch=machine.kernel_class) as record:
            call.run()
        for launch in record.launches:
            name, options = f"{title(launch)} {call.label}".strip(), (launch.num_warps, launch.num_stages)
            new = Configuration(name, launch.kernel, launch.signature, launch.constexprs, *options, call.quick)
            if not name.startswith(call.only) or any(new.code == known.code for known in found.values()):
                continue
            if name in found:
                raise ValueError(f"two launches of different code are called {name}: give their calls other labels")
            found[name] = new
    return list(found.values())
