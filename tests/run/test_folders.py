"""What a run writes to is made, tried and held; and what each rank says of it is said by all."""

import errno
import json
import os
import time
from types import SimpleNamespace

import pytest

from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import folders, lock
from heiretsu.run.folders import agreed, held_folder, make_folders
from heiretsu.run.lock import FolderLock
from heiretsu.run.options import parse_args

ALONE = abstract_mesh()


def config(**flags):
    return parse_args([word for name, value in flags.items() for word in (f"--{name}", str(value))], world_size=1)


@pytest.mark.parametrize(
    "others, complaint",
    [
        ([None, None], None),
        ([None, "no room"], "no room (on rank 1)"),
        (["no room", "none either"], "no room"),
    ],
)
def test_what_fails_on_any_rank_is_told_by_all(monkeypatch, others, complaint):
    mesh = abstract_mesh(dp=2)

    def gather_objects(mine, axis):
        assert axis is mesh.world
        return [mine or others[0], others[1]]

    monkeypatch.setattr(folders, "gather_objects", gather_objects)
    done = []
    if complaint is None:
        agreed(mesh, lambda: done.append(1))
        assert done == [1]
        return
    with pytest.raises(ValueError) as refusal:
        agreed(mesh, lambda: done.append(1))
    assert str(refusal.value) == complaint and done == [1]


@pytest.mark.parametrize("error", [ValueError("bad"), OSError("bad")])
def test_what_this_rank_fails_with_is_told_in_its_words(error):
    def fail():
        raise error

    with pytest.raises(ValueError, match="^bad$"):
        agreed(ALONE, fail)


def test_a_folder_is_held_while_a_run_lasts_and_tidied_at_its_beginning(tmp_path):
    half_done = tmp_path / ".step_00000002.part"
    half_done.mkdir()
    said = []
    with held_folder(config(checkpoint_dir=tmp_path), ALONE, said.append):
        assert not half_done.exists()
        holder = json.loads((tmp_path / ".lock").read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), lock.socket.gethostname())
        with pytest.raises(ValueError, match="another run is using it"):
            FolderLock(tmp_path).take(grace_s=0.0)
    assert FolderLock(tmp_path).take(grace_s=0.0) is None and said == []


def test_without_a_folder_and_on_other_ranks_nothing_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "FolderLock", lambda folder: pytest.fail("a lock was made"))
    monkeypatch.setattr(folders, "gather_objects", lambda mine, axis: [mine])
    with held_folder(config(), ALONE):
        pass
    with held_folder(config(checkpoint_dir=tmp_path), abstract_mesh(dp=2, rank=1)):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    said = []
    with held_folder(config(checkpoint_dir=tmp_path), ALONE, said.append):
        pass
    where = f"{tmp_path}: its file system has no locks; nothing keeps another run out of the folder"
    assert said == [f"warning: {where}"]


def test_the_folders_of_a_run_are_made_and_tried_each_by_the_ranks_that_write_there(tmp_path, monkeypatch):
    made = config(checkpoint_dir=tmp_path / "a" / "b", profile=tmp_path / "p", log_file=tmp_path / "l" / "log.jsonl")
    make_folders(made, rank=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "p"]
    make_folders(made, rank=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "l", "p"]
    assert list((tmp_path / "l").iterdir()) == list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "l" / "log.jsonl").write_text("kept")
    make_folders(made, rank=0)
    make_folders(config(), rank=0)
    assert (tmp_path / "l" / "log.jsonl").read_text() == "kept"


@pytest.mark.parametrize("flag", ["checkpoint_dir", "profile", "log_file"])
def test_a_folder_that_cannot_be_written_to_is_refused_by_its_flag(tmp_path, flag):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "x"
    value = folder / "log.jsonl" if flag == "log_file" else folder
    with pytest.raises(ValueError) as refusal:
        make_folders(config(**{flag: value}), rank=0)
    assert str(refusal.value) == f"--{flag}: cannot write to the folder {folder}: Not a directory"


def test_writing_is_tried_with_a_byte_under_a_name_of_the_ranks_own(tmp_path, monkeypatch):
    tried = []
    real = folders.Path.write_bytes
    monkeypatch.setattr(
        folders.Path, "write_bytes", lambda path, data: tried.append((path.name, data)) or real(path, data)
    )
    make_folders(config(checkpoint_dir=tmp_path), rank=3)
    assert tried == [(f".writable.3.{os.getpid()}", b"x")] and list(tmp_path.iterdir()) == []


def test_a_log_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError) as refusal:
        make_folders(config(log_file=tmp_path), rank=0)
    assert str(refusal.value) == f"--log_file {tmp_path} cannot be written: Is a directory"


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """A lock that another process holds until `free_at`, on a clock that only waiting moves."""
    state = SimpleNamespace(now=50.0, free_at=1e9, asked=[], error=errno.EWOULDBLOCK)

    def flock(file, how):
        state.asked.append(state.now)
        assert how == lock.fcntl.LOCK_EX | lock.fcntl.LOCK_NB
        if state.now < state.free_at:
            raise OSError(state.error, "taken")

    def sleep(seconds):
        state.now = round(state.now + seconds, 6)

    clock = SimpleNamespace(monotonic=lambda: state.now, sleep=sleep, strftime=time.strftime)
    monkeypatch.setattr(lock, "time", clock)
    monkeypatch.setattr(lock.fcntl, "flock", flock)
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return state


@pytest.mark.parametrize(
    "written, who",
    [
        ('{"pid": 7, "host": "elm", "since": "noon", "job": null}', "process 7 on elm, since noon"),
        ("{}", "process ? on a machine unknown, since a time unknown"),
        ("[7]", "process ? on a machine unknown, since a time unknown"),
        ("no JSON", "process ? on a machine unknown, since a time unknown"),
    ],
)
def test_who_holds_a_folder_is_named_after_three_seconds(tmp_path, taken, written, who):
    (tmp_path / ".lock").write_text(written)
    held = FolderLock(tmp_path)
    with pytest.raises(ValueError) as refusal:
        held.take()
    assert str(refusal.value) == (
        f"--checkpoint_dir {tmp_path}: another run is using it ({who}): end that one, or choose another folder"
    )
    assert taken.now == pytest.approx(53.1) and taken.asked[:3] == [50.0, 50.1, 50.2] and held.file is None


@pytest.mark.parametrize(
    "environment, job, waits",
    [
        ({"SLURM_JOB_ID": "77"}, '"77"', True),
        ({"SLURM_JOB_ID": "77", "TORCHELASTIC_RUN_ID": "88"}, '"77"', True),
        ({"TORCHELASTIC_RUN_ID": "88"}, '"88"', True),
        ({"TORCHELASTIC_RUN_ID": "none"}, '"none"', False),
        ({"SLURM_JOB_ID": "77"}, '"78"', False),
        ({}, "null", False),
    ],
)
def test_a_predecessor_of_the_same_job_is_waited_for_two_minutes(tmp_path, taken, monkeypatch, environment, job, waits):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".lock").write_text(f'{{"job": {job}}}')
    taken.free_at = 169.9
    held = FolderLock(tmp_path)
    if not waits:
        with pytest.raises(ValueError):
            held.take()
        assert taken.now == pytest.approx(53.1)
        return
    assert held.take() is None and taken.now == pytest.approx(169.9)
    held.release()
    kept = json.loads((tmp_path / ".lock").read_text())
    assert kept["job"] == json.loads(job) and kept["pid"] == os.getpid()
    assert kept["host"] == lock.socket.gethostname() and time.strptime(kept["since"], "%Y-%m-%d %H:%M:%S")
    taken.free_at, taken.now = 1e9, 50.0
    with pytest.raises(ValueError):
        held.take()
    assert taken.now == pytest.approx(170.1)


def test_what_else_the_system_answers_is_passed_on_and_some_of_it_means_there_are_no_locks(tmp_path, taken):
    for taken.error in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
        held = FolderLock(tmp_path)
        assert held.take().endswith(": its file system has no locks; nothing keeps another run out of the folder")
        assert held.file is None
    taken.error = errno.EIO
    with pytest.raises(OSError, match="taken"):
        FolderLock(tmp_path).take()
    taken.error = errno.EACCES
    with pytest.raises(ValueError, match="another run is using it"):
        FolderLock(tmp_path).take()
