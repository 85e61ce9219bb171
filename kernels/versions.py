"""What differs between the releases of torch (2.11 on) and Triton (3.6 on) that we take, and what we use of theirs that
they do not promise. A release that breaks something of it is mended here. Triton is imported where it is asked about:
it need not be there.
"""

import torch
from torch.autograd import forward_ad


def taking_forward_derivatives() -> bool:
    """Whether somebody is in torch.autograd.forward_ad.dual_level, torch.func.jvp, ..."""
    return forward_ad._current_level >= 0


def may_carry_tangent(tensor: torch.Tensor) -> bool:
    """Whether a forward-mode tangent rides on it; one that torch.func has wrapped may hide it in a layer below."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or forward_ad.unpack_dual(tensor).tangent is not None


def triton_interprets() -> bool:
    """Whether TRITON_INTERPRET=1 was set: @triton.jit reads it once, at decoration."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def unspecialised(kernel) -> tuple[str, ...]:
    """Names of the arguments that a @triton.jit function does not specialise on: its do_not_specialize."""
    options = getattr(kernel, "kwargs", {})  # of an interpreted function, which keeps what the decorator was given
    return tuple(getattr(kernel, "do_not_specialize", options.get("do_not_specialize")) or ())


def give_interpreter_bfloat16_constants(constant) -> None:
    """Triton's interpreter has them from 3.9 on. constant: makes one of a float."""
    from triton.runtime.interpreter import InterpreterBuilder

    if not hasattr(InterpreterBuilder, "get_bf16"):
        InterpreterBuilder.get_bf16 = lambda self, value: constant(value)


def let_interpreter_count(scope) -> None:
    """Triton 3.6's interpreter takes int() of an array of one element for a loop's bound, which NumPy refuses from 2.4
    on. scope: what a launch has redirected, and sets back.
    """
    import triton.language as tl

    scope.set_attr(tl.core.tensor, "__index__", lambda tensor: int(tensor.handle.data.item()))
