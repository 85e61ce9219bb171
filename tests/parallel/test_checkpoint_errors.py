"""What a save or a read that fails says, and what a save in the background of one process does not say."""

import dataclasses
import logging
import warnings
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import Replicate, Shard

from heiretsu.parallel import checkpoint
from heiretsu.parallel.checkpoint import Copies, SaveError
from heiretsu.parallel.mesh import WITHIN_STAGE, abstract_mesh
from heiretsu.parallel.placement import Piece, Placement, Spec
from tests.parallel.test_checkpoint_seal import RUN

FACTS = {key: value for key, value in RUN.items() if key not in ("format", "step")}


def piece(values) -> Piece:
    tensor = torch.tensor(values)
    return Piece(tensor, Placement("x", Spec(tuple(tensor.shape), partial_over=()), abstract_mesh()))


def failed(**failures):
    return CheckpointException("write", {int(rank[4:]): (error, None) for rank, error in failures.items()})


def test_the_first_error_of_the_first_rank_is_told_in_300_letters(monkeypatch):
    assert checkpoint._reason(OSError("no\nroom")) == "OSError: no room"
    assert len(checkpoint._reason(OSError("x" * 400))) == 300
    alone = failed(rank0=OSError("x" * 400))
    assert checkpoint._reason(alone) == "OSError: " + "x" * 288 + "..."
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert checkpoint._reason(alone) == "rank 0: OSError: " + "x" * 288 + "..."
    two = failed(rank3=OSError("three"), rank2=ValueError("two"))
    assert checkpoint._reason(two) == "rank 2: ValueError: two"


def test_the_systems_own_error_behind_another_is_told():
    full, odd = OSError("disk full"), RuntimeError("unexpected pos")
    odd.__context__ = full
    assert checkpoint._first_cause(odd) is full
    outer = ValueError("outer")
    outer.__cause__ = odd
    assert checkpoint._first_cause(outer) is full and checkpoint._first_cause(full) is full
    alone = RuntimeError("alone")
    assert checkpoint._first_cause(alone) is alone


@pytest.mark.parametrize("initialized, rank, stays", [(False, 0, False), (True, 0, False), (True, 1, True)])
def test_of_a_failed_save_rank_0_leaves_nothing(tmp_path, monkeypatch, initialized, rank, stays):
    monkeypatch.setattr(dist, "is_initialized", lambda: initialized)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    writer = checkpoint._Writer(tmp_path, 1, {"step": 3})
    writer.part.mkdir()
    with pytest.raises(SaveError) as refused, writer.or_nothing():
        raise OSError("no room")
    assert str(refused.value) == f"{tmp_path / 'step_00000003'} could not be saved: OSError: no room"
    assert writer.part.exists() == stays
    for end in (KeyboardInterrupt(), SystemExit(2)):
        with pytest.raises(type(end)) as ended, writer.or_nothing():
            raise failed(rank0=OSError("no"), rank1=end)
        assert ended.value is end


def test_what_was_saved_is_read_and_what_cannot_be_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 3, {"model/x": piece([1.0, 2.0])}, FACTS | {"optimizer_steps": 0}, keep=1)
    assert path == tmp_path / "step_00000003" and checkpoint.stored_shapes(path) == {"model/x": (2,)}
    into = piece([0.0, 0.0])
    checkpoint.read(path, {"model/x": into})
    assert into.tensor.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError) as refused:
        checkpoint.read(path, {"model/y": into})
    said = str(refused.value)
    assert said.startswith(f"{path}: cannot be loaded (") and said.endswith("): damaged") and len(said) < 400
    assert "model/y" in said and "\n" not in said


def test_a_save_in_the_background_of_one_process_warns_of_nothing(tmp_path):
    copies, mine = Copies(), piece([1.0, 2.0])
    facts = FACTS | {"optimizer_steps": 0}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        saving = checkpoint.start(tmp_path, 3, {"model/x": mine}, facts, 1, None, copies)
        mine.tensor.fill_(9.0)  # training goes on
        path = saving.result()
    assert [str(warning.message) for warning in said] == []
    assert saving.done() and saving.step == 3 and path == tmp_path / "step_00000003"
    checkpoint.read(path, {"model/x": mine})
    assert mine.tensor.tolist() == [1.0, 2.0]
    first = copies.pieces["model/x"]
    checkpoint.start(tmp_path, 4, {"model/x": piece([5.0, 6.0])}, facts, 2, None, copies).result()
    assert copies.pieces["model/x"] is first and first.tolist() == [5.0, 6.0]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("group", [None, "of all ranks"])
def test_a_save_in_the_background_talks_over_a_group_of_its_own_or_with_nobody(tmp_path, monkeypatch, group):
    asked, copies = [], Copies()
    monkeypatch.setattr(checkpoint.dcp, "async_save", lambda pieces, **how: asked.append((pieces, how)) or Future())
    mine = piece([1.0])
    saving = checkpoint.start(tmp_path, 3, {"model/x": mine}, FACTS, 1, group, copies)
    checkpoint.start(tmp_path, 3, {"model/x": mine}, FACTS, 1, group, copies, by_first=True)
    first, second = (how.pop("planner").dedup_save_to_lowest_rank for _, how in asked)
    assert (first, second) == (False, True)
    how = {"process_group": group, "async_stager": copies, "no_dist": group is None, "storage_writer": saving.writer}
    assert asked[0] == ({"model/x": mine.tensor}, how)


def test_a_piece_is_wrapped_as_its_whole_tensor_without_asking_another_rank(monkeypatch):
    made = []
    monkeypatch.setattr(checkpoint.DTensor, "from_local", lambda *given, **how: made.append((given, how)))
    mesh = SimpleNamespace(device_mesh={WITHIN_STAGE: "the stage's"})
    place, part = Placement("x", Spec((6, 4), ((1, "tp"),), partial_over=()), mesh), torch.zeros(6, 2)
    with torch.device("cuda"):  # no memory is taken for the whole
        checkpoint._wrap(part, place)
    how = {"run_check": False, "shape": (6, 4), "stride": (4, 1)}
    assert made == [((part, "the stage's", [Replicate(), Replicate(), Shard(1)]), how)]


def test_an_older_one_that_cannot_be_deleted_is_told_of_and_the_save_stands(tmp_path, monkeypatch):
    def no(*_):
        raise OSError("busy")

    monkeypatch.setattr(checkpoint, "rotate", no)
    saving = checkpoint.start(tmp_path, 3, {"model/x": piece([1.0])}, FACTS | {"optimizer_steps": 0}, 1, None, Copies())
    assert saving.result().is_dir()
    assert saving.writer.complaint == "an older checkpoint could not be deleted (OSError: busy)"
    assert [field.name for field in dataclasses.fields(saving)] == ["step", "writer", "future"]


@pytest.mark.parametrize("gpu", [False, True])
def test_copies_of_a_gpus_pieces_are_pinned_and_waited_for(monkeypatch, gpu):
    made, waited, real = [], [], torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(copies.pieces["x"].tolist()))

    def empty(shape, **options):
        made.append((shape, options.pop("pin_memory"), options))
        return real(shape, **options)

    overlap, copy = [], torch.Tensor.copy_

    def copied(into, piece, non_blocking=False):
        overlap.append(non_blocking)
        return copy(into, piece)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    copies, mine = Copies(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    staged = copies.stage({"x": mine})
    assert staged["x"] is copies.pieces["x"] and staged["x"] is not mine and staged["x"].tolist() == [1.0, 2.0]
    assert made == [((2,), gpu, {"dtype": torch.float64, "device": "cpu"})] and waited == [[1.0, 2.0]] * gpu
    assert overlap == [gpu]  # all pieces are on their way together
    copies.stage({"x": mine + 1})
    assert len(made) == 1 and staged["x"].tolist() == [2.0, 3.0]


def test_torchs_own_pages_on_a_failure_are_kept_back_and_then_no_more():
    root = logging.getLogger()
    before = root.level
    with pytest.raises(ValueError, match="inside"), checkpoint._quiet():
        assert root.level == logging.CRITICAL
        warnings.warn("of one process", stacklevel=1)
        raise ValueError("inside")
    assert root.level == before
    with pytest.warns(UserWarning, match="outside"):
        warnings.warn("outside", stacklevel=1)
