"""Parity before time: an implementation must come about as close to a wider dtype as plain in the same dtype does."""

import torch

from heiretsu.kernels import plain
from heiretsu.kernels.agreement import disagreements, largest

WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def gradients_of(outputs: tuple, inputs: dict, cotangents: list) -> dict[str, torch.Tensor]:
    """{input: gradient} for the inputs that want one, by the chain rule from the outputs' cotangents."""
    wanted = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), cotangents), strict=True))


def cotangents_for(outputs: tuple, generator: torch.Generator) -> list[torch.Tensor]:
    """Random ones; 1 for a scalar, which is a loss."""
    return [
        torch.ones_like(out)
        if out.dim() == 0
        else torch.randn(out.shape, generator=generator).to(out.dtype).to(out.device)
        for out in outputs
    ]


def _run(call, inputs, cotangents):
    outputs = call(inputs)
    gradients = gradients_of(outputs, inputs, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return named | {f"d{name}": gradient for name, gradient in gradients.items()}


def wider(inputs: dict, dtype: torch.dtype) -> dict:
    return {
        name: x.detach().to(dtype).requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }


class Judge:
    """Compares implementations of one workload on one set of inputs; the reference is computed once.

    The reference is `kernels.plain` in float64 for float32, and in float32 for the two-byte types, whose own rounding
    is 2**13 times coarser and more.
    """

    def __init__(self, workload, inputs: dict, dtype: torch.dtype):
        self.inputs = workload.part(inputs) if workload.part else inputs
        generator = torch.Generator().manual_seed(7)

        def call(inputs):
            return workload.call(plain, inputs)

        self.cotangents = cotangents_for(tuple(out.detach() for out in call(self.inputs)), generator)
        self.reference = _run(call, wider(self.inputs, WIDER[dtype]), self.cotangents)
        own = _run(call, self.inputs, self.cotangents)
        self.own_errors = {name: largest(own[name].to(wide.dtype) - wide) for name, wide in self.reference.items()}

    def problem(self, call) -> str:
        """Empty if the implementation agrees; else each tensor that does not, its error and the error allowed."""
        return "; ".join(disagreements(_run(call, self.inputs, self.cotangents), self.reference, self.own_errors))
