"""What is put into a run's folder of checkpoints and taken away: every branch, on folders of a few bytes."""

import json
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp

from heiretsu.parallel import checkpoint_folder
from heiretsu.parallel.checkpoint_folder import (
    beside,
    checkpoints,
    complete,
    delete,
    newest_whole,
    path_of,
    publish,
    rotate,
    set_aside,
    tidy,
)
from heiretsu.parallel.mesh import abstract_mesh
from tests.parallel.test_checkpoint_seal import RUN, SEAL, sealed


def saved(folder, *steps, **facts):
    return [sealed(path_of(folder, step), RUN | {"step": step, "optimizer_steps": 0} | facts) for step in steps]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def marked(path):
    path.mkdir()
    (path / "inside").write_text("x")
    return path


def test_a_checkpoint_and_its_hidden_neighbours_have_these_names(tmp_path):
    assert path_of(tmp_path, 200) == tmp_path / "step_00000200"
    assert path_of(tmp_path, 123456789) == tmp_path / "step_123456789"
    hidden = [beside(path_of(tmp_path, 3), ending).name for ending in (".part", ".replaced", ".deleted")]
    assert hidden == [".step_00000003.part", ".step_00000003.replaced", ".step_00000003.deleted"]
    assert (checkpoint_folder.PART, checkpoint_folder.REPLACED, checkpoint_folder.DELETED) == tuple(
        name.removeprefix(".step_00000003") for name in hidden
    )


def test_checkpoints_are_folders_of_that_name_in_the_order_of_steps(tmp_path):
    for name in ("step_99999999", "step_00000000", "step_100000000", "step_0000009", ".step_00000001.part"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000004").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000000", "step_99999999", "step_100000000"]
    assert complete(tmp_path) == checkpoints(tmp_path / "none") == []


def test_the_newest_whole_one_is_found_and_what_is_left_out_is_said(tmp_path):
    assert newest_whole(tmp_path / "none", print) is None
    first, second, third = saved(tmp_path, 1, 2, 3)
    assert complete(tmp_path) == [first, second, third]
    lines: list[str] = []
    assert newest_whole(tmp_path, lines.append) == newest_whole(tmp_path, lines.append, abstract_mesh()) == third
    assert lines == []
    (third / SEAL).unlink()
    (second / ".metadata").write_bytes(b"n")
    assert complete(tmp_path) == [first, second]
    assert newest_whole(tmp_path, lines.append) == first
    reasons = [
        f"{third}: not a complete checkpoint: {SEAL} missing",
        f"{second}: .metadata does not have the checksum that was written: damaged",
    ]
    assert lines == [f"left out {reason}" for reason in reasons]
    (first / "run.json").unlink()
    reasons.append(f"{first}: not a complete checkpoint: run.json missing")
    with pytest.raises(ValueError) as refused:
        newest_whole(tmp_path, lines.append)
    assert str(refused.value) == f"{tmp_path}: no checkpoint in it is whole: {'; '.join(reasons)}"
    assert len(lines) == 2


def test_all_ranks_look_at_what_rank_0_sees(tmp_path, monkeypatch):
    first, _ = saved(tmp_path, 1, 2)
    monkeypatch.setattr(checkpoint_folder, "gather_objects", lambda mine, axis: [["step_00000001"], mine])
    assert newest_whole(tmp_path, print, abstract_mesh()) == first
    assert newest_whole(tmp_path, print) == path_of(tmp_path, 2)


def test_one_of_an_earlier_version_is_said_to_be(tmp_path):
    path = path_of(tmp_path, 7)
    dcp.save({"x": torch.ones(2)}, checkpoint_id=path, no_dist=True)
    (path / "run.json").write_text(json.dumps(RUN | {"format": 1}))
    lines: list[str] = []
    assert newest_whole(tmp_path, lines.append) == path
    assert lines == [f"{path}: of an earlier version, without checksums: whether it is as written cannot be checked"]


def test_publishing_replaces_an_older_one_of_the_step_and_leaves_nothing(tmp_path, monkeypatch):
    synced: list = []
    monkeypatch.setattr(checkpoint_folder, "sync_folder", lambda path: synced.append((path, names(path))))
    final = path_of(tmp_path, 1)
    part = marked(beside(final, ".part"))
    publish(part, final)
    assert names(tmp_path) == ["step_00000001"] and synced == [(tmp_path, ["step_00000001"])]
    part.mkdir()
    marked(beside(final, ".replaced"))  # of a run that was killed
    publish(part, final)
    assert names(tmp_path) == ["step_00000001"] and names(final) == []
    assert synced[1:] == [(tmp_path, [".step_00000001.replaced", "step_00000001"])]


def test_what_is_deleted_is_out_of_sight_before_it_is_gone(tmp_path, monkeypatch):
    final = marked(path_of(tmp_path, 1))
    marked(beside(final, ".deleted"))  # of a run that was killed
    delete(final)
    assert names(tmp_path) == []
    marked(final)
    monkeypatch.setattr(checkpoint_folder, "_remove", lambda path: None)  # killed before it is
    delete(final)
    assert names(tmp_path) == [".step_00000001.deleted"]


@pytest.mark.parametrize("keep, left", [(1, [4, 5]), (2, [3, 4, 5]), (3, [1, 2, 3, 4, 5]), (4, [1, 2, 3, 4, 5])])
def test_older_ones_than_the_newest_whole_are_deleted(tmp_path, keep, left):
    paths = saved(tmp_path, 1, 2, 3, 4, 5)
    for damaged in (paths[0], paths[4]):
        (damaged / SEAL).unlink()
    rotate(tmp_path, keep)
    assert checkpoints(tmp_path) == [path_of(tmp_path, step) for step in left] and names(tmp_path)[0][0] == "s"


def test_tidying_takes_back_what_was_replaced_and_clears_the_rest_away(tmp_path):
    tidy(tmp_path / "none")
    marked(tmp_path / ".step_00000001.replaced")
    marked(tmp_path / ".step_00000002.replaced")
    marked(tmp_path / ".step_00000003.part")
    marked(tmp_path / ".step_00000004.deleted")
    others = [".step_00000005.other", ".step_5.part", "step_00000006", "notes"]
    for name in ("step_00000002", *others):
        (tmp_path / name).mkdir()
    tidy(tmp_path)
    assert names(tmp_path) == sorted(["step_00000001", "step_00000002", *others])
    assert names(tmp_path / "step_00000001") == ["inside"] and names(tmp_path / "step_00000002") == []


def test_later_steps_and_other_runs_are_set_aside(tmp_path):
    saved(tmp_path, 1, 3, run_id="mine")
    saved(tmp_path, 2, run_id="yours")
    saved(tmp_path, 0)  # of no run that is named
    path_of(tmp_path, 4).mkdir()
    assert set_aside(tmp_path, 4, "mine") == ([path_of(tmp_path, 2)], tmp_path / "set_aside_1")
    assert set_aside(tmp_path, 4, "mine") == ([], None)
    assert set_aside(tmp_path, 3, "mine") == ([path_of(tmp_path, 4)], tmp_path / "set_aside_2")
    assert set_aside(tmp_path, 1, "mine") == ([path_of(tmp_path, 3)], tmp_path / "set_aside_3")
    assert names(tmp_path) == ["set_aside_1", "set_aside_2", "set_aside_3", "step_00000000", "step_00000001"]
    assert [names(tmp_path / f"set_aside_{n}") for n in (1, 2, 3)] == [
        ["step_00000002"],
        ["step_00000004"],
        ["step_00000003"],
    ]


def test_what_cannot_be_removed_is_left_for_the_next_run(tmp_path):
    checkpoint_folder._remove(tmp_path / "none")
    assert os.listdir(tmp_path) == []
