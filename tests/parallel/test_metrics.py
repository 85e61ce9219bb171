"""What is told of a step: shares that add up by each metric's rule, in one all-reduce and one read of the host."""

from collections import Counter
from contextlib import ExitStack
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist

from heiretsu.kernels import plain
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.metrics import Metric, Totals, widened
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from tests.training import DENSE, dataset, run_config

DECLARED = {"mean": Metric(), "counts": Metric((2, 3), "sum"), "not mine": Metric((2,))}


def totals_of(values):
    totals = Totals(DECLARED)
    for value in values:
        totals.add({"mean": torch.tensor(value), "counts": torch.ones(2, 3, dtype=torch.long)})
    return totals


def test_a_rank_has_its_part_of_a_mean_the_whole_of_its_counts_and_zeros_for_the_rest():
    mean, counts, rest = totals_of([1.5, 2.5, 4.0]).shares(3, abstract_mesh(dp=2, ep=2))
    assert mean.tolist() == [8.0 / (3 * 4)] and counts.tolist() == [3.0] * 6 and rest.tolist() == [0.0, 0.0]
    assert {share.dtype for share in (mean, counts, rest)} == {torch.float64}


def test_of_ranks_that_hold_copies_the_first_counts():
    for rank, share in ((0, [2.0]), (1, [0.0])):
        assert totals_of([2.0]).shares(1, abstract_mesh(tp=2, rank=rank))[0].tolist() == share


def test_microbatches_are_added_in_their_order_in_float64():
    values = [1e16, 1.0, 1.0, -1e16] + [0.1] * 60
    totals = Totals(DECLARED)
    for value in values:
        totals.add({"mean": torch.tensor(value, dtype=torch.float64)})
    assert totals.shares(1, abstract_mesh())[0].item() == sum(values)
    assert totals_of([2.0**24, 1.0]).shares(1, abstract_mesh())[0].item() == 2**24 + 1  # more than float32 holds


def test_what_is_not_finite_is_named_and_what_was_not_declared_refused():
    assert totals_of([1.0]).not_finite() == []
    assert totals_of([1.0, torch.inf, 2.0]).not_finite() == ["mean"]
    with pytest.raises(AssertionError, match="counts is"):
        Totals(DECLARED).add({"counts": torch.ones(3)})
    with pytest.raises(KeyError):
        Totals(DECLARED).add({"another": torch.ones(())})


COLLECTIVES = """all_reduce reduce broadcast all_gather all_gather_into_tensor reduce_scatter_tensor barrier
    all_to_all_single all_gather_object gather_object broadcast_object_list scatter_object_list""".split()
READS = "tolist item cpu numpy __bool__ __float__ __int__ __index__".split()


def asked_in_a_step(mesh, config):
    """How often a step, and then an evaluation, asked the others and read from the device; and its number of
    buckets that have peers."""
    engine = build_engine(config, mesh, plain)
    batches = read_batches(config, mesh, dataset(67, 8), 0)
    engine.step(batches)
    found = []
    for work in (engine.step, engine.evaluate):
        asked: Counter[str] = Counter()

        def counted(real, name, asked=asked):
            def call(*args, **kwargs):
                asked[name] += 1
                return real(*args, **kwargs)

            return call

        with ExitStack() as patched:
            for owner, names in ((dist, COLLECTIVES), (torch.Tensor, READS)):
                for name in names:
                    patched.enter_context(patch.object(owner, name, counted(getattr(owner, name), name)))
            work(batches)
        found.append(dict(asked))
    return found, sum(bucket.axis.size > 1 for bucket in engine.updater.averager.buckets)


@pytest.mark.parametrize("mesh", [{"dp": 2}, {"pp": 2}], ids=["dp2", "pp2"])
def test_a_step_tells_everything_in_one_all_reduce_and_one_read(ranks, mesh):
    """Besides the gradients: a bucket each, and with a pipeline the embedding that its two ends share."""
    for (step, evaluation), num_buckets in ranks(asked_in_a_step, run_config(DENSE, microbatches=2, **mesh), **mesh):
        assert step == {"all_reduce": num_buckets + ("pp" in mesh) + 1, "tolist": 1}
        assert evaluation == {"all_reduce": 1, "tolist": 1}


def test_one_process_reads_once_and_asks_nobody():
    (step, evaluation), _ = asked_in_a_step(abstract_mesh(), run_config(DENSE, microbatches=2))
    assert step == evaluation == {"tolist": 1}


def test_several_stages_on_one_rank_are_refused():
    engine = build_engine(run_config(DENSE), abstract_mesh(), plain)
    with pytest.raises(ValueError, match="2 stages on one rank"):
        Engine([*engine.stages, *engine.stages], abstract_mesh(), [engine.actions], engine.updater)


def test_sums_are_widened_on_the_cpu_where_a_device_has_no_float64():
    apple = Mock()
    apple.device.type = "mps"
    assert widened(apple) is apple.cpu().double() and not apple.double.called
    x = torch.ones(2, dtype=torch.bfloat16)
    assert widened(x).dtype == torch.float64
