"""Files of a checkpoint that are not as they were written: never loaded into other numbers; the older one is taken."""

import json
import shutil
from pathlib import Path

import pytest

from heiretsu.kernels import plain
from heiretsu.parallel import checkpoint
from heiretsu.parallel.checkpoint_folder import checkpoints, rotate, set_aside
from heiretsu.parallel.checkpoint_seal import SEAL, read_run, verify
from heiretsu.run.conversion import export_model
from heiretsu.run.saved import load_model, newest_in
from tests.faults.saved_runs import STEPS, copy_of, flip_a_bit, run, steps_in

TENSORS = "__0_0.distcp"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never disturbed: its folder, with checkpoints after steps 2, 4 and 6, and its losses by step."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    outcome = run(folder, "--keep", "9")
    assert outcome.status == 0 and steps_in(folder) == [2, 4, 6], outcome.out + outcome.err
    return folder, outcome.losses


@pytest.fixture
def two(whole, tmp_path):
    """Its first two checkpoints, as after a kill before step 6, and the losses that must come."""
    folder = copy_of(whole[0], tmp_path / "run")
    shutil.rmtree(folder / "step_00000006")
    return folder, whole[1]


def edit(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "tensors cut in half": (TENSORS, cut),
    "tensors emptied": (TENSORS, lambda file: file.write_bytes(b"")),
    "tensors missing": (TENSORS, lambda file: file.unlink()),
    "tensors with one bit flipped": (TENSORS, flip_a_bit),
    "tensors of an older step in their place": (
        TENSORS,
        lambda file: shutil.copy(file.parents[1] / "step_00000002" / TENSORS, file),
    ),
    ".metadata emptied": (".metadata", lambda file: file.write_bytes(b"")),
    ".metadata missing": (".metadata", lambda file: file.unlink()),
    ".metadata with one bit flipped": (".metadata", flip_a_bit),
    "run.json emptied": ("run.json", lambda file: file.write_text("")),
    "run.json cut": ("run.json", cut),
    "run.json a list": ("run.json", lambda file: file.write_text("[1, 2]")),
    "run.json null": ("run.json", lambda file: file.write_text("null")),
    "run.json a million brackets": ("run.json", lambda file: file.write_text("[" * 10**6)),
    "run.json without its model": ("run.json", lambda file: edit(file, config={})),
    "run.json with another step": ("run.json", lambda file: edit(file, step=2)),
    "run.json missing": ("run.json", lambda file: file.unlink()),
    "checksums missing": (SEAL, lambda file: file.unlink()),
    "checksums cut": (SEAL, cut),
    "checksums with one bit flipped": (SEAL, flip_a_bit),
    "checksums of no file": (SEAL, lambda file: edit(file, files={})),
    "checksums null": (SEAL, lambda file: file.write_text("null")),
}


def quick(cases, names):
    """The cases; those that are not among names are left to a full run."""
    return [case if case in names else pytest.param(case, marks=pytest.mark.full) for case in cases]


OFTEN = [
    "tensors cut in half",
    "tensors with one bit flipped",
    ".metadata missing",
    "run.json a list",
    "checksums missing",
]


@pytest.mark.parametrize("what", quick(DAMAGE, OFTEN))
def test_a_damaged_file_is_named_and_the_older_checkpoint_goes_on(two, record_property, what):
    folder, losses = two
    name, damage = DAMAGE[what]
    damage(folder / "step_00000004" / name)
    record_property("fault", f"newest checkpoint: {what}")
    insisted = run(folder, "--resume", str(folder / "step_00000004"))
    assert insisted.status == 2 and insisted.err.count("\n") == 1, insisted.err
    assert "step_00000004" in insisted.err and name in insisted.err
    outcome = run(folder, "--resume", "auto")
    left_out = outcome.said("left out")
    assert outcome.status == 0 and "step_00000004" in left_out and name in left_out, outcome.out + outcome.err
    assert outcome.losses == losses  # bit for bit, each step once
    record_property("outcome", f"{left_out.rpartition('/')[2]}; went on from step 2, bitwise")


def sealed_again(path):
    """As one who edits run.json by hand and knows of the checksums."""
    (path / SEAL).unlink()
    files = {file.name: checkpoint.fingerprint(file) for file in path.iterdir()}
    checkpoint.seal(path, files)


FIELDS = {
    "step": ["4", None, -4, 4.0, 10**30, True, 2],
    "optimizer_steps": ["x", None, -1, 5],
    "scaler": [
        None,
        [],
        {},
        {"scale": -1.0, "growth": 0, "good_steps": 0},
        {"scale": "1", "growth": 0, "good_steps": 0},
    ],
    "config": [None, [], {}, {"model": [], "dtype": "float64"}, {"model": {}, "dtype": "save"}],
    "format": [None, "2", 3, [], True],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_run_json_with_a_field_that_cannot_be_is_refused(two, record_property, field):
    path = two[0] / "step_00000004"
    record_property(
        "fault", f"run.json with {field} of another type, absent, negative or absurd, checksums made to fit"
    )
    before = (path / "run.json").read_text()
    for value in [*FIELDS[field], "absent"]:
        edit(path / "run.json", **{field: value})
        sealed_again(path)
        with pytest.raises(ValueError, match="step_00000004: ") as refused:
            verify(path)
        assert "\n" not in str(refused.value)
        (path / "run.json").write_text(before)
    sealed_again(path)
    verify(path)
    record_property("outcome", f"each refused in one line: {str(refused.value).rpartition('/')[2]}")


def test_under_a_name_of_the_users_own_the_step_is_checked_as_well(two, record_property, tmp_path):
    """A folder that is called step_N says itself which one it is; a copy with another name does not."""
    record_property("fault", "the same with the checkpoint copied to a name of its own, another step")
    path = Path(shutil.copytree(two[0] / "step_00000004", tmp_path / "best"))
    sealed_again(path)
    verify(path)
    for value in ("4", None, -4, 4.0, 10**30, True):
        edit(path / "run.json", step=value)
        sealed_again(path)
        with pytest.raises(ValueError, match=r"best: run.json has step "):
            verify(path)
    record_property("outcome", "refused")


def test_every_bit_counts(two, record_property):
    path = two[0] / "step_00000004"
    record_property("fault", "one random bit flipped in a file of a checkpoint, 200 times")
    names = sorted(file.name for file in path.iterdir())
    for seed in range(200):
        file = path / names[seed % len(names)]
        before = file.read_bytes()
        flip_a_bit(file, seed)
        with pytest.raises(ValueError, match="step_00000004: .*" + names[seed % len(names)]):
            verify(path)
        file.write_bytes(before)
    verify(path)
    record_property("outcome", "200 of 200 refused by the file's name")


def test_a_checkpoint_under_another_steps_name_is_refused(two, record_property):
    record_property("fault", "a checkpoint's folder renamed to a later step")
    (two[0] / "step_00000004").rename(two[0] / "step_00000005")
    with pytest.raises(ValueError, match="step 4, but the folder's name says 5") as refused:
        verify(two[0] / "step_00000005")
    record_property("outcome", str(refused.value).rpartition("/")[2])


def test_with_every_checkpoint_damaged_nothing_begins_anew_in_silence(two, record_property):
    record_property("fault", "every checkpoint of the folder damaged, --resume auto")
    for path in checkpoints(two[0]):
        flip_a_bit(path / TENSORS)
    outcome = run(two[0], "--resume", "auto")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "no checkpoint in it is whole" in outcome.err
    assert steps_in(two[0]) == [2, 4]
    record_property("outcome", "refused in one line; nothing moved or deleted")


def test_sampling_and_export_read_the_checksums_too(two, record_property, capsys, tmp_path):
    record_property("fault", "sample.py and export of a checkpoint with a flipped bit")
    flip_a_bit(two[0] / "step_00000004" / TENSORS)
    for read in (lambda path: load_model(path, plain), lambda path: export_model(path, tmp_path / "out")):
        with pytest.raises(ValueError, match="step_00000004: __0_0.distcp does not have the checksum"):
            read(two[0] / "step_00000004")
    assert load_model(two[0], plain)[1]["step"] == 2
    assert "left out" in capsys.readouterr().err and not (tmp_path / "out").exists()
    record_property("outcome", "refused by name; of the folder, the older one is read, and it is said")


def as_format_1(path):
    """What earlier versions wrote: no checksums."""
    (path / SEAL).unlink()
    run_json = json.loads((path / "run.json").read_text())
    run_json = {key: value for key, value in run_json.items() if key not in ("run_id", "data")} | {"format": 1}
    (path / "run.json").write_text(json.dumps(run_json))


def test_a_checkpoint_of_an_earlier_version_is_read_with_a_word(two, record_property):
    record_property("fault", "a checkpoint of the earlier format, which has no checksums")
    folder, losses = two
    as_format_1(folder / "step_00000004")
    outcome = run(folder, "--resume", "auto")
    word = outcome.said("without checksums")
    assert outcome.status == 0 and "step_00000004" in word and outcome.losses == losses, outcome.out
    record_property("outcome", "read, bitwise; said: " + word.partition(": ")[2])


@pytest.mark.parametrize("what", quick(["tensors cut in half", "tensors missing", ".metadata emptied"], []))
def test_of_an_earlier_version_what_is_cut_or_missing_is_refused(two, record_property, what):
    record_property("fault", f"a checkpoint of the earlier format: {what}")
    folder, losses = two
    name, damage = DAMAGE[what]
    as_format_1(folder / "step_00000004")
    damage(folder / "step_00000004" / name)
    outcome = run(folder, "--resume", "auto")
    assert outcome.status == 0 and name in outcome.said("left out") and outcome.losses == losses
    record_property("outcome", outcome.said("left out").rpartition("/")[2])


def test_keeping_one_never_deletes_the_last_whole_one(whole, record_property, tmp_path):
    record_property("fault", "--keep 1 with a newer checkpoint that is cut")
    folder = copy_of(whole[0], tmp_path / "run")
    cut(folder / "step_00000006" / TENSORS)
    rotate(folder, keep=1)
    assert steps_in(folder) == [4, 6] and newest_in(folder, print).name == "step_00000004"
    record_property("outcome", "the cut one does not count; the older whole one stays")


def test_a_folder_that_holds_later_steps_of_another_run(two, record_property):
    record_property("fault", "a new run in a folder that holds later steps of another")
    folder, _ = two
    new = run(folder, "--seed", "2", "--save_interval", "3", "--keep", "1", steps=3)
    assert new.status == 0 and steps_in(folder) == [3] and steps_in(folder / "set_aside_1") == [2, 4], new.out
    again = run(folder, "--seed", "2", "--resume", "auto", steps=3)
    assert "step_00000003: 3 of 3 steps are done: nothing is left to do" in again.out and again.status == 0
    verify(folder / "set_aside_1" / "step_00000004")
    record_property("outcome", new.said("set_aside").rpartition(": ")[2])


def test_going_on_from_an_older_step_keeps_what_it_saves(whole, record_property, tmp_path):
    record_property("fault", "--resume PATH of an older step, --keep 1")
    folder = copy_of(whole[0], tmp_path / "run")
    outcome = run(folder, "--resume", str(folder / "step_00000002"), "--keep", "1", steps=4)
    assert outcome.status == 0 and steps_in(folder) == [4] and steps_in(folder / "set_aside_1") == [4, 6]
    record_property("outcome", "later steps moved to set_aside_1; the new step 4 stays and is the newest")


def test_another_runs_checkpoints_are_moved_even_if_older(two, record_property):
    record_property("fault", "a run of another folder goes on in one that holds a third run's older steps")
    moved, into = set_aside(two[0], first_step=100, run_id="another")
    assert [path.name for path in moved] == ["step_00000002", "step_00000004"] and into.name == "set_aside_1"
    assert set_aside(two[0], 100, "another") == ([], None)
    record_property("outcome", "moved aside, so that --keep does not delete them")


CHANGES = {
    "seed": (["--seed", "2"], "--seed 2 (the checkpoint: 1337)"),
    "batch": (["--batch_size", "4"], "sequences of a step 4 (the checkpoint: 2)"),
    "learning rate": (["--learning_rate", "0.02"], "--learning_rate 0.02 (the checkpoint: 0.01)"),
    "warm-up": (["--warmup_iters", "1"], "--warmup_iters 1 (the checkpoint: 0)"),
    "dropout": (["--dropout", "0.1"], "--dropout 0.1 (the checkpoint: 0.0)"),
    "weight decay": (["--weight_decay", "0"], "--weight_decay 0.0 (the checkpoint: 0.1)"),
}


def test_parameters_of_another_precision_are_refused_whatever_is_allowed(two, record_property):
    record_property("fault", "resumed with another --dtype")
    outcome = run(two[0], "--resume", "auto", "--allow_changes", "--dtype", "float32")
    assert outcome.status == 2 and "the checkpoint has --dtype float64, not float32" in outcome.err
    record_property("outcome", outcome.err.strip().rpartition("/")[2])


@pytest.mark.parametrize("what", quick(CHANGES, ["seed", "batch"]))
def test_what_decides_the_numbers_must_be_as_it_was_or_be_allowed(two, record_property, what):
    record_property("fault", f"resumed with another {what}")
    flags, words = CHANGES[what]
    refused = run(two[0], "--resume", "auto", *flags)
    assert refused.status == 2 and words in refused.err and refused.err.count("\n") == 1
    allowed = run(two[0], "--resume", "auto", "--allow_changes", *flags)
    assert allowed.status == 0 and f"changed: {words}" in allowed.out
    record_property("outcome", f"refused: {words}; said, and done, with --allow_changes")


def test_the_same_batch_cut_up_otherwise_is_no_change(two, record_property):
    record_property("fault", "resumed with the global batch cut into other microbatches, and more steps")
    flags = ["--resume", "auto", "--batch_size", "1", "--grad_accum_steps", "2"]
    outcome = run(two[0], *flags, steps=STEPS + 1)
    assert outcome.status == 0 and outcome.losses[5] == pytest.approx(two[1][5], rel=1e-9)
    record_property("outcome", "goes on, to 1e-9")


def test_the_last_state_is_saved_without_an_interval(record_property, tmp_path):
    record_property("fault", "--checkpoint_dir without --save_interval")
    outcome = run(tmp_path / "run", "--save_interval", "0", steps=3)
    assert outcome.status == 0 and steps_in(tmp_path / "run") == [3]
    assert read_run(tmp_path / "run" / "step_00000003")["step"] == 3
    record_property("outcome", "the last state is saved")


@pytest.mark.parametrize("flag", ["--checkpoint_dir", "--log_file", "--profile"])
def test_a_folder_that_cannot_be_made_is_found_at_the_start(record_property, tmp_path, flag):
    record_property("fault", f"{flag} in a folder that cannot be made")
    (tmp_path / "file").write_text("x")
    outcome = run(tmp_path / "run", flag, str(tmp_path / "file" / "a"))
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and flag in outcome.err and not outcome.log
    record_property("outcome", "refused in one line before the first step")
