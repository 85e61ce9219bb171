"""train.py, as a command, takes the steps that torch and transformers take: loss, gradient norm, learning rate, loss
scale, skipped steps, evaluation, parameters and moments, in float64 to 1e-9."""

import ast
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.oracle import commands, training
from tests.oracle.draws import Text, philox_4x32_10
from tests.oracle.training import Run

TOLERANCE = 1e-9
KEYS = ("loss", "aux_loss", "lr", "loss_scale", "grad_norm", "eval_loss", "eval_bits_per_byte")

# A step is skipped where the scaled gradient's norm leaves float64's range (its square does, at 2**1024): at first,
# until the scale is small enough; in step 8, right after the scale has doubled; and in step 13, one good step after it
# has, so that it must double again before step 17 and not before step 16. The norm is on both sides of grad_clip.
DENSE = Run(
    dropout=0.1,
    max_iters=18,
    learning_rate=0.01,
    warmup_iters=5,
    min_lr=0.001,
    grad_clip=0.55,
    loss_scale=1.75 * 2.0**512,
    loss_scale_window=3,
    eval_interval=5,
)
OVERFLOWS, DOUBLED, CUT_AFTER = [0, 1, 8, 13], [5, 8, 12, 17], 11
MIXTURE = Run(
    num_experts=4, dropout=0.1, learning_rate=0.01, grad_clip=1.0, aux_loss_coef=0.05, eval_interval=4, max_iters=8
)
# A step has 128 tokens: 16 of them read the training split three times, 8 of them once and a half.
TRAINING, VALIDATION = (300, 390), (350, 150)


@dataclass
class Story:
    """A run by hand, and by train.py on one process."""

    run: Run
    data: Path
    folder: Path
    ops: tuple[str, ...]

    @cached_property
    def by_hand(self) -> training.History:
        splits = (Text(shards(split), self.run.block_size) for split in (TRAINING, VALIDATION))
        return training.train(self.run, *splits, commands.BYTES_PER_TOKEN)

    @cached_property
    def records(self) -> list[dict]:
        """Of the whole run, which saves after every step."""
        return self.command("whole", *self.ops, "--save_interval", "1", "--keep", "99")

    def command(self, name: str, *flags: str, mesh: dict[str, int] | None = None) -> list[dict]:
        """Another run of the same steps, with checkpoints in a folder of its own."""
        replicas = math.prod((mesh or {}).get(axis, 1) for axis in ("dp", "ep"))
        saved = ["--checkpoint_dir", str(self.folder / name)]
        return commands.train(
            self.data, self.folder / f"{name}.jsonl", [*self.run.flags(replicas), *saved, *flags], mesh
        )

    def resumed(self, name: str, after: int, *flags: str, mesh: dict[str, int] | None = None) -> list[dict]:
        """The steps from `after` on, from the checkpoint of the whole run, on another mesh."""
        assert self.records
        return self.command(name, "--resume", str(self.at("whole", after)), "--save_interval", "99", *flags, mesh=mesh)

    def at(self, name: str, steps: int) -> Path:
        return self.folder / name / f"step_{steps:08d}"


def shards(sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Text that is learned in a few steps, and not all: a random walk over the bytes."""
    rng = np.random.default_rng(sizes)
    return [rng.integers(-9, 10, size=size).cumsum() % 257 for size in sizes]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return commands.write_data(tmp_path_factory.mktemp("data"), train=shards(TRAINING), val=shards(VALIDATION))


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory):
    return Story(DENSE, data, tmp_path_factory.mktemp("dense"), ())


@pytest.fixture(scope="module")
def mixture(data, tmp_path_factory):
    return Story(MIXTURE, data, tmp_path_factory.mktemp("mixture"), ("--fused",))


def assert_same_steps(records: list[dict], by_hand: list[dict]) -> None:
    assert [record["step"] for record in records] == [record["step"] for record in by_hand]
    for ours, theirs in zip(records, by_hand, strict=True):
        where = f"step {ours['step']}"
        assert ours["skipped"] == theirs["skipped"], where
        assert {key for key in KEYS if key in ours} == {key for key in KEYS if key in theirs}, where
        for key in set(KEYS) & theirs.keys():
            if key == "grad_norm" and theirs["skipped"]:
                assert ours[key] is None or not math.isfinite(ours[key]), where
            else:
                assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE, abs=0), f"{where}: {key}"


def assert_same_tensors(path: Path, by_hand: dict[str, torch.Tensor]) -> None:
    stored = commands.read_checkpoint(path)
    assert stored.keys() == by_hand.keys()
    for name, theirs in by_hand.items():
        gap = (stored[name] - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300)
        assert stored[name].shape == theirs.shape and gap <= TOLERANCE, f"{path.name}: {name} is off by {gap:.1e}"


# One process


def test_a_dense_run_takes_the_steps_of_the_run_by_hand(dense):
    assert_same_steps(dense.records, dense.by_hand.records)
    assert [record["step"] for record in dense.records if record["skipped"]] == OVERFLOWS
    scales = [record["loss_scale"] for record in dense.records]
    assert [step for step in range(1, len(scales)) if scales[step] > scales[step - 1]] == DOUBLED


def test_a_fused_mixture_takes_the_steps_of_the_run_by_hand(mixture):
    assert_same_steps(mixture.records, mixture.by_hand.records)
    assert all(record["aux_loss"] > 1 for record in mixture.records)


@pytest.mark.parametrize("story", ["dense", "mixture"])
def test_every_checkpoint_has_the_parameters_and_moments_of_the_run_by_hand(request, story):
    story = request.getfixturevalue(story)
    assert story.records
    for steps in range(1, story.run.max_iters + 1):
        assert_same_tensors(story.at("whole", steps), story.by_hand.tensors[steps])


def test_the_learning_rate_is_what_the_flags_say_at_steps_worked_out_by_hand(dense, mixture):
    lr = [record["lr"] for record in dense.records]
    named = {0: 0.002, 1: 0.004, 4: 0.01, 5: 0.01, 11: 0.0055, 17: 0.001}
    named |= {8: 0.001 + 0.009 * (1 + math.sqrt(0.5)) / 2, 14: 0.001 + 0.009 * (1 - math.sqrt(0.5)) / 2}
    assert {step: lr[step] for step in named} == pytest.approx(named, rel=1e-12)
    assert {record["lr"] for record in mixture.records} == {0.01}


def test_adamw_takes_its_first_two_steps_as_loshchilov_and_hutter_write_them(dense):
    """Steps 2 and 3 of the run; those before are skipped. The gradients are read from the moments they leave."""
    assert dense.records
    before, first, second = (commands.read_checkpoint(dense.at("whole", steps)) for steps in (2, 3, 4))
    assert not any(name.startswith("exp_avg") for name in before)
    b1, b2 = DENSE.betas
    for name in (name.removeprefix("model/") for name in before):
        decay = 0.0 if name.endswith("bias") or ".ln_" in name or name.startswith("ln_f") else DENSE.weight_decay
        m1, v1, m2, v2 = (at[f"{moment}/{name}"] for at in (first, second) for moment in ("exp_avg", "exp_avg_sq"))
        g1, g2 = m1 / (1 - b1), (m2 - b1 * m1) / (1 - b1)
        torch.testing.assert_close(v1, (1 - b2) * g1**2, rtol=1e-9, atol=1e-20)
        torch.testing.assert_close(v2, b2 * v1 + (1 - b2) * g2**2, rtol=1e-9, atol=1e-20)
        lr1, lr2 = (record["lr"] for record in dense.records[2:4])
        p0, p1, p2 = (at[f"model/{name}"] for at in (before, first, second))
        expected = p0 * (1 - lr1 * decay) - lr1 * g1 / (g1.abs() + 1e-8)  # the bias corrections cancel
        torch.testing.assert_close(p1, expected, rtol=1e-9, atol=1e-12, msg=f"{name}, first step")
        hat_m, hat_v = m2 / (1 - b1**2), v2 / (1 - b2**2)
        expected = p1 * (1 - lr2 * decay) - lr2 * hat_m / (hat_v.sqrt() + 1e-8)
        torch.testing.assert_close(p2, expected, rtol=1e-9, atol=1e-12, msg=f"{name}, second step")


def test_a_skipped_step_changes_nothing_but_the_scale(dense):
    assert dense.records
    for step in OVERFLOWS[2:]:
        before, after = (commands.read_checkpoint(dense.at("whole", steps)) for steps in (step, step + 1))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_bits_per_byte_are_the_loss_in_bits_over_the_bytes_of_a_token(dense):
    evaluated = [record for record in dense.records if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [4, 9, 14, 17]
    for record in evaluated:  # the data's meta.json says: 1.5 bytes a token
        assert record["eval_bits_per_byte"] == pytest.approx(record["eval_loss"] * 1.4426950408889634 / 1.5, rel=1e-12)


# Other meshes, and through a resume


def test_a_run_resumed_on_a_mesh_goes_on_as_by_hand(dense):
    mesh = {"dp": 2, "tp": 2}
    records = dense.resumed("mesh", CUT_AFTER, mesh=mesh)
    assert_same_steps(records, dense.by_hand.records[CUT_AFTER:])
    assert_same_tensors(dense.at("mesh", DENSE.max_iters), dense.by_hand.tensors[-1])


REST = {  # story, flags, mesh, resumed after so many steps
    "dense fused": ("dense", "--fused", {}, 0),
    "dense fused on all axes": ("dense", "--fused", {"dp": 2, "tp": 2, "pp": 2}, 0),
    "dense interleaved": ("dense", "--schedule interleaved", {"pp": 2, "tp": 2}, 0),
    "dense gpipe, resumed": ("dense", "--schedule gpipe", {"pp": 4}, 6),
    "mixture plain": ("mixture", "", {}, 0),
    "mixture on all axes": ("mixture", "", {"ep": 2, "tp": 2, "pp": 2}, 0),
    "mixture fused, resumed": ("mixture", "--fused", {"dp": 2, "ep": 2}, 5),
}


@pytest.mark.full
@pytest.mark.parametrize("story, flags, mesh, after", REST.values(), ids=REST)
def test_every_kind_of_run_takes_the_steps_of_the_run_by_hand(request, story, flags, mesh, after):
    name, story = request.node.callspec.id, request.getfixturevalue(story)
    if after:
        records = story.resumed(name, after, *flags.split(), mesh=mesh)
    else:
        records = story.command(name, "--save_interval", "99", *flags.split(), mesh=mesh)
    assert_same_steps(records, story.by_hand.records[after:])
    assert_same_tensors(story.at(name, story.run.max_iters), story.by_hand.tensors[-1])


OTHER = {
    "no clipping, no decay, other betas": replace(
        DENSE, grad_clip=0.0, weight_decay=0.0, betas=(0.8, 0.99), loss_scale=None, dropout=0.0, seed=3
    ),
    "one microbatch, every layer a mixture of one": replace(
        MIXTURE, grad_accum_steps=1, batch_size=8, moe_freq=1, top_k=1, warmup_iters=8, seed=2**40
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("run", OTHER.values(), ids=OTHER)
def test_other_flags_are_taken_as_by_hand(data, tmp_path, run):
    story = Story(run, data, tmp_path, ())
    assert_same_steps(story.records, story.by_hand.records)
    assert_same_tensors(story.at("whole", run.max_iters), story.by_hand.tensors[-1])


# The oracle


def test_the_run_by_hand_imports_nothing_of_the_library():
    for path in Path(__file__).parent.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
        names += [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not {name.split(".")[0] for name in names} & {"heiretsu", "train", "sample"}, path.name


def test_its_random_words_are_those_that_philoxs_authors_publish():
    """The known answers of philox4x32-10 in Random123's tests."""
    full = 2**32 - 1
    known = {
        ((0, 0, 0, 0), (0, 0)): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ((full, full, full, full), (full, full)): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
        ): "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (counter, key), words in known.items():
        assert " ".join(f"{int(word):08x}" for word in philox_4x32_10(counter, key)) == words
