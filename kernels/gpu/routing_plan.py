"""The routing plan: which row of a grouped GEMM works for which token and expert.

`make_plan` is a stable counting sort of the N * K (token, choice) slots by expert, wholly on the device: no count comes
back to the host. Two launches around one cumulative sum:
    counts[e, b] = slots of block b with expert e
    ends         = inclusive sum of counts in the order (expert, block)
    row of slot  = ends[e, b] - counts[e, b] + its rank among the slots of e in its block
Integer arithmetic in a fixed order: the plan does not depend on who runs when.

N tokens, E experts, K experts per token.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from heiretsu.kernels.gpu.launch import Tiles, on_every_gpu

# By the number of experts and one: a program holds a one-hot row for each of its slots.
TILES = Tiles(
    "routing_plan",
    on_every_gpu(
        {
            16: dict(BLOCK=256, num_warps=4, num_stages=1),
            64: dict(BLOCK=128, num_warps=4, num_stages=1),
            256: dict(BLOCK=32, num_warps=4, num_stages=1),
            2048: dict(BLOCK=8, num_warps=4, num_stages=1),
        }
    )
    | {"interpreter": {None: dict(BLOCK=64, num_warps=4, num_stages=1)}},
)


class RoutingPlan(NamedTuple):
    """Rows sorted by expert, as device tensors.

    order: (N * K,) int32: the slot n * K + k that each row works for. Rows of one expert keep the order of their slots;
        slots whose expert index is outside 0..E-1 come behind all experts and belong to none.
    slot_rows: (N, K) int32: the row of each slot, the inverse of order; -1 for an index outside 0..E-1.
    offsets: (E + 1,) int32: expert e owns rows offsets[e] .. offsets[e + 1].
    """

    order: torch.Tensor
    slot_rows: torch.Tensor
    offsets: torch.Tensor

    @property
    def top_k(self) -> int:
        return self.slot_rows.shape[1]


@triton.jit
def _one_hot(experts_ptr, num_slots, num_experts, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """(slots of this program, their experts one-hot); an index outside 0..E-1 counts as expert E."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.load(experts_ptr + slots, mask=slots < num_slots, other=0)
    experts = tl.where((experts >= 0) & (experts < num_experts), experts, num_experts)
    one_hot = (experts[:, None] == tl.arange(0, E_PAD)[None, :]) & (slots < num_slots)[:, None]
    return slots, one_hot.to(tl.int32)


@triton.jit
def _count_kernel(
    experts_ptr,  # (N * K,) int
    counts_ptr,  # (E + 1, blocks) int32
    num_slots, num_experts, num_blocks, E_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, one_hot = _one_hot(experts_ptr, num_slots, num_experts, E_PAD, BLOCK)
    e = tl.arange(0, E_PAD)
    tl.store(counts_ptr + e.to(tl.int64) * num_blocks + tl.program_id(0), tl.sum(one_hot, 0), mask=e <= num_experts)


@triton.jit
def _place_kernel(
    experts_ptr,  # (N * K,) int
    counts_ptr,  # (E + 1, blocks) int32
    ends_ptr,  # (E + 1, blocks) int32
    order_ptr,  # (N * K,) int32
    slot_rows_ptr,  # (N * K,) int32
    offsets_ptr,  # (E + 1,) int32
    num_slots, num_experts, num_blocks, E_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slots, one_hot = _one_hot(experts_ptr, num_slots, num_experts, E_PAD, BLOCK)
    e = tl.arange(0, E_PAD)
    at = e.to(tl.int64) * num_blocks + block
    start = tl.load(ends_ptr + at, mask=e <= num_experts, other=0)
    start -= tl.load(counts_ptr + at, mask=e <= num_experts, other=0)
    rank = tl.cumsum(one_hot, 0) - 1
    rows = tl.sum(one_hot * (start[None, :] + rank), 1)
    tl.store(order_ptr + rows, slots, mask=slots < num_slots)
    lost = tl.sum(one_hot * (e == num_experts)[None, :].to(tl.int32), 1) > 0
    tl.store(slot_rows_ptr + slots, tl.where(lost, -1, rows), mask=slots < num_slots)
    if block == 0:  # expert e begins where its first block does
        tl.store(offsets_ptr + e, start, mask=e <= num_experts)


def make_plan(experts: torch.Tensor, num_experts: int) -> RoutingPlan:
    """The plan for experts (N, K), N * K > 0."""
    experts = experts.contiguous()
    device, num_slots = experts.device, experts.numel()
    chosen = TILES.parameters(device, num_experts + 1)
    num_blocks = triton.cdiv(num_slots, chosen["BLOCK"])
    int32: dict = dict(dtype=torch.int32, device=device)
    counts = torch.empty(num_experts + 1, num_blocks, **int32)
    plan = RoutingPlan(
        torch.empty(num_slots, **int32), torch.empty(experts.shape, **int32), torch.empty(num_experts + 1, **int32)
    )
    grid, sizes, E_PAD = (num_blocks,), (num_slots, num_experts, num_blocks), triton.next_power_of_2(num_experts + 1)
    chosen.launch(_count_kernel, grid, experts, counts, *sizes, E_PAD=E_PAD)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    chosen.launch(_place_kernel, grid, experts, counts, ends, *plan, *sizes, E_PAD=E_PAD)
    return plan
