"""Views whose elements lie far apart: no offset is computed in 32 bits, whichever dim of whichever operand it is.

A stride of 2**30 fits in an int32, as which a launch passes it; twice that, or a block's width times it, does not. An
overflow raises in this interpreter (see overflow.py), and what is read elsewhere gives other bits.
"""

import mmap

import pytest
import torch

from heiretsu.kernels import fused

FAR = 2**30
WIDEST = 5  # elements of a dim
MAP_NORESERVE = 0x4000  # pages of it cost memory only where they are touched


@pytest.fixture(scope="module")
def memory():
    return torch.frombuffer(
        mmap.mmap(-1, 2 * FAR * WIDEST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE),
        dtype=torch.bfloat16,
    )


def far_in(dim, tensor, memory):
    """The same values, with neighbours along `dim` FAR elements apart."""
    strides = list(tensor.contiguous().stride())
    for other in range(dim):  # the dims outside of it need no more room than the others take
        strides[other] //= tensor.shape[dim]
    strides[dim] = FAR
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


def inputs_of(op) -> tuple[dict[str, torch.Tensor], dict]:
    """Float operands, and the rest."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    experts = torch.tensor([[0, 2], [1, 0], [2, 1]])
    return {
        "attention": ({name: normal(3, 3, 4, 5) for name in "qkv"}, {}),
        "attention_lse": ({name: normal(3, 3, 4, 5) for name in "qkv"}, {"causal": False, "dropout_p": 0.3, "seed": 3}),
        "bias_gelu": ({"x": normal(4, 5), "bias": normal(5)}, {}),
        "dropout": ({"x": normal(3, 4, 5)}, {"p": 0.3, "seed": 5}),
        "layer_norm": (
            {"x": normal(4, 5), "weight": normal(5), "bias": normal(5), "residual": normal(4, 5)},
            {},
        ),
        "route": ({"logits": normal(3, 4)}, {"top_k": 2}),
        "linear_cross_entropy": (
            {"x": normal(4, 5), "weight": normal(5, 5)},
            {"targets": torch.tensor([0, 4, 2, 1])},
        ),
        "expert_mlp": (
            {
                "x": normal(3, 5),
                "gates": normal(3, 2),
                "w1": normal(3, 5, 4),
                "b1": normal(3, 4),
                "w2": normal(3, 4, 5),
                "b2": normal(3, 5),
            },
            {"experts": experts},
        ),
    }[op]


OPS = (
    "attention",
    "attention_lse",
    "bias_gelu",
    "dropout",
    "layer_norm",
    "route",
    "linear_cross_entropy",
    "expert_mlp",
)


def run(op, tensors, rest, cotangents=None):
    """Outputs and gradients of the float operands, and what the cotangents were."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outs = getattr(fused, op)(**leaves, **rest)
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    cotangents = cotangents or [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, list(leaves.values()), cotangents)], cotangents


@pytest.mark.full
@pytest.mark.parametrize("op", OPS)
def test_far_operands_give_the_bits_of_compact_ones(op, memory):
    tensors, rest = inputs_of(op)
    wanted, cotangents = run(op, tensors, rest)
    for name, tensor in tensors.items():
        for dim in range(tensor.dim()):
            got, _ = run(op, {**tensors, name: far_in(dim, tensor, memory)}, rest)
            assert all(map(torch.equal, got, wanted)), f"{name}, dim {dim}"
    first = cotangents[0]
    for dim in range(first.dim() if first.dtype == torch.bfloat16 else 0):
        got, _ = run(op, tensors, rest, [far_in(dim, first, memory), *cotangents[1:]])
        assert all(map(torch.equal, got, wanted)), f"gradient of the output, dim {dim}"
