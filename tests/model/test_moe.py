"""The balance loss by hand, and routing that does not depend on how sequences are grouped."""

import pytest
import torch

from heiretsu.model.moe import balance_loss


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
