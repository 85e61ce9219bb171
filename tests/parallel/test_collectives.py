"""What each collective gives, forward and backward, on strided tensors too; and nothing at all over an axis of one."""

import torch
import torch.distributed as dist

from heiretsu.parallel import collectives, metrics
from heiretsu.parallel.collectives import all_reduce, all_to_all, copy_to, gather_objects, reduce_from
from heiretsu.parallel.expert import combine, dispatch
from heiretsu.parallel.mesh import Axis
from heiretsu.parallel.metrics import exchange


def test_over_an_axis_of_one_each_is_the_identity():
    one, x = Axis("tp"), torch.randn(3, 2, requires_grad=True)
    assert copy_to(x, one) is x and reduce_from(x, one) is x and all_to_all(x, [3], [3], one) is x
    summed = all_reduce(x.T, one)
    assert torch.equal(summed, x.T) and summed.is_contiguous() and not summed.requires_grad
    assert summed.data_ptr() != x.data_ptr()
    assert exchange([torch.tensor([1.5, 2.0]).double()], [3, 0.5], one) == ([[1.5, 2.0]], [(3, 0.5)])
    assert gather_objects("x", one) == ["x"]


def test_a_rank_says_that_it_waits_for_others_while_it_does(monkeypatch):
    """In the record that names who waits, and in what, when a run stands still."""
    entered = []

    class Region:
        def __init__(self, name, waits=False):
            entered.append((name, waits))

        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    for module in (collectives, metrics):
        monkeypatch.setattr(module, "region", Region)
    for name in ("all_reduce", "all_gather_object", "all_to_all_single"):
        monkeypatch.setattr(dist, name, lambda *_, **__: entered.append("waits"))
    two, x = Axis("tp", 2), torch.zeros(2)
    inside = ["in", "waits", "out"]
    read = [("all-reduce tp", True), "in", "out"]
    for call, expected in (
        (lambda: all_reduce(x, two), [("all-reduce tp", True), *inside]),
        (lambda: exchange([x.double()], [1.0], two), [("all-reduce tp", True), *inside, *read]),
        (lambda: gather_objects(1, two), [("gather over tp", True), *inside]),
        (lambda: all_to_all(x, [1, 1], [1, 1], two), [("all-to-all tp", True), *inside]),
    ):
        entered.clear()
        call()
        assert entered == expected


def every_collective(mesh):
    axis, rank = mesh.tp, mesh.rank
    x = (torch.arange(6.0).view(2, 3) + 10 * rank).T.requires_grad_()  # (3, 2), not contiguous
    found = {"sum": all_reduce(x, axis), "largest": all_reduce(x, axis, dist.ReduceOp.MAX)}
    assert found["sum"].data_ptr() != x.data_ptr() and not found["sum"].requires_grad
    weight = torch.tensor([1.0, 2.0]) * (rank + 1)
    for name, collective in (("copy", copy_to), ("reduce", reduce_from)):
        y = collective(x, axis)
        found[name] = y.detach().clone()
        (found[f"gradient of {name}"],) = torch.autograd.grad((y * weight).sum(), x)
    send, receive = ([1, 2], [1, 0]) if rank == 0 else ([0, 3], [2, 3])
    y = all_to_all(x, send, receive, axis)
    found["exchange"] = y.detach().clone()
    (found["gradient of exchange"],) = torch.autograd.grad((y * weight).sum(), x)
    sums = [torch.tensor(numbers, dtype=torch.float64) for numbers in ([1 / 3, 1e9 + rank], [2.0])]
    found["numbers"] = exchange(sums, [0.5 + rank, 7], axis)
    found["no news"] = exchange(sums[1:], [], axis)
    found["objects"] = gather_objects(("rank", rank), axis)
    return found


def test_two_ranks_by_hand(ranks):
    first, second = ranks(every_collective, tp=2)
    base = torch.arange(6.0).view(2, 3).T
    for rank, found in enumerate((first, second)):
        mine = torch.tensor([1.0, 2.0]) * (rank + 1)
        assert torch.equal(found["sum"], 2 * base + 10) and torch.equal(found["largest"], base + 10)
        assert torch.equal(found["copy"], base + 10 * rank)
        assert torch.equal(found["gradient of copy"], torch.tensor([3.0, 6.0]).expand(3, 2))
        assert torch.equal(found["reduce"], 2 * base + 10)
        assert torch.equal(found["gradient of reduce"], mine.expand(3, 2))
        sums, told = found["numbers"]
        assert sums == [[2 / 3, 2e9 + 1], [4.0]] and told == [(0.5, 7), (1.5, 7)]  # more than float32 holds
        assert found["no news"] == ([[4.0]], [(), ()])
        assert found["objects"] == [("rank", 0), ("rank", 1)]
    assert torch.equal(first["exchange"], base[:1])
    assert torch.equal(second["exchange"], torch.cat([base[1:], base + 10]))
    assert torch.equal(first["gradient of exchange"], torch.tensor([[1.0, 2.0], [2.0, 4.0], [2.0, 4.0]]))
    assert torch.equal(second["gradient of exchange"], torch.tensor([2.0, 4.0]).expand(3, 2))


def there_and_back(mesh):
    """Tokens (rank, number) to the experts of both ranks, none of them to expert 1."""
    tokens = torch.tensor([[mesh.rank, i] for i in range(3)], dtype=torch.float64)
    experts = torch.tensor([[3, 0], [0, 2], [2, 3]])
    gates = torch.tensor([[0.5, 0.25]] * 3, dtype=torch.float64)
    there = dispatch(tokens, experts, gates, 4, mesh.ep)
    assert (there.gates == 1).all() and there.gates.shape == there.experts.shape
    served = there.rows * 10.0 ** (there.experts + 2 * mesh.rank)
    return there.rows, there.experts.flatten(), combine(served, there, mesh.ep)


def test_tokens_travel_to_their_experts_and_come_back_weighed(ranks):
    for rank, (rows, experts, home) in enumerate(ranks(there_and_back, ep=2)):
        of_a_rank = [[0, 1], [1, 2, 0, 2]][rank]  # by expert, and in their order for one expert
        assert rows.tolist() == [[sender, token] for sender in (0, 1) for token in of_a_rank]
        assert experts.tolist() == [[0, 0], [0, 0, 1, 1]][rank] * 2
        weights = torch.tensor([0.5 * 1000 + 0.25, 0.5 + 0.25 * 100, 0.5 * 100 + 0.25 * 1000])
        tokens = torch.tensor([[rank, i] for i in range(3)])
        assert torch.allclose(home, (tokens * weights[:, None]).double(), rtol=1e-12)
