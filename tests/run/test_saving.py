"""When a run is saved, what is said of it, and what a run that saves finds out before it has anything to lose."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.parallel.engine import StepReport
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import saving
from heiretsu.run.batches import read_batches
from heiretsu.run.building import adamw, build_engine
from heiretsu.run.options import parse_args
from heiretsu.run.saving import Saver
from tests.training import dataset

FLAGS = "--n_layer 1 --n_head 2 --n_embed 16 --block_size 16 --batch_size 2 --tokenizer bytes".split()


def nadam(groups, config):
    return torch.optim.NAdam(groups, lr=config.learning_rate)  # keeps mu_product, a number for each parameter


@pytest.mark.parametrize(
    "make_optimizer, folder, ends", [(nadam, True, True), (nadam, False, False), (adamw, True, False)]
)
def test_an_optimizer_that_cannot_be_saved_is_refused_after_one_step(tmp_path, capsys, make_optimizer, folder, ends):
    config = parse_args([*FLAGS, *(["--checkpoint_dir", str(tmp_path)] if folder else [])], world_size=1)
    engine = build_engine(config, abstract_mesh(), plain, make_optimizer=make_optimizer)
    saver = Saver(config, engine, {}, print)
    report = engine.step(read_batches(config, engine.mesh, dataset(257, 16), 0))
    if not ends:
        saver.after(report)
        return
    with pytest.raises(SystemExit, match="2"):
        saver.after(report)
    told = capsys.readouterr().err
    assert told.startswith("train.py: error: NAdam keeps mu_product for ") and told.count("\n") == 1


class Saving:
    """A save that is being written: as long as the test says, and it ends as that says."""

    def __init__(self, outcome="runs/step_00000003", complaint=None):
        self.outcome, self.over = outcome, False
        self.writer = SimpleNamespace(complaint=complaint)

    def done(self):
        return self.over

    def result(self):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.fixture
def saves(monkeypatch):
    """What `checkpoint.start` is asked for, and what it gives, one after the other."""
    kept = SimpleNamespace(asked=[], given=[])
    monkeypatch.setattr(saving.checkpoint, "start", lambda *what: kept.asked.append(what) or kept.given.pop(0))
    monkeypatch.setattr(saving, "facts_of", lambda engine, config, facts: {"facts": facts, "config": config})
    return kept


def a_saver(*flags, mesh=None, folder="x"):
    said = []
    config = parse_args([*FLAGS, *(["--checkpoint_dir", folder] if folder else []), *flags], world_size=1)
    updater = SimpleNamespace(pieces=lambda: "pieces")
    engine = SimpleNamespace(mesh=mesh or abstract_mesh(), updater=updater)
    return Saver(config, engine, {"run_id": "ab12"}, said.append), said, config


def report(skipped=False, notes=(0,)):
    return StepReport({}, 1.0, skipped, notes=notes)


def test_a_save_is_begun_with_all_that_it_needs_and_told_of_when_no_rank_writes_any_more(saves):
    saver, said, config = a_saver("--keep", "5", "--local_checkpoints")
    assert saver.note() == 0 and saver.failed is False
    saver.after(report())
    saves.given.append(save := Saving())
    saver.begin(3)
    facts = {"facts": {"run_id": "ab12"}, "config": config.as_json()}
    assert saves.asked == [("x", 3, "pieces", facts, 5, None, saver.copies, True)]
    assert saver.note() == saving.STILL_WRITING == 2**16
    for notes in ((0, 2**16), (2**16 | 15, 0)):
        saver.after(report(notes=notes))
        assert said == []
    save.over = True
    assert saver.note() == 0
    saver.after(report(notes=(15, 0)))
    saver.after(report())
    saver.close()
    assert said == ["saved runs/step_00000003"]


def test_a_save_waits_for_the_one_before_and_a_complaint_is_passed_on(saves):
    saver, said, _ = a_saver()
    saves.given += [Saving("one", "an old one stays"), Saving("two")]
    saver.begin(1)
    saver.begin(2)
    assert said == ["saved one", "warning: an old one stays"]
    saver.close()
    assert said[2:] == ["saved two"]


def test_a_save_that_fails_ends_the_run_or_is_a_warning_and_counts_if_it_was_the_last(saves, capsys):
    lost = saving.checkpoint.SaveError("rank 1: no room")
    saver, said, _ = a_saver()
    saves.given.append(Saving(lost))
    saver.begin(1)
    with pytest.raises(SystemExit) as stop:
        saver.after(report())
    assert stop.value.code == 1 and said == []
    assert capsys.readouterr().err == "train.py: error: rank 1: no room; earlier checkpoints are untouched\n"
    saver, said, _ = a_saver("--on_save_error", "continue")
    saves.given += [Saving(lost), Saving("two"), Saving(lost)]
    saver.begin(1)
    saver.begin(2)
    warning = "warning: rank 1: no room; earlier checkpoints are untouched, and the run goes on"
    assert said == [warning] and saver.failed
    saver.finish()
    assert said == [warning, "saved two"] and not saver.failed
    saver.begin(3)
    with pytest.raises(SystemExit) as stop:
        saver.close()
    assert stop.value.code == 1 and said == [warning, "saved two", warning]
    assert capsys.readouterr().err == "train.py: error: the last save failed\n"


def test_one_rank_says_why_all_end(saves, capsys, monkeypatch):
    monkeypatch.setattr(saving.dist, "new_group", lambda **how: how)
    saver, _, _ = a_saver(mesh=abstract_mesh(dp=2, rank=1))
    saves.given.append(Saving(saving.checkpoint.SaveError("no room")))
    saver.begin(1)
    with pytest.raises(SystemExit, match="1"):
        saver.finish()
    assert capsys.readouterr().err == ""


def test_saving_has_a_group_of_its_own_where_there_are_ranks_and_a_folder(saves, monkeypatch):
    made = []
    monkeypatch.setattr(saving.dist, "new_group", lambda **how: made.append(how) or "a group")
    assert a_saver(mesh=abstract_mesh(dp=2), folder=None)[0].group is None and a_saver()[0].group is None
    saver, _, _ = a_saver(mesh=abstract_mesh(dp=2))
    assert saver.group == "a group" and made == [{"backend": "gloo", "timeout": timedelta(hours=2)}]
    saves.given.append(Saving())
    saver.begin(1)
    assert saves.asked[0][5] == "a group"


def test_without_a_folder_nothing_is_saved(saves):
    saver, said, _ = a_saver(folder=None)
    saver.begin(1)
    saver.after(report())
    saver.close()
    assert (saves.asked, said, saver.note()) == ([], [], 0)


def test_the_optimizer_is_looked_at_once_after_the_first_update_that_was_made(saves):
    saver, _, _ = a_saver()
    looked = []
    saver.engine.updater.pieces = lambda: looked.append(1)
    for skipped in (True, True, False, False):
        saver.after(report(skipped))
    assert looked == [1]
