"""What makes a checkpoint provable, to the last word and on both sides of every bound: on folders of a few bytes."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from heiretsu.parallel import checkpoint_seal
from heiretsu.parallel.checkpoint_seal import brief, fingerprint, problem, read_json, read_run, read_seal, seal, verify
from heiretsu.parallel.mesh import Axis

RUN = {
    "format": 2,
    "step": 7,
    "optimizer_steps": 5,
    "scaler": {"scale": 1024.0, "growth": 2, "good_steps": 1},
    "config": {"model": {}, "dtype": "float32"},
}
MOST = 10**15 - 1


def sealed(folder: Path, run=RUN, **files: bytes) -> Path:
    folder.mkdir()
    contents = {"run.json": json.dumps(run).encode(), ".metadata": b"m", **files}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    seal(folder, {name: fingerprint(folder / name) for name in contents})
    return folder


@pytest.mark.parametrize(
    "name, step",
    [
        ("step_00000200", 200),
        ("step_999999999999999", MOST),
        ("step_0000200", -1),
        ("step_1000000000000000", -1),
        ("step_00000200.part", -1),
        (".step_00000200", -1),
        ("best", -1),
    ],
)
def test_a_step_is_eight_to_fifteen_digits(name, step):
    assert checkpoint_seal.step_of(Path("a", name)) == step


SCALER = RUN["scaler"]
BAD = [
    ({"step": -1, "optimizer_steps": 0}, "step -1"),
    ({"step": MOST + 1}, f"step {MOST + 1}"),
    ({"step": True}, "step True"),
    ({"step": 7.0}, "step 7.0"),
    ({"step": None}, "step None"),
    ({"optimizer_steps": 8}, "optimizer_steps 8"),
    ({"optimizer_steps": -1}, "optimizer_steps -1"),
    ({"optimizer_steps": "5"}, "optimizer_steps '5'"),
    ({"scaler": 1.0}, "scaler 1.0"),
    ({"scaler": {"scale": 1.0, "growth": 0}}, "scaler {'scale': 1.0, 'growth': 0}"),
    *(
        ({"scaler": SCALER | bad}, f"scaler {SCALER | bad}")
        for bad in (
            {"scale": 0},
            {"scale": -1.0},
            {"scale": "1"},
            {"scale": True},
            {"scale": float("inf")},
            {"growth": -1},
            {"growth": 1.0},
            {"good_steps": -1},
            {"good_steps": None},
        )
    ),
    ({"scaler": SCALER | {"growth": MOST + 1}}, None),
    ({"scaler": SCALER | {"good_steps": MOST + 1}}, None),
    ({"config": None}, "config None"),
    ({"config": {"dtype": "float32"}}, "config {'dtype': 'float32'}"),
    ({"config": {"model": [], "dtype": "float32"}}, "config {'model': [], 'dtype': 'float32'}"),
    ({"config": {"model": {}, "dtype": "float16"}}, "dtype 'float16'"),
    ({"config": {"model": {}}}, "dtype None"),
]
GOOD = [
    {},
    {"step": 0, "optimizer_steps": 0},
    {"step": MOST, "optimizer_steps": MOST},
    {"optimizer_steps": 7},
    {"scaler": {"scale": 1, "growth": 0, "good_steps": 0}},
    {"scaler": {"scale": 1e-9, "growth": MOST, "good_steps": MOST, "more": None}},
    {"config": {"model": {"n_layer": 2}, "dtype": "float64"}},
]


@pytest.mark.parametrize("change, why", BAD, ids=str)
def test_a_number_that_run_json_cannot_hold_is_named(tmp_path, change, why):
    path = sealed(tmp_path / "best", RUN | change)
    said = f"{path}: run.json has {why}: damaged"
    found = problem(read_run, path)
    assert found == said if why else found.startswith(f"{path}: run.json has scaler {{'scale': 1024.0, 'growth': ")


def test_every_number_that_a_run_may_hold_is_read(tmp_path):
    for index, change in enumerate(GOOD):
        path = sealed(tmp_path / f"run{index}", RUN | change)
        assert read_run(path) == read_run(str(path)) == RUN | change


def test_the_step_is_that_of_the_folders_name(tmp_path):
    assert read_run(sealed(tmp_path / "step_00000007"))["step"] == 7
    path = sealed(tmp_path / "step_00000008")
    assert problem(read_run, path) == f"{path}: run.json has step 7, but the folder's name says 8: damaged"


@pytest.mark.parametrize("given", [0, 3, True, 2.0, "2", None, "x" * 100])
def test_a_format_that_cannot_be_read_is_named(tmp_path, given):
    path = sealed(tmp_path / "best", RUN | {"format": given})
    named = repr(given) if given != "x" * 100 else "'" + "x" * 76 + "..."
    assert problem(read_run, path) == f"{path}: run.json has checkpoint format {named}, only 2 and older can be read"


def test_what_is_missing_is_named(tmp_path):
    path = tmp_path / "step_00000007"
    assert problem(read_run, path) == f"{path}: there is no such checkpoint"
    path.mkdir()
    both = f"{path}: not a complete checkpoint: run.json and .metadata missing"
    assert problem(read_run, path) == both
    (path / "run.json").write_text(json.dumps(RUN))
    assert problem(read_run, path) == both.replace("run.json and ", "")
    (path / ".metadata").write_bytes(b"m")
    assert problem(read_run, path) == problem(read_seal, path) == f"{path}: not a complete checkpoint: {SEAL} missing"


SEAL = "checksums.json"


def test_the_seal_is_this_file_and_lies_on_the_disk(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(handle):
        there = os.fstat(handle)
        synced.append((there.st_ino, there.st_size if stat.S_ISREG(there.st_mode) else None))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"")
    prints = {name: fingerprint(tmp_path / name) for name in ("b", "a")}
    assert prints["b"] == {"bytes": 3, "sha256": hashlib.sha256(b"two").hexdigest()}
    seal(tmp_path, prints)
    ordered = json.dumps({"a": prints["a"], "b": prints["b"]}, sort_keys=True).encode()
    whole = {"files": prints, "sha256": hashlib.sha256(ordered).hexdigest()}
    assert (tmp_path / SEAL).read_text() == json.dumps(whole, indent=1)
    written = (tmp_path / SEAL).stat()
    assert synced == [(written.st_ino, written.st_size), (tmp_path.stat().st_ino, None)]
    assert read_seal(tmp_path) == prints
    for broken in ({"files": prints}, {"files": [1], "sha256": "x"}, {"files": {}, "sha256": whole["sha256"]}):
        (tmp_path / SEAL).write_text(json.dumps(broken))
        said = f"{tmp_path}: {SEAL} is not as it was written: the checkpoint is damaged"
        assert problem(read_seal, tmp_path) == said


def test_only_what_lies_here_as_it_was_written_is_sealed(tmp_path):
    ask = "where rank 0 looks: do all nodes share the folder of --checkpoint_dir?"
    with pytest.raises(OSError) as refused:
        seal(tmp_path, {"a": {"bytes": 3}})
    assert str(refused.value) == f"a is not there {ask}"
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(OSError) as refused:
        seal(tmp_path, {"a": {"bytes": 3}})
    assert str(refused.value) == f"a has 0 bytes, not 3 {ask}"
    assert not (tmp_path / SEAL).exists()


def test_a_folder_that_cannot_be_synced_is_left_as_it_is_and_closed(tmp_path, monkeypatch):
    closed, real = [], os.close

    def no(*_):
        raise OSError("not here")

    monkeypatch.setattr(os, "close", lambda handle: (closed.append(handle), real(handle)))
    monkeypatch.setattr(os, "fsync", no)
    checkpoint_seal.sync_folder(tmp_path)
    assert len(closed) == 1
    monkeypatch.setattr(os, "open", no)
    checkpoint_seal.sync_folder(tmp_path)
    assert len(closed) == 1


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1])
def test_a_file_is_hashed_to_its_end(tmp_path, size):
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "f").write_bytes(content[:size])
    assert fingerprint(tmp_path / "f") == {"bytes": size, "sha256": hashlib.sha256(content[:size]).hexdigest()}


def test_what_a_disk_did_to_a_file_is_named(tmp_path):
    path = sealed(tmp_path / "best", data=b"abc", other=b"d")
    verify(path)
    (path / "data").write_bytes(b"abd")
    read_run(path)  # looks at lengths alone
    flipped = f"{path}: data does not have the checksum that was written: damaged"
    assert problem(verify, path) == flipped
    (path / "data").write_bytes(b"ab")
    assert problem(verify, path) == f"{path}: data has 2 bytes, not the 3 that were written: damaged"
    (path / "data").unlink()
    assert problem(verify, path) == f"{path}: not a complete checkpoint: data missing"
    (path / "data").write_bytes(b"abc")
    verify(path)
    (path / "run.json").write_text(json.dumps(RUN).replace("7", "6"))
    assert problem(read_run, path) == flipped.replace("data", "run.json")


def test_the_files_are_dealt_out_by_size_and_each_is_read_once(tmp_path, monkeypatch):
    path = sealed(tmp_path / "best", a=b"." * 500, b=b"." * 400, c=b"." * 400, d=b"." * 1000)
    checked: list[str] = []
    monkeypatch.setattr(checkpoint_seal, "_check_digest", lambda path, name, files: checked.append(name))
    by_rank = []
    for rank in range(3):
        checked.clear()
        checkpoint_seal._check_share(path, Axis("world", 3, rank, (0, 1, 2)))
        by_rank.append(sorted(set(checked) - {"run.json", ".metadata"}))
    assert by_rank == [["d"], ["a"], ["b", "c"]]


def test_the_rank_that_saw_the_damage_is_named(tmp_path, monkeypatch):
    path = sealed(tmp_path / "best", data=b"abc")
    monkeypatch.setattr(checkpoint_seal, "gather_objects", lambda mine, axis: [mine, "it is broken"])
    assert problem(verify, path) == "it is broken (seen by rank 1)"
    (path / "data").write_bytes(b"abd")
    assert problem(verify, path) == f"{path}: data does not have the checksum that was written: damaged"


def test_of_an_earlier_version_a_file_that_is_too_short_is_named(tmp_path):
    path = tmp_path / "best"
    dcp.save({"x": torch.arange(8)}, checkpoint_id=path, no_dist=True)
    (path / "run.json").write_text(json.dumps(RUN | {"format": 1}))
    (data,) = path.glob("*.distcp")
    whole = data.read_bytes()
    assert read_run(path)["format"] == 1
    verify(path)
    data.write_bytes(whole + b"more")
    verify(path)
    data.write_bytes(whole[:-1])
    assert problem(read_run, path) == f"{path}: {data.name} has {len(whole) - 1} bytes, not {len(whole)}: damaged"
    data.unlink()
    assert problem(verify, path) == f"{path}: not a complete checkpoint: {data.name} missing"
    (path / ".metadata").write_bytes(b"m")
    assert problem(read_run, path).startswith(f"{path}: .metadata cannot be read (")
    assert problem(read_run, path).endswith("): damaged")
    (path / SEAL).write_text("{}")  # which an earlier version does not write
    assert problem(read_run, path) == f"{path}: {SEAL} is not as it was written: the checkpoint is damaged"


def test_a_file_that_the_disk_does_not_give_back_is_named(tmp_path, monkeypatch):
    path = sealed(tmp_path / "best", data=b"x")

    def fingerprint(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_seal, "fingerprint", fingerprint)
    said = problem(checkpoint_seal._check_digest, path, "data", {})
    assert said == f"{path}: data cannot be read (OSError: [Errno 5] Input/output error)"


def test_what_is_no_json_object_is_quoted_in_brief(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(list(range(100))))
    start = repr(list(range(100)))[:77]
    assert problem(read_json, file) == f"{tmp_path}: x.json holds {start}..., not an object: damaged"
    file.write_text("{")
    said = problem(read_json, file)
    assert said.startswith(f"{tmp_path}: x.json cannot be read (JSONDecodeError: ") and said.endswith("): damaged")
    file.write_text("[" * 10**6)
    assert problem(read_json, file).startswith(f"{tmp_path}: x.json cannot be read (RecursionError: ")
    assert "cannot be read (FileNotFoundError: " in problem(read_json, tmp_path / "none.json")


def test_brief_is_one_line_of_so_many_letters():
    assert brief("a" * 78) == "'" + "a" * 78 + "'" and len(brief("a" * 78)) == 80
    assert brief("a" * 79) == "'" + "a" * 76 + "..." and len(brief("a" * 79)) == 80
    assert brief(ValueError("two\n  lines ")) == "ValueError: two lines"
    assert brief([1, 2, 3], 9) == "[1, 2, 3]" and brief([1, 2, 3], 8) == "[1, 2..."
