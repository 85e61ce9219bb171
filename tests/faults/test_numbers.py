"""Numbers that are wrong on one rank: NaN and inf skip the step everywhere, copies that differ end the run."""

import math

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.parallel.replicas import digest, first_difference
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from tests.faults.launch import TINY, last_line, records, run_to_the_end
from tests.training import DENSE, MIXTURE, dataset, run_config


def engine_after(mesh, steps, model=DENSE, **sizes):
    config = run_config(model, microbatches=2, **sizes)
    engine, data = build_engine(config, mesh, plain), dataset(DENSE.vocab_size, DENSE.block_size)
    for step in range(steps):
        engine.step(read_batches(config, mesh, data, step))
    return config, engine, data


SPOILED = {  # value, in the loss or in the gradient alone, of rank 1
    "NaN in the gradient": ("ln_f.bias", math.nan),
    "inf in the gradient": ("ln_f.bias", math.inf),
    "NaN in the activations": ("ln_f.weight", math.nan),
}


def skipping_on(mesh, sizes):
    """By name of what is spoiled: whether parameters and moments stayed bitwise, and what the step's report said."""
    config, engine, data = engine_after(mesh, 1, **sizes)
    real, found = engine.updater.averager.finish, {}
    for name, (where, value) in SPOILED.items():
        before = {key: param.detach().clone() for key, param in engine.params.items()}
        moments = {
            key: engine.updater.optimizer.state[param]["exp_avg"].clone() for key, param in engine.params.items()
        }
        spoil = mesh.rank == 1 and where in engine.params

        def finish(spoil=spoil, where=where, value=value):
            real()  # before: a bucket may be under way already
            if spoil:
                engine.params[where].grad.flatten()[0] = value

        if "activations" in name and spoil:
            engine.params[where].data.fill_(value)
            before[where] = engine.params[where].detach().clone()
        engine.updater.averager.finish = finish if "gradient" in name else real
        report = engine.step(read_batches(config, mesh, data, 1))
        same = all(torch.equal(before[key].nan_to_num(7), param.nan_to_num(7)) for key, param in engine.params.items())
        same &= all(
            torch.equal(moments[key], engine.updater.optimizer.state[p]["exp_avg"]) for key, p in engine.params.items()
        )
        found[name] = same, report.skipped, report.not_finite
    return found


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"pp": 2}], ids=["dp2", "pp2"])
def test_bad_numbers_of_one_rank_skip_the_step_on_all(ranks, record_property, sizes):
    mesh = " ".join(f"{axis} {n}" for axis, n in sizes.items())
    record_property("fault", f"NaN and inf in a gradient, NaN in the activations of rank 1, {mesh}")
    zero, one = ranks(skipping_on, sizes, **sizes)
    record_property("outcome", "; ".join(f"{name}: skipped by all: {said}" for name, (_, _, said) in one.items()))
    for name in SPOILED:
        assert zero[name] == one[name] and one[name][:2] == (True, True), (name, zero, one)
    for name in ("NaN in the gradient", "inf in the gradient"):
        assert one[name][2] == "the gradient of ln_f.bias was not finite (rank 1)"
    everywhere = one["NaN in the activations"][2]  # of all that are not finite, the model's first parameter is named
    assert (
        everywhere.startswith("the gradient of wte.weight was not finite (rank 0") and "the loss (rank 1)" in everywhere
    )


@pytest.mark.full
def test_a_skip_is_logged_and_training_goes_on(tmp_path, record_property):
    record_property("fault", "NaN in the gradient of rank 1 in step 2, dp 2")
    log = tmp_path / "log"
    flags = [*TINY, "--dp", "2", "--max_iters", "4", "--log_file", str(log)]
    statuses, said = run_to_the_end(flags, 2, tmp_path, "gradient:1:2:nan")
    record_property("outcome", last_line(said, "skipped"))
    assert statuses == [0, 0] and [record["skipped"] for record in records(log)] == [False, True, False, False]
    assert "skipped: the gradient of ln_f.bias was not finite (rank 1)" in said


@pytest.mark.full
def test_too_many_skips_end_the_run_with_a_checkpoint(tmp_path, record_property):
    record_property("fault", "NaN in the gradient of rank 1 from step 2 on, --max_skips 3")
    flags = [*TINY, "--dp", "2", "--max_iters", "90", "--max_skips", "3", "--checkpoint_dir", str(tmp_path / "saved")]
    statuses, said = run_to_the_end(flags, 2, tmp_path, "gradient:1:2:nan:99")
    record_property("outcome", f"status {statuses[0]}: {last_line(said, 'in a row')}")
    assert statuses == [3, 3] and "3 steps in a row were skipped (--max_skips)" in said, said
    assert [path.name for path in (tmp_path / "saved").glob("step_*")] == ["step_00000004"]


@pytest.mark.full
@pytest.mark.parametrize("what", ["parameter", "exp_avg"])
def test_one_bit_of_a_copy_ends_the_run(tmp_path, record_property, what):
    record_property("fault", f"one bit of rank 1's copy of ln_f.weight ({what}) flips after step 2, --check_replicas 2")
    flags = [
        *TINY,
        "--dp",
        "2",
        "--max_iters",
        "9",
        "--check_replicas",
        "2",
        "--checkpoint_dir",
        str(tmp_path / "saved"),
    ]
    statuses, said = run_to_the_end(flags, 2, tmp_path, f"replica:1:2:{what}")
    record_property("outcome", f"status {statuses[0]}: {last_line(said, 'replicas differ')}")
    named = "ln_f.weight" + ("" if what == "parameter" else f" ({what})")
    assert statuses == [3, 3] and f"replicas differ: {named} differs between rank 0 and rank 1" in said, said
    assert not list((tmp_path / "saved").glob("step_*"))


def differences_on(mesh, sizes, model):
    """What is found in good copies, then with one bit of one element changed on the last rank, piece by piece."""
    _, engine, _ = engine_after(mesh, 1, model, **sizes)
    found = [first_difference(engine.updater.pieces(counts=True), mesh)]
    for name in ("blocks.3.mlp.proj.bias", "wte.weight", "blocks.1.mlp.router.weight", "blocks.3.mlp.w1"):
        if name in engine.params and mesh.rank == mesh.world.size - 1:
            bits = engine.params[name].data.view(torch.int64).flatten()
            bits[-1] ^= 1
        found.append(first_difference(engine.updater.pieces(counts=True), mesh))
        if name in engine.params and mesh.rank == mesh.world.size - 1:
            bits[-1] ^= 1
    return found


FOUND = {  # by mesh: what is found for each of the pieces; "" where no other rank holds a copy, or there is none
    "dp 2 x tp 2": ({"dp": 2, "tp": 2}, DENSE, ["", "blocks.3.mlp.proj.bias", "wte.weight", "", ""]),
    "pp 2": ({"pp": 2}, DENSE, ["", "", "wte.weight", "", ""]),
    "ep 2": ({"ep": 2}, MIXTURE, ["", "", "wte.weight", "blocks.1.mlp.router.weight", ""]),
}


@pytest.mark.parametrize("mesh", FOUND)
def test_copies_are_compared_over_the_axes_that_hold_them(ranks, record_property, mesh):
    sizes, model, expected = FOUND[mesh]
    record_property("fault", f"one bit of one rank's copy changed, {mesh}: dense, tied, router and expert weights")
    results = ranks(differences_on, sizes, model, **sizes)
    record_property("outcome", "; ".join(said for said in results[0] if said))
    assert all(result == results[0] for result in results)
    assert [said.partition(" differs")[0] for said in results[0]] == expected, results[0]


def test_the_digest_sees_every_bit_of_every_element_and_its_place():
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    first, seen = digest(tensor), set()
    for element in range(tensor.numel()):
        for bit in range(32):
            changed = tensor.clone()
            changed.view(torch.int32).flatten()[element] ^= 1 << bit if bit < 31 else -(1 << 31)
            seen.add(digest(changed).item())
    assert len(seen) == 15 * 32 and first.item() not in seen
    assert digest(tensor.flip(0)) != first and digest(tensor.clone()) == first
    assert digest(tensor.bfloat16()) == digest(tensor.bfloat16().clone())
