"""Top-k routing: a softmax renormalised over the top_k experts of a row, which is the softmax of their logits alone.

Forward and backward are one pass over (N, E) each; unfused, PyTorch sorts, gathers, normalises and scatters in about
ten. The backward recomputes the gates from the logits rather than reading them back rounded.

N tokens, E experts, K experts per token.
"""

import torch
import triton
import triton.language as tl

from heiretsu.kernels.arguments import checked, reverse_mode_only
from heiretsu.kernels.gpu import launch
from heiretsu.kernels.gpu.launch import Tiles, accumulator, on_every_gpu

# By the number of experts. Fewer tokens the more experts there are: a program holds whole rows.
TILES = Tiles(
    "route",
    on_every_gpu(
        {
            16: dict(BLOCK_N=128, num_warps=4, num_stages=1),
            64: dict(BLOCK_N=32, num_warps=4, num_stages=1),
            256: dict(BLOCK_N=8, num_warps=4, num_stages=1),
            2048: dict(BLOCK_N=1, num_warps=4, num_stages=1),
        }
    )
    | {"interpreter": {None: dict(BLOCK_N=32, num_warps=4, num_stages=1)}},
)


@triton.jit
def _indices(num_tokens, E_PAD: tl.constexpr, K_PAD: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tokens (BLOCK_N, 1) int64 of this program, experts (1, E_PAD), choices (1, K_PAD); which of the tokens exist."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    return n.to(tl.int64), tl.arange(0, E_PAD)[None, :], tl.arange(0, K_PAD)[None, :], n < num_tokens


@triton.jit
def _route_kernel(
    logits_ptr,  # (N, E), any strides
    gates_ptr,  # (N, K)
    experts_ptr,  # (N, K) int64
    num_tokens, num_experts, stride_n, stride_e, TOP_K: tl.constexpr, K_PAD: tl.constexpr, E_PAD: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n, e, k, row_mask = _indices(num_tokens, E_PAD, K_PAD, BLOCK_N)
    pointers = logits_ptr + n * stride_n + e.to(tl.int64) * stride_e
    logits = tl.load(pointers, mask=row_mask & (e < num_experts), other=0.0).to(ACC)
    keys = tl.where(logits == logits, logits, float("inf"))  # NaN counts as the greatest, as when sorting

    left = (e < num_experts) & row_mask
    chosen = tl.zeros((BLOCK_N, K_PAD), dtype=ACC) - float("inf")  # logits of the chosen
    experts = tl.zeros((BLOCK_N, K_PAD), dtype=tl.int32)
    for choice in tl.static_range(TOP_K):
        best = tl.max(tl.where(left, keys, -float("inf")), 1)[:, None]
        index = tl.min(tl.where(left & (keys == best), e, E_PAD), 1)[:, None]  # the lower of equal ones
        value = tl.sum(tl.where(e == index, logits, 0.0), 1)[:, None]
        chosen = tl.where(k == choice, value, chosen)
        experts = tl.where(k == choice, index, experts)
        left = left & (e != index)

    exps = tl.exp(chosen - tl.max(chosen, 1)[:, None])
    gates = exps / tl.sum(exps, 1)[:, None]
    offset = n * TOP_K + k
    mask = row_mask & (k < TOP_K)
    tl.store(gates_ptr + offset, gates.to(gates_ptr.dtype.element_ty), mask=mask)
    tl.store(experts_ptr + offset, experts.to(tl.int64), mask=mask)


@triton.jit
def _route_backward_kernel(
    logits_ptr,  # (N, E), any strides
    experts_ptr,  # (N, K) int64
    dgates_ptr,  # (N, K)
    dlogits_ptr,  # (N, E)
    num_tokens, num_experts, stride_n, stride_e, TOP_K: tl.constexpr, K_PAD: tl.constexpr, E_PAD: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n, e, k, row_mask = _indices(num_tokens, E_PAD, K_PAD, BLOCK_N)
    mask = row_mask & (k < TOP_K)
    experts = tl.load(experts_ptr + n * TOP_K + k, mask=mask, other=0)
    chosen = tl.load(logits_ptr + n * stride_n + experts * stride_e, mask=mask, other=-float("inf")).to(ACC)
    dgates = tl.load(dgates_ptr + n * TOP_K + k, mask=mask, other=0.0).to(ACC)
    top = tl.max(chosen, 1)[:, None]
    exps = tl.exp(chosen - tl.where(row_mask, top, 0.0))
    gates = exps / tl.where(row_mask, tl.sum(exps, 1)[:, None], 1.0)
    dchosen = gates * (dgates - tl.sum(gates * dgates, 1)[:, None])

    dlogits = tl.zeros((BLOCK_N, E_PAD), dtype=ACC)
    for choice in tl.static_range(TOP_K):
        expert = tl.sum(tl.where(k == choice, experts, 0), 1)[:, None]
        dlogits = tl.where(e == expert, tl.sum(tl.where(k == choice, dchosen, 0.0), 1)[:, None], dlogits)
    mask = row_mask & (e < num_experts)
    tl.store(dlogits_ptr + n * num_experts + e, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, logits, top_k, *tensors):
    """kernel over the logits (N, E), a block of tokens to a program."""
    N, E = logits.shape
    chosen = TILES.parameters(logits.device, E)
    chosen.launch(
        kernel, (triton.cdiv(N, chosen["BLOCK_N"]),), logits, *tensors, N, E, *logits.stride(),
        TOP_K=top_k, K_PAD=triton.next_power_of_2(top_k), E_PAD=triton.next_power_of_2(E),
        ACC=accumulator(logits.dtype),
    )  # fmt: skip


@torch.library.custom_op("heiretsu::route", mutates_args=())
def _route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    N, E = logits.shape
    gates = logits.new_empty(N, top_k)
    experts = torch.empty(N, top_k, dtype=torch.int64, device=logits.device)
    if N:
        _launch(_route_kernel, logits, top_k, gates, experts)
    return gates, experts


@_route.register_fake
def _(logits, top_k):
    shape = logits.shape[0], top_k
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("heiretsu::route_backward", mutates_args=())
def _route_backward(logits: torch.Tensor, experts: torch.Tensor, dgates: torch.Tensor) -> torch.Tensor:
    N, E = logits.shape
    dlogits = logits.new_empty(N, E)
    if N:
        _launch(_route_backward_kernel, logits, experts.shape[1], experts, dgates.contiguous(), dlogits)
    return dlogits


@_route_backward.register_fake
def _(logits, experts, dgates):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dgates, _):
    return _route_backward(*ctx.saved_tensors, dgates), None


_route.register_autograd(_backward, setup_context=_setup_context)


@checked
def route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k routing probabilities, renormalised: `plain.route` (Shazeer et al. 2017, arXiv:1701.06538).

    logits: (N, E) float, any strides. Returns gates (N, K) in logits' dtype and experts (N, K) int64, best first, the
    lower of equal ones first.
    """
    launch.require_device("route", logits)
    reverse_mode_only("route", logits)
    return _route(logits, top_k)
