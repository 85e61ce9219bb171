"""The balance loss by hand, what a model tells of it, and routing that does not depend on how sequences are grouped."""

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.model.config import ModelConfig
from heiretsu.model.gpt import GPT
from heiretsu.model.moe import balance_loss, once
from heiretsu.model.seeding import initialise
from heiretsu.parallel.mesh import Axis, abstract_mesh
from heiretsu.parallel.pipeline import Context, Microbatch
from heiretsu.parallel.placement import placement_table


def test_balance_loss_of_a_uniform_router_with_even_loads_is_one():
    experts = torch.tensor([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    loss, load = balance_loss(torch.zeros(1, 4, 4), experts)
    assert loss.item() == pytest.approx(1.0)
    assert load.tolist() == [2, 2, 2, 2]


def test_balance_loss_by_hand():
    logits = torch.tensor([[[2.0, 0.0], [1.0, 3.0], [0.5, 0.0]]], dtype=torch.float64)
    loss, load = balance_loss(logits, torch.tensor([[[0], [1], [0]]]))
    p0 = sum(1 / (1 + torch.tensor(-(a - b), dtype=torch.float64).exp()) for a, b in logits[0].tolist()) / 3
    assert loss.item() == pytest.approx((2 * (2 / 3 * p0 + 1 / 3 * (1 - p0))).item(), rel=1e-12)
    assert load.tolist() == [2, 1]


def test_balance_loss_is_the_mean_over_sequences():
    logits = torch.randn(6, 5, 4, dtype=torch.float64)
    experts = logits.topk(2).indices
    parts = [balance_loss(logits[i : i + 2], experts[i : i + 2])[0] for i in (0, 2, 4)]
    assert balance_loss(logits, experts)[0].item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-12)


def test_a_model_tells_the_mean_balance_loss_and_each_layers_tokens():
    """Of the mixture layers alone, each in its row; the objective is the loss and the weighted balance loss."""
    config = ModelConfig(vocab_size=67, block_size=8, n_layer=4, n_head=2, n_embed=16, num_experts=3, aux_loss_coef=0.5)
    model = GPT(config, abstract_mesh(), plain, dtype=torch.float64)
    initialise(model, placement_table(model, abstract_mesh()), seed=3)
    ids = torch.arange(16).view(2, 8)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in ("1", "3"):
        model.blocks[layer].mlp.register_forward_hook(lambda module, given, out: seen.append(out[1:]))
    hidden, objective, metrics = vars(model(None, Microbatch(ids, ids + 1))).values()
    assert hidden is None and metrics["loss"] > 0 and model.hidden_shape(Microbatch(ids, ids)) == (2, 8, 16)
    balances, loads = zip(*seen, strict=True)
    assert metrics["aux_loss"].item() == pytest.approx(sum(balances).item() / 2, rel=1e-12)
    assert metrics["expert_load"].tolist() == [load.tolist() for load in loads]
    assert metrics["expert_load"].sum(1).tolist() == [2 * 16] * 2
    assert objective.item() == pytest.approx((metrics["loss"] + 0.5 * metrics["aux_loss"]).item(), rel=1e-12)
    assert {name: (metric.shape, metric.rule) for name, metric in model.metrics.items()} == {
        "loss": ((), "mean"),
        "aux_loss": ((), "mean"),
        "expert_load": ((2, 3), "sum"),
    }


def test_a_bias_inside_a_partial_sum_is_on_one_rank_alone():
    bias = torch.tensor([2.0, 3.0])
    given = [once(bias, Axis("tp", 3, index, (0, 1, 2))).tolist() for index in range(3)]
    assert sum(map(torch.tensor, given)).tolist() == [2.0, 3.0] and given.count([0.0, 0.0]) == 2
    assert once(bias, Axis("tp")) is bias


@pytest.mark.parametrize(
    "dtype, compute, wide",
    [
        (torch.float64, None, torch.float64),
        (torch.float32, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_the_balance_loss_adds_up_in_float32_at_least(dtype, compute, wide):
    config = ModelConfig(vocab_size=67, block_size=8, n_layer=2, n_head=2, n_embed=16, num_experts=2)
    model = GPT(config, abstract_mesh(), plain, dtype=dtype, compute_dtype=compute)
    x, metrics = model.run_blocks(torch.zeros(1, 8, 16, dtype=compute or dtype), Context())
    assert x.dtype == model.hidden_dtype == (compute or dtype) and metrics["aux_loss"].dtype == wide
