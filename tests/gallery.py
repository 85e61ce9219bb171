"""The gallery of planted faults: each a real bug of this field, each caught by a named check.

    python -m tests.gallery

plants one after the other in a small run, and prints which checks of tests/training.py (or of the schedule, the tokens,
the initial values or the norm alone) caught it. A harness that has never failed proves nothing.
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from heiretsu.data import batches as batches_module
from heiretsu.data import prepare as prepare_module
from heiretsu.data.shards import read_shard, write_shard
from heiretsu.model import moe, seeding
from heiretsu.parallel import collectives, engine, expert, metrics, placement, tensor, updater
from heiretsu.parallel.data import GradientAverager
from heiretsu.parallel.mesh import REPLICAS, Mesh, abstract_mesh
from heiretsu.parallel.schedules import SCHEDULES, lower, simulate
from heiretsu.parallel.schedules.one_f_one_b import one_f_one_b
from heiretsu.run import batches
from heiretsu.run import building as build
from tests.ranks import RankError, run_ranks
from tests.training import DENSE, MIXTURE, Trace, failures, run_config, run_steps, single_process

STEPS, TOLERANCE = 3, 1e-9
Plant = Callable[[Mesh], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Fault:
    """plant: a context in which the fault is there, made on every rank. caught_by: the check that must name it."""

    plant: Plant
    caught_by: str
    mesh: dict[str, int] = field(default_factory=dict)
    mixture: bool = False
    overflow_at: tuple[int, ...] = ()


# What is planted


def exchange_outside_autograd(mesh):
    def detached(x, send_counts, receive_counts, axis):
        return collectives._all_to_all(x.detach(), send_counts, receive_counts, axis)

    return patch.object(expert, "all_to_all", detached)


def replicated_weights_seeded_per_tp_rank(mesh):
    real = build.initialise
    return patch.object(build, "initialise", lambda stage, table, seed: real(stage, table, seed + mesh.tp.index))


def local_gradient_norm(mesh):
    def exchange(sums, told, world):
        totals, by_rank = metrics.exchange(sums, told, world)
        return [sums[0].tolist(), *totals[1:]], by_rank

    return patch.object(engine, "exchange", exchange)


def found_inf_not_shared(mesh):
    real = updater.Updater.apply

    def apply(self, squares, num_not_finite):
        bad = sum(not grad.isfinite().all() for grad in self.grads.values())
        return real(self, squares if math.isfinite(squares) else 1.0, bad)

    return patch.object(updater.Updater, "apply", apply)


def untied_head_under_pp(mesh):
    return patch.object(placement.Placement, "shared_axis", None)


def expert_gradients_averaged_over_dp_only(mesh):
    return patch.object(placement.Placement, "divisor", property(lambda place: place.reduce_axis.size))


def dense_gradient_not_averaged_over_ep(mesh):
    return patch.object(placement.Placement, "reduce_axis", property(lambda place: place.mesh.dp))


def ep_ranks_reading_one_batch(mesh):
    real = batches.read_batches

    def read(config, mesh, data, step):
        return real(config, replace(mesh, joint={REPLICAS: mesh.dp}), data, step)

    return patch.object(batches, "read_batches", read)


def last_microbatch_reported_as_the_mean(mesh):
    real = metrics.Totals.add

    def add(totals, given):
        real(totals, given)
        if "loss" in given:
            totals.given["loss"] = [given["loss"].detach()] * 4  # of 4 microbatches

    return patch.object(metrics.Totals, "add", add)


def dx_all_reduce_left_out(mesh):
    return patch.object(tensor, "column_linear", lambda x, weight, axis: F.linear(x, weight))


def gate_gradients_not_summed_over_tp(mesh):
    real = moe.copy_to
    return patch.object(moe, "copy_to", lambda x, axis: x if x.shape[-1] == MIXTURE.top_k else real(x, axis))


def bias_added_before_the_row_parallel_reduce(mesh):
    def forward(layer, x):
        return tensor.reduce_from(F.linear(x, layer.weight, layer.bias), layer.tp)

    return patch.object(tensor.RowParallelLinear, "forward", forward)


def expert_bias_added_on_every_tp_rank(mesh):
    return patch.object(moe, "once", lambda bias, tp: bias)


def every_microbatch_reduced_again(mesh):
    def accumulated(averager, name):
        dist.all_reduce(averager.params[name].grad, group=averager.table[name].reduce_axis.group)

    unlaunched = patch.object(GradientAverager, "_launch", lambda averager, only_ready: None)
    return _both(patch.object(GradientAverager, "_accumulated", accumulated), unlaunched)


def wrong_1f1b_warm_up_count(mesh):
    """One forward too few before the first backward: right results, and a pipeline that waits."""

    def warm_up_short(num_ranks, num_microbatches):
        short = one_f_one_b(num_ranks, num_microbatches)[1:] + one_f_one_b(1, num_microbatches)
        return [[action._replace(stage=rank) for action in actions] for rank, actions in enumerate(short)]

    return patch.dict(SCHEDULES, {"1f1b": warm_up_short})


def header_read_as_tokens(mesh):
    return patch.object(batches_module, "read_shard", lambda path: np.fromfile(path, dtype="<u2"))


def byte_order_mark_read_as_text(mesh):
    return patch.object(prepare_module.codecs, "BOM_UTF8", b"")


def initial_values_in_the_default_dtype(mesh):
    def drawn(place, seed):
        return torch.empty(place.spec.shape).normal_(generator=torch.Generator().manual_seed(seed))

    return patch.object(seeding, "initial_value", drawn)


def gradient_norm_in_one_long_sum(mesh):
    return patch.object(updater, "BLOCK", 2**40)


@contextlib.contextmanager
def _both(first, second) -> Iterator[None]:
    with first, second:
        yield


FAULTS: dict[str, Fault] = {
    "exchange outside autograd": Fault(exchange_outside_autograd, "gradients", {"ep": 2}, mixture=True),
    "replicated weights seeded per tp rank": Fault(
        replicated_weights_seeded_per_tp_rank, "copies of parameters", {"tp": 2}
    ),
    "local gradient norm": Fault(local_gradient_norm, "gradient norm", {"tp": 2}),
    "found_inf not shared": Fault(found_inf_not_shared, "agreed skip", {"pp": 2}, overflow_at=(1,)),
    "untied head under pp": Fault(untied_head_under_pp, "copies of gradients", {"pp": 2}),
    "expert gradients averaged over dp only": Fault(
        expert_gradients_averaged_over_dp_only, "gradients", {"ep": 2}, mixture=True
    ),
    "dense gradient not averaged over ep": Fault(
        dense_gradient_not_averaged_over_ep, "copies of gradients", {"ep": 2}, mixture=True
    ),
    "ep ranks reading one batch": Fault(ep_ranks_reading_one_batch, "loss", {"ep": 2}, mixture=True),
    "last microbatch reported as the mean": Fault(last_microbatch_reported_as_the_mean, "loss", {"pp": 2}),
    "dx all-reduce left out": Fault(dx_all_reduce_left_out, "gradients", {"tp": 2}),
    "gate gradients not summed over tp": Fault(gate_gradients_not_summed_over_tp, "gradients", {"tp": 2}, mixture=True),
    "bias added before the row-parallel reduce": Fault(bias_added_before_the_row_parallel_reduce, "loss", {"tp": 2}),
    "expert bias added on every tp rank": Fault(expert_bias_added_on_every_tp_rank, "loss", {"tp": 2}, mixture=True),
    "every microbatch reduced again": Fault(every_microbatch_reduced_again, "gradients", {"dp": 2}),
    "wrong 1F1B warm-up count": Fault(wrong_1f1b_warm_up_count, "bubble of the schedule"),
    "header read as tokens": Fault(header_read_as_tokens, "tokens of a shard"),
    "byte order mark read as text": Fault(byte_order_mark_read_as_text, "tokens of a text"),
    "initial values in the default dtype": Fault(initial_values_in_the_default_dtype, "initial values"),
    "gradient norm in one long sum": Fault(gradient_norm_in_one_long_sum, "norm of many numbers"),
}


# The checks


def check(name: str | None, fault: Fault, ranks: Callable) -> dict[str, str]:
    """What the checks find, {check: message}, with the fault planted; with name None, without it. ranks: what
    runs a function on a mesh."""
    config = run_config(MIXTURE if fault.mixture else DENSE, microbatches=4, **fault.mesh)
    if not fault.mesh:
        with fault.plant(None) if name else contextlib.nullcontext():
            return schedule_check() | shard_check() | text_check() | defaults_check() | norm_check()
    try:
        traces = ranks(run_with_fault, name, config, fault.overflow_at, **fault.mesh)
    except RankError as error:
        return {"exception": str(error).strip().splitlines()[-1]}
    return failures(traces, single_process(config, STEPS, overflow_at=fault.overflow_at), TOLERANCE)


def run_with_fault(mesh: Mesh, name: str | None, config, overflow_at) -> Trace:
    with FAULTS[name].plant(mesh) if name else contextlib.nullcontext():
        return run_steps(mesh, config, STEPS, overflow_at=overflow_at)


def schedule_check(stages: int = 4, microbatches: int = 8) -> dict[str, str]:
    """1F1B waits for (p - 1) / (m + p - 1) of the time, and stage s holds p - s microbatches at most."""
    timeline = simulate(lower(SCHEDULES["1f1b"](stages, microbatches)), forward_cost=1.0, backward_cost=2.0)
    expected = (stages - 1) / (microbatches + stages - 1)
    found = {}
    if abs(timeline.bubble - expected) > 1e-12:
        found["bubble of the schedule"] = f"{timeline.bubble:.3f} of the time, not {expected:.3f}"
    if timeline.peak_activations != [stages - stage for stage in range(stages)]:
        found["activations of the schedule"] = f"{timeline.peak_activations} microbatches held"
    return found


def shard_check() -> dict[str, str]:
    """The windows of a shard, side by side, are the tokens that were written."""
    tokens = np.arange(8 * 16 + 1, dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train_000000.bin"
        write_shard(path, tokens)
        data = batches_module.TokenDataset([path], block_size=16, seed=0, vocab_size=2**16)
        read = sorted(data.eval_batch(range(data.num_windows))[0].flatten().tolist())
    if read != tokens[:-1].tolist():
        return {"tokens of a shard": f"{len(read)} tokens from {read[0]} to {read[-1]}, not {len(tokens) - 1} from 0"}
    return {}


def text_check() -> dict[str, str]:
    """A text that begins with a byte order mark has the tokens of what follows it."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_bytes(b"\xef\xbb\xbfabc")
        prepare_module.prepare([text], Path(folder) / "out", "bytes", val_files=[text])
        read = read_shard(Path(folder) / "out" / "train_000000.bin").tolist()
    return {} if read == [256, *b"abc"] else {"tokens of a text": f"{read}, not the end of text and {[*b'abc']}"}


def defaults_check() -> dict[str, str]:
    """Initial values are the same whatever torch's default dtype is."""
    place = placement.Placement("weight", placement.Spec((8, 8), partial_over=("dp",), std=1.0), abstract_mesh())
    drawn = {}
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            drawn[dtype] = seeding.initial_value(place, seed=1)
        finally:
            torch.set_default_dtype(torch.float32)
    ours, theirs = drawn.values()
    same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return {} if same else {"initial values": f"{theirs.dtype} under a default of float64"}


def norm_check() -> dict[str, str]:
    """The norm of three million equal float32, whose sum in float32 is off by a tenth of a percent."""
    ours, exact = updater.two_norm(torch.full((3_000_000,), 0.1)).item(), 0.1 * math.sqrt(3_000_000)
    return {} if abs(ours / exact - 1) < 1e-5 else {"norm of many numbers": f"{ours}, not {exact}"}


def main() -> int:
    missed = 0
    for name, fault in FAULTS.items():
        found = check(name, fault, run_ranks)
        caught = fault.caught_by in found
        missed += not caught
        where = "x".join(f"{axis}{size}" for axis, size in fault.mesh.items()) or "one process"
        verdict = f"caught by {', '.join(sorted(found))}" if caught else f"MISSED by {fault.caught_by} ({found})"
        print(f"{name} ({where}): {verdict}\n    {found.get(fault.caught_by, '')}", flush=True)
    print(f"{len(FAULTS) - missed} of {len(FAULTS)} planted faults caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
