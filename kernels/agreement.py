"""Whether two computations of the same tensors agree, for autotune, the benchmark and the checks on a GPU.

One bound for each whole tensor, a pass over memory: candidates, rivals and far strides are judged by it. The library's
own forms are held to a finer rule, element by element (tests/kernels/parity.py).
"""

from collections.abc import Mapping

import torch

from heiretsu.kernels.dtypes import at_least_float32

ULPS = 4


def disagreements(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    own_errors: Mapping[str, float] | None = None,
    ulps: float = ULPS,
    least: float = 0.0,
) -> list[str]:
    """What differs by more than another order of the same arithmetic explains, a sentence a tensor; [] is agreement.

    An element may be off by ulps of the coarsest dtype found (by `least` at least), both of the tensor's largest
    element, and by twice own_errors[name], what the accepted way is off by itself. Integers must be equal. A number
    that is not finite is off.
    """
    floats = [t.dtype for t in found.values() if t.is_floating_point()]
    relative = max([least, *(ulps * torch.finfo(dtype).eps for dtype in floats)])
    wrong = []
    for name, theirs in expected.items():
        if theirs.is_floating_point():
            wide = at_least_float32(theirs.dtype)
            error, allowed = largest(found[name].to(wide) - theirs.to(wide)), relative * largest(theirs)
            allowed += 2 * own_errors[name] if own_errors else 0.0
            if not error <= allowed:  # NaN is not
                wrong.append(f"{name} is off by {error:.2g}, {allowed:.2g} allowed")
        elif not torch.equal(found[name], theirs):
            differ = int((found[name] != theirs).sum()) if found[name].shape == theirs.shape else theirs.numel()
            wrong.append(f"{name} differs in {differ} of {theirs.numel()} elements")
    return wrong


def largest(x: torch.Tensor) -> float:
    """The size of the largest element; 0 of none."""
    return x.abs().max().item() if x.numel() else 0.0
