"""Where a run begins: which checkpoint is taken, what must be as it was, and what is said of it."""

import shutil
from dataclasses import replace

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.parallel.checkpoint_seal import read_run
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import resume, state
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from heiretsu.run.config import FLAGS as ALL_FLAGS
from heiretsu.run.config import OPTIMISATION
from heiretsu.run.options import parse_args
from heiretsu.run.resume import Origin, changes, check_changes, find_origin, make_room, named_checkpoint, restore
from tests.training import dataset

FLAGS = "--n_layer 1 --n_head 2 --n_embed 16 --block_size 16 --batch_size 2 --max_iters 10".split()
CONFIG = parse_args(FLAGS, world_size=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run's checkpoints of steps 2 and 4; its parameters are all 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    engine = build_engine(CONFIG, abstract_mesh(), plain)
    engine.step(read_batches(CONFIG, engine.mesh, dataset(257, 16), 0))
    for step in (2, 4):
        with torch.no_grad():
            for param in engine.params.values():
                param.fill_(step)
        state.save(folder, step, engine, CONFIG.as_json(), 9, run_id="ab12", data="digest")
    return folder


def asked(resume="none", folder=None, **more):
    return replace(CONFIG, resume=str(resume), checkpoint_dir=None if folder is None else str(folder), **more)


def found(config):
    said = []
    return find_origin(config, abstract_mesh(), said.append), said


def test_what_is_named_is_the_newest_of_a_folder_or_the_checkpoint_itself(run, tmp_path):
    older = run / "step_00000002"
    assert named_checkpoint(asked("none", run)) is None and named_checkpoint(asked("auto", tmp_path)) is None
    assert named_checkpoint(asked("auto", run)) == named_checkpoint(asked(run)) == run / "step_00000004"
    assert named_checkpoint(asked(older, run)) == older


def test_a_run_goes_on_from_what_it_names_under_the_same_name(run, tmp_path):
    assert found(asked("auto", run)) == (Origin(run / "step_00000004", "ab12"), [])
    assert found(asked(run / "step_00000002", tmp_path)) == (Origin(run / "step_00000002", "ab12"), [])
    for new in (asked("none", run), asked("auto", tmp_path)):
        origin, said = found(new)
        assert origin.path is None and len(origin.run_id) == 8 and int(origin.run_id, 16) >= 0 and said == []
    assert found(asked("none"))[0].run_id != found(asked("none"))[0].run_id
    with pytest.raises(ValueError, match="neither a complete checkpoint nor a folder that holds one"):
        found(asked(tmp_path))


@pytest.mark.parametrize("run_id", [None, 7])
def test_a_run_without_a_name_gets_one(run, monkeypatch, run_id):
    monkeypatch.setattr(resume, "read_run", lambda path: {} if run_id is None else {"run_id": run_id})
    origin, _ = found(asked("auto", run))
    assert origin.path == run / "step_00000004" and len(origin.run_id) == 8


OTHER = {
    "seed": ("--seed 7", "--seed 7 (the checkpoint: 1337)"),
    "tokenizer": ("--tokenizer gpt2", "--tokenizer gpt2 (the checkpoint: bytes)"),
    "learning_rate": ("--learning_rate 0.5", "--learning_rate 0.5 (the checkpoint: 0.001)"),
    "warmup_iters": ("--warmup_iters 3", "--warmup_iters 3 (the checkpoint: 0)"),
    "weight_decay": ("--weight_decay 0.5", "--weight_decay 0.5 (the checkpoint: 0.1)"),
    "betas": ("--betas 0.5 0.75", "--betas 0.5 0.75 (the checkpoint: 0.9 0.95)"),
    "grad_clip": ("--grad_clip 0.5", "--grad_clip 0.5 (the checkpoint: 1.0)"),
    "amp": ("--amp bf16", "--amp bf16 (the checkpoint: none)"),
    "dropout": ("--dropout 0.5", "--dropout 0.5 (the checkpoint: 0.0)"),
    "aux_loss_coef": ("--aux_loss_coef 0.5", "--aux_loss_coef 0.5 (the checkpoint: 0.01)"),
    "batch": ("--grad_accum_steps 3", "sequences of a step 6 (the checkpoint: 2)"),
    "min_lr": ("--min_lr 0", "--min_lr 0.0 (the checkpoint: None)"),
}


def differing(flags: str, theirs: dict, data="digest") -> list[str]:
    return changes(theirs, parse_args([*FLAGS, *flags.split()], world_size=1).as_json(), data)


@pytest.mark.parametrize("name", OTHER)
def test_what_decides_the_numbers_is_compared_in_the_words_of_the_flags(name):
    flags, words = OTHER[name]
    theirs = {"config": CONFIG.as_json(), "data": "digest"}
    assert differing(flags, theirs) == [words] and differing("", theirs) == []
    for values in (theirs["config"], theirs["config"]["model"]):
        values.pop(name, None)
    if name == "batch":
        theirs["config"]["ep"] = None  # an earlier version did not write it down
    assert differing(flags, theirs) == []


def test_a_batch_may_be_cut_up_otherwise_and_the_end_moves_where_nothing_decays():
    theirs = {"config": CONFIG.as_json(), "data": "digest"}
    for flags in ("--batch_size 1 --grad_accum_steps 2", "--max_iters 99", "--fused --dtype float64 --keep 7"):
        assert differing(flags, theirs) == []
    theirs["config"]["batch_size"], theirs["config"]["dp"], theirs["config"]["ep"] = 1, 2, 3
    assert differing("", theirs) == ["sequences of a step 2 (the checkpoint: 6)"]
    decaying = parse_args([*FLAGS, "--min_lr", "0"], world_size=1).as_json()
    found = differing("--min_lr 0 --max_iters 20", {"config": decaying})
    assert found == ["--max_iters with --min_lr 20 (the checkpoint: 10)"]


def test_other_data_is_a_change_and_data_that_was_not_written_down_is_none():
    theirs = {"config": CONFIG.as_json(), "data": "another"}
    assert differing("--seed 7", theirs) == [OTHER["seed"][1], "the training data has other tokens"]
    assert differing("", {"config": CONFIG.as_json()}) == []


@pytest.mark.parametrize("step, max_iters, looked_at", [(0, 10, False), (1, 10, True), (9, 10, True), (10, 10, False)])
def test_changes_count_between_the_first_step_and_the_last(monkeypatch, step, max_iters, looked_at):
    saved = {"step": step, "config": CONFIG.as_json(), "data": "digest"}
    monkeypatch.setattr(resume, "read_run", lambda path: saved)
    config, said = replace(CONFIG, seed=7, max_iters=max_iters), []
    origin = Origin("x", "ab12")
    check_changes(config, Origin(None, "ab12"), "other", said.append)
    check_changes(replace(config, seed=1337), origin, "digest", said.append)
    if not looked_at:
        check_changes(config, origin, "other", said.append)
        assert said == []
        return
    with pytest.raises(ValueError) as refusal:
        check_changes(config, origin, "other", said.append)
    assert str(refusal.value) == (
        "x: going on would not give the run that was saved: --seed 7 (the checkpoint: 1337), the training data has "
        "other tokens: give what it had, or --allow_changes"
    )
    check_changes(replace(config, allow_changes=True), origin, "other", said.append)
    assert said == ["changed: --seed 7 (the checkpoint: 1337)", "changed: the training data has other tokens"]


def test_a_run_goes_on_with_the_step_after_and_says_where_it_is(run):
    engine, said = build_engine(CONFIG, abstract_mesh(), plain), []
    origin = Origin(run / "step_00000004", "ab12")
    assert restore(CONFIG, engine, origin, said.append) == 4
    assert said == [f"resumed {origin.path}: 4 of 10 steps are done"]
    assert all((param == 4).all() for param in engine.params.values())
    for steps, left in ((4, ": nothing is left to do"), (5, "")):
        said.clear()
        restore(replace(CONFIG, max_iters=steps), engine, origin, said.append)
        assert said == [f"resumed {origin.path}: 4 of {steps} steps are done{left}"]


def test_a_new_run_may_begin_with_parameters_of_another(run):
    engine, said = build_engine(CONFIG, abstract_mesh(), plain), []
    new = Origin(None, "cd34")
    before = engine.params["ln_f.bias"].clone()
    assert restore(CONFIG, engine, new, said.append) == 0 and said == []
    assert torch.equal(engine.params["ln_f.bias"], before)
    assert restore(replace(CONFIG, init_from=str(run)), engine, new, said.append) == 0
    assert said == [f"parameters of {run / 'step_00000004'}"]
    assert all((param == 4).all() for param in engine.params.values())


def test_checkpoints_that_a_run_did_not_come_from_make_room(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    said = []
    config, mesh = asked("none", folder), abstract_mesh()
    make_room(config, mesh, Origin(None, "ab12"), 4, said.append)
    make_room(asked("none", None), mesh, Origin(None, "ab12"), 0, said.append)
    make_room(config, abstract_mesh(dp=1, rank=0), Origin(None, "ab12"), 4, said.append)
    assert said == [] and len(list(folder.iterdir())) == 2
    make_room(config, mesh, Origin(None, "ab12"), 2, said.append)
    assert said == [f"{folder}: step 4 is not what this run came from, and was moved to {folder / 'set_aside_1'}"]
    make_room(config, mesh, Origin(None, "cd34"), 2, said.append)
    assert said[1:] == [f"{folder}: step 2 is not what this run came from, and was moved to {folder / 'set_aside_2'}"]


def test_only_rank_0_makes_room(run, tmp_path, monkeypatch):
    monkeypatch.setattr("heiretsu.run.folders.gather_objects", lambda mine, axis: [mine])
    monkeypatch.setattr(resume, "set_aside", lambda *what: pytest.fail("rank 1 moved something"))
    make_room(asked("none", run), abstract_mesh(dp=2, rank=1), Origin(None, "cd34"), 0, print)


@pytest.mark.parametrize(
    "config, complaint",
    [
        (
            replace(CONFIG, model=replace(CONFIG.model, n_head=4, n_layer=2)),
            "the checkpoint is of another model: n_layer 1 (this run: 2), n_head 2 (this run: 4)",
        ),
        (replace(CONFIG, dtype="float64"), "the checkpoint has --dtype float32, not float64"),
    ],
)
def test_another_model_is_refused_by_what_differs_and_by_its_precision(run, config, complaint):
    engine, path = build_engine(CONFIG, abstract_mesh(), plain), run / "step_00000004"
    for load in (state.load, state.load_parameters):
        with pytest.raises(ValueError) as refusal:
            load(path, engine, config.as_json())
        assert str(refusal.value) == f"{path}: {complaint}"


def test_what_may_change_of_a_model_may(run):
    engine = build_engine(CONFIG, abstract_mesh(), plain)
    other = replace(CONFIG, model=replace(CONFIG.model, dropout=0.5, aux_loss_coef=0.5))
    assert state.load(run / "step_00000002", engine, other.as_json()) == 2


def test_another_optimizer_is_refused_by_what_each_keeps(run):
    def sgd(groups, config, momentum=0.0):
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=momentum)

    path = run / "step_00000004"
    engine = build_engine(CONFIG, abstract_mesh(), plain, make_optimizer=sgd)
    with pytest.raises(ValueError) as refusal:
        state.load(path, engine, CONFIG.as_json())
    assert str(refusal.value) == (
        f"{path}: of another optimizer: it holds exp_avg and exp_avg_sq of each parameter, and this run's keeps nothing"
    )


def test_files_are_read_against_their_checksums_unless_they_were_just_now(run, monkeypatch):
    asked, path = [], run / "step_00000004"
    monkeypatch.setattr(state, "verify", lambda *what: asked.append(what))
    engine = build_engine(CONFIG, abstract_mesh(), plain)
    for load in (state.load, state.load_parameters):
        load(path, engine, CONFIG.as_json(), verified=True)
        assert asked == []
        load(path, engine, CONFIG.as_json())
        assert asked.pop() == (path, engine.mesh)


def test_what_a_run_begins_with_is_not_read_against_its_checksums_again(run, monkeypatch):
    def verify(*_):
        raise AssertionError("read once more")

    monkeypatch.setattr(state, "verify", verify)
    monkeypatch.setattr(resume, "newest_in", lambda *_: path)
    path, engine, said = run / "step_00000004", build_engine(CONFIG, abstract_mesh(), plain), []
    started = replace(CONFIG, checkpoint_dir=None, init_from=str(path))
    assert restore(started, engine, Origin(None, "new"), said.append) == 0
    assert restore(started, engine, Origin(path, "old"), said.append) == 4
    assert said[0] == f"parameters of {path}" and said[1].startswith(f"resumed {path}: 4 of ")


def test_facts_are_the_updaters_the_callers_and_the_configuration(run):
    kept = read_run(run / "step_00000002")
    assert (kept["step"], kept["run_id"], kept["data"]) == (2, "ab12", "digest") and kept["config"] == CONFIG.as_json()
    engine = build_engine(CONFIG, abstract_mesh(), plain)
    assert state.facts_of(engine, {"a": 1}, {"run_id": "x"}) == {
        **engine.updater.facts(),
        "run_id": "x",
        "config": {"a": 1},
    }


def test_a_flag_of_optimisation_is_compared_on_resume_or_leaves_the_numbers_alone():
    flags = {name for name, about in ALL_FLAGS.items() if about.group == OPTIMISATION}
    assert flags - set(resume._DECIDE) == {"max_iters", "max_skips", "check_replicas", "grad_accum_steps"}
