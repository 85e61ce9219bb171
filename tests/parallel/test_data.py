"""Gradient buckets: sent once a step, in one order, while backward is still running."""

import contextlib
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist

from heiretsu.kernels import plain
from heiretsu.parallel import data as data_parallel
from heiretsu.parallel.mesh import REPLICAS, abstract_mesh
from heiretsu.parallel.placement import Placement, Spec
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from tests.training import DENSE, MIXTURE, dataset, run_config


def recorded(mesh, config, bucket_bytes):
    """(what happened in one step, in order; sizes of the buckets with peers): gradients accumulated, buckets sent and
    waited for."""
    events = []
    real = dist.all_reduce

    class Watched:
        def __init__(self, work, size):
            self.work, self.size = work, size

        def wait(self):
            events.append(("waited for", self.size))
            return self.work.wait()

    def all_reduce(tensor, *args, **kwargs):
        events.append(("sent", tensor.numel()))
        return Watched(real(tensor, *args, **kwargs), tensor.numel())

    engine = build_engine(config, mesh, plain)
    averager = engine.updater.averager = data_parallel.GradientAverager(engine.params, engine.table, bucket_bytes)
    for name, param in engine.params.items():
        param.register_post_accumulate_grad_hook(lambda _, name=name: events.append(("ready", name)))
    batches = read_batches(config, mesh, dataset(67, 8), 0)
    with patch.object(data_parallel.dist, "all_reduce", all_reduce):
        engine.accumulate(batches)
    sizes = [bucket.flat.numel() for bucket in averager.buckets if bucket.axis.size > 1]
    return events, sizes


def test_each_bucket_is_sent_once_a_step_and_most_before_backward_ends(ranks):
    config = run_config(DENSE, microbatches=4, dp=2)
    (events, sizes), (others, _) = ranks(recorded, config, 4096, dp=2)
    sent = [size for kind, size in events if kind == "sent"]
    assert len(sizes) > 4 and sent == sizes
    assert [event for event in others if event[0] == "sent"] == [event for event in events if event[0] == "sent"]
    last_gradient = max(i for i, (kind, _) in enumerate(events) if kind == "ready")
    early = sum(kind == "sent" for kind, _ in events[:last_gradient])
    assert early >= len(sizes) // 2
    waited = [i for i, (kind, _) in enumerate(events) if kind == "waited for"]
    assert len(waited) == len(sizes) and waited[0] > last_gradient  # nothing stands still while backward runs
    microbatch_ends = [i for i, (kind, name) in enumerate(events) if (kind, name) == ("ready", "wte.weight")]
    assert len(microbatch_ends) == 4
    assert not any(kind == "sent" for kind, _ in events[: microbatch_ends[2]])  # nothing before the last microbatch


def grads_are_views(mesh, config):
    engine = build_engine(config, mesh, plain)
    engine.accumulate(read_batches(config, mesh, dataset(67, 8), 0))
    return {
        name: any(
            param.grad.untyped_storage().data_ptr() == bucket.flat.untyped_storage().data_ptr()
            for bucket in engine.updater.averager.buckets
        )
        for name, param in engine.params.items()
    }


def test_gradients_stay_views_of_their_buckets(ranks):
    for views in ranks(grads_are_views, run_config(MIXTURE, microbatches=2, ep=2), ep=2):
        assert all(views.values()), [name for name, is_view in views.items() if not is_view]


def test_a_bucket_holds_one_kind_and_about_so_many_bytes():
    mesh = abstract_mesh(dp=2, ep=2)
    engine = build_engine(run_config(MIXTURE, microbatches=2, dp=2, ep=2), mesh, plain)
    buckets = data_parallel._group(engine.params, engine.table, 8192)
    assert sorted(name for bucket in buckets for name in bucket) == sorted(engine.params)
    for bucket in buckets:
        assert len({engine.table[name].spec.partial_over for name in bucket}) == 1
        all_but_last = sum(engine.params[name].numel() * 8 for name in bucket[:-1])
        assert all_but_last < 8192
    assert buckets[-1] == ["wte.weight"] or buckets[-2] == ["wte.weight"]


def test_a_bucket_is_full_once_it_holds_its_bytes():
    """A parameter of just so many bytes fills one by itself; with one byte more allowed, the next one joins it."""
    params = {name: torch.nn.Parameter(torch.zeros(8, dtype=torch.float32)) for name in "abcd"}
    mesh = abstract_mesh()
    shared = {"d": "ends"}
    table = {n: Placement(n, Spec((8,), partial_over=REPLICAS, shared_over=shared.get(n)), mesh) for n in params}
    assert data_parallel._group(params, table, 32) == [["c"], ["b"], ["a"], ["d"]]
    assert data_parallel._group(params, table, 33) == [["c", "b"], ["a"], ["d"]]
    assert data_parallel._group(params, table, 10_000) == [["c", "b", "a"], ["d"]]
    large = {name: torch.nn.Parameter(torch.empty(10 * 2**18, device="meta")) for name in params}  # 10 MiB
    assert data_parallel._group(large, table, data_parallel.BUCKET_BYTES) == [["c", "b", "a"], ["d"]]
    larger = {name: torch.nn.Parameter(torch.empty(13 * 2**18, device="meta")) for name in params}
    assert data_parallel._group(larger, table, data_parallel.BUCKET_BYTES) == [["c", "b"], ["a"], ["d"]]


def test_gradients_are_zeroed_scaled_and_left_alone_outside_of_a_step():
    params = {name: torch.nn.Parameter(torch.ones(2)) for name in "ab"}
    mesh = abstract_mesh()
    spec = Spec((2,), partial_over=REPLICAS)
    averager = data_parallel.GradientAverager(params, {n: Placement(n, spec, mesh) for n in params}, 1)
    (params["a"] * 3).sum().backward()  # before a first step
    averager.prepare(2)
    assert all((param.grad == 0).all() for param in params.values())
    for _ in range(2):
        (params["a"] * 3 + params["b"]).sum().backward()
    averager.finish()
    assert params["a"].grad.tolist() == [6, 6] and params["b"].grad.tolist() == [2, 2]
    averager.scale(0.5)
    assert params["a"].grad.tolist() == [3, 3] and params["b"].grad.tolist() == [1, 1]
    params["a"].sum().backward()  # after the last
    assert averager._next == len(averager.buckets) and params["a"].grad.tolist() == [4, 4]


def test_a_rank_says_that_it_waits_for_each_sum_and_keeps_nothing_of_it(monkeypatch):
    """Its record of what it does names who waits for whom, when a run stands still."""
    params = {name: torch.nn.Parameter(torch.ones(2)) for name in "ab"}
    mesh, did = abstract_mesh(dp=2, pp=2), []
    specs = {"a": Spec((2,), partial_over=("dp",)), "b": Spec((2,), partial_over=("dp",), shared_over="ends")}

    @contextlib.contextmanager
    def region(name, waits=False):
        did.append((name, waits))
        yield

    work = SimpleNamespace(wait=lambda: did.append("waited"))
    monkeypatch.setattr(data_parallel, "region", region)
    monkeypatch.setattr(data_parallel.dist, "all_reduce", lambda *_, **__: work)
    averager = data_parallel.GradientAverager(params, {n: Placement(n, spec, mesh) for n, spec in specs.items()})
    averager.prepare(1)
    (params["a"] + params["b"]).sum().backward()
    averager.finish()
    assert did == [("all-reduce dp", True), "waited"] * 2 + [("all-reduce ends", True)]
    assert [bucket.work for bucket in averager.buckets] == [None, None]
