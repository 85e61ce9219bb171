"""Tensor-parallel layers where a run does not show them: large logits, and work that hides a sum."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from heiretsu.kernels import plain
from heiretsu.parallel import tensor
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.tensor import ColumnParallelLinear, VocabParallelEmbedding

VOCAB, PADDED, WIDTH = 6, 8, 2  # of two shards, the second has two rows of padding


def large_head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and targets with logits up to 1e4 and down to -1e4, whose exponentials float64 cannot hold."""
    x = torch.tensor([[1e4, 0.0], [0.0, 1e4], [-1e4, 1.0], [1.0, 2.0]])
    weight = torch.tensor([[1.0, 0.5], [0.9999, -1.0], [0.0, 0.0], [-1.0, 1.0], [1.0, 0.4999], [0.5, 1.0]])
    return x.double(), weight.double(), torch.tensor([0, 5, 2, 4])


def losses_and_gradient(mesh):
    x, weight, targets = large_head()
    head = VocabParallelEmbedding(mesh, VOCAB, PADDED, WIDTH, 0.02, torch.float64)
    with torch.no_grad():
        head.weight.zero_()[: head.num_local_rows] = weight[head.start : head.start + head.num_local_rows]
    x.requires_grad_()
    losses = head.cross_entropy(x, targets, plain)
    losses.sum().backward()
    return losses.detach(), x.grad


def test_shards_of_logits_of_ten_thousand_make_the_whole_loss(ranks):
    x, weight, targets = large_head()
    x.requires_grad_()
    expected = F.cross_entropy(x @ weight.T, targets, reduction="none")
    expected.sum().backward()
    assert expected.max() > 1e4
    for losses, dx in ranks(losses_and_gradient, tp=2):
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-9, atol=1e-11)  # an ulp of 1e4 is 2e-12
        torch.testing.assert_close(dx, x.grad, rtol=1e-9, atol=1e-11)


class Products(TorchDispatchMode):
    """Notes each matrix product in a list of events."""

    def __init__(self, events: list[str]):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.events.append("product")
        return func(*args, **(kwargs or {}))


class Watched:
    """A collective under way, and when it was waited for."""

    def __init__(self, work, events: list[str]):
        self.work, self.events = work, events

    def wait(self):
        self.events.append("wait")
        return self.work.wait()


def backward_of_a_column(mesh):
    events: list[str] = []
    layer = ColumnParallelLinear(mesh, 4, 6, 0.02, torch.float64)
    x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    out, real = layer(x).sum(), dist.all_reduce

    def all_reduce(*args, **kwargs):
        events.append("sum")
        return Watched(real(*args, **kwargs), events)

    with patch.object(tensor.dist, "all_reduce", all_reduce), Products(events):
        out.backward()
    return events


def test_the_weights_gradient_is_computed_while_dx_is_being_summed(ranks):
    for events in ranks(backward_of_a_column, tp=2):
        assert events == ["product", "sum", "product", "wait"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_of_padding_alone_adds_zeros_of_the_activations_dtype(monkeypatch, dtype):
    monkeypatch.setattr(tensor, "reduce_from", lambda rows, tp: rows)
    embedding = VocabParallelEmbedding(abstract_mesh(tp=4, rank=3), 9, 16, WIDTH, 0.02, torch.float32)
    assert embedding.num_local_rows == 0
    rows = embedding(torch.tensor([[0, 8, 3]]), dtype)
    assert rows.dtype == dtype and rows.shape == (1, 3, WIDTH) and not rows.any()
    rows.sum().backward()
    assert embedding.weight.grad is not None and not embedding.weight.grad.any()


def test_the_sum_of_dx_is_sent_first_and_waited_for_as_for_other_ranks():
    """A straggler's own time is a step's without what it waits: see activity.py."""
    events = []

    class Pending:
        def wait(self):
            events.append("waited")

    def all_reduce(dx, group, async_op):
        assert async_op
        events.append("sent")
        return Pending()

    def region(name, waits=False):
        events.append((name, waits))
        return nullcontext()

    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    weight.register_hook(lambda grad: events.append("weight"))
    with patch.object(tensor.dist, "all_reduce", all_reduce), patch.object(tensor, "region", region):
        tensor.column_linear(x, weight, abstract_mesh(tp=2).tp).sum().backward()
    assert events == ["sent", ("all-reduce tp", True), "waited", "weight"]
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(5, 4))
