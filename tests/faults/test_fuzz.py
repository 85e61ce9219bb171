"""Random damage to what a run reads, by hypothesis: refused in one line, or read identically. Never a traceback."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heiretsu.data.batches import TokenDataset
from heiretsu.data.shards import HEADER_BYTES, read_shard, write_shard
from heiretsu.kernels import plain
from heiretsu.model.config import ModelConfig
from heiretsu.parallel.checkpoint_seal import SEAL, fingerprint, read_run, seal, verify
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import state
from heiretsu.run.building import build_engine
from heiretsu.run.conversion import INDEX, WEIGHTS, export_model, read_model, read_tensors
from heiretsu.run.options import parse_args
from heiretsu.run.resume import changes
from heiretsu.run.saved import load_model

MODEL = ["--n_layer", "1", "--n_head", "2", "--n_embed", "16", "--block_size", "16"]
often = settings(max_examples=60, deadline=None, database=None, derandomize=True)
CASES = settings(often, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damages(size: int):
    """What can happen to a file of so many bytes: a function of its bytes."""
    place = st.integers(0, max(0, size - 1))
    flip = st.tuples(place, st.integers(0, 7)).map(lambda at: lambda data: flipped(data, *at))
    cut = place.map(lambda at: lambda data: data[:at])
    longer = st.binary(min_size=1, max_size=9).map(lambda more: lambda data: data + more)
    spoiled = st.tuples(place, st.binary(min_size=1, max_size=40)).map(
        lambda at: lambda data: data[: at[0]] + at[1] + data[at[0] + len(at[1]) :]
    )
    moved = place.map(lambda at: lambda data: data[at:] + data[:at])
    return st.one_of(flip, cut, longer, spoiled, moved)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


@contextlib.contextmanager
def damaged(file: Path, content: bytes):
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield before == content
    finally:
        file.write_bytes(before)


def one_line(error: ValueError, *names: str) -> None:
    assert str(error) and "\n" not in str(error), error
    assert any(name in str(error) for name in names), error


# anything that JSON can say, numbers without a bound and text without sense among it
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.integers(-3, 9), st.floats(), st.text(max_size=9)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, and its parameters."""
    config = parse_args(MODEL, world_size=1)
    engine = build_engine(config, abstract_mesh(), plain)
    path = state.save(tmp_path_factory.mktemp("saved"), 3, engine, json.loads(config.to_json()), keep=1)
    return path, {name: param.detach().clone() for name, param in engine.params.items()}


@given(data=st.data())
@CASES
def test_bytes_of_a_checkpoint(saved, data, record_property):
    record_property("fault", "hypothesis: bytes of a checkpoint's files flipped, cut, added, overwritten, moved")
    path, params = saved
    file = path / data.draw(st.sampled_from(sorted(file.name for file in path.iterdir())))
    content = data.draw(damages(file.stat().st_size))(file.read_bytes())
    with damaged(file, content) as same:
        try:
            model, _ = load_model(path, plain)
        except ValueError as error:
            one_line(error, file.name)
            assert not same
        else:
            assert all(torch.equal(param, params[name]) for name, param in model.named_parameters())
    record_property("outcome", "each refused by the file's name, or the same parameters")


@pytest.mark.full
@given(data=st.data())
@CASES
def test_files_of_a_checkpoint_swapped_or_lost(saved, data, record_property):
    record_property("fault", "hypothesis: files of a checkpoint swapped with each other, or lost")
    path, _ = saved
    one, two = data.draw(st.lists(st.sampled_from(sorted(path.iterdir())), min_size=2, max_size=2))
    kept = {file: file.read_bytes() for file in path.iterdir()}
    try:
        if data.draw(st.booleans()):
            one.write_bytes(kept[two])
            two.write_bytes(kept[one])
        else:
            one.unlink()
        if {file: file.read_bytes() for file in path.iterdir()} == kept:
            verify(path)
            return
        with pytest.raises(ValueError) as refused:
            verify(path)
        one_line(refused.value, one.name, two.name)
    finally:
        for file, content in kept.items():
            file.write_bytes(content)
    record_property("outcome", "each refused by the name of one of them")


@pytest.mark.full
@pytest.mark.parametrize("sealed", [True, False], ids=["checksums made to fit", "of an earlier version"])
@given(data=st.data())
@CASES
def test_fields_of_run_json(saved, sealed, data, record_property):
    record_property(
        "fault",
        f"hypothesis: fields of run.json replaced, at any depth ({'sealed again' if sealed else 'no checksums'})",
    )
    path, params = saved
    names = ["run.json", SEAL]
    kept = {name: (path / name).read_bytes() for name in names}
    run = json.loads(kept["run.json"])
    where = run
    while True:
        key = data.draw(st.sampled_from(sorted(where)))
        if not isinstance(where[key], dict) or data.draw(st.booleans()):
            break
        where = where[key]
    where[key] = data.draw(VALUES)
    try:
        (path / SEAL).unlink()
        if not sealed:
            run["format"] = 1 if key != "format" else run["format"]
        (path / "run.json").write_text(json.dumps(run))
        if sealed:
            seal(path, {file.name: fingerprint(file) for file in path.iterdir()})
        try:
            found = read_run(path)
            model, _ = load_model(path, plain)
        except ValueError as error:
            one_line(error, "run.json", "format", SEAL, "damaged")
        else:
            assert found["step"] == 3 and all(torch.equal(p, params[name]) for name, p in model.named_parameters())
    finally:
        for name in names:
            (path / name).write_bytes(kept[name])
    record_property("outcome", "each refused in one line, or the same parameters of the same step")


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "train_000000.bin"
    write_shard(path, np.random.default_rng(3).integers(257, size=500))
    return path, read_shard(path).copy()


@given(data=st.data())
@CASES
def test_bytes_of_a_token_shard(shard, saved, data, record_property):
    record_property("fault", "hypothesis: bytes of a .bin shard flipped, cut, added, overwritten, moved")
    path, tokens = shard
    whole = TokenDataset([path], 16, 0, 257).digest()
    size = data.draw(st.sampled_from([16, HEADER_BYTES, path.stat().st_size]))  # the header's start, the header, all
    with damaged(path, data.draw(damages(size))(path.read_bytes())):
        try:
            found = TokenDataset([path], 16, 0, 257)
        except ValueError as error:
            one_line(error, path.name)
        else:
            # The format has no checksum. What the tokens were is in the digest that each checkpoint holds.
            if not np.array_equal(read_shard(path), tokens):
                run = read_run(saved[0]) | {"data": whole}
                assert changes(run, run["config"], found.digest()) == ["the training data has other tokens"]
    record_property("outcome", "each refused by name, or the same tokens, or a resumed run is refused: other tokens")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hugging Face folder, and what is imported from it."""
    config = parse_args([*MODEL, "--tokenizer", "bytes"], world_size=1)
    engine = build_engine(config, abstract_mesh(), plain)
    folder = tmp_path_factory.mktemp("published")
    path = state.save(folder / "ours", 0, engine, json.loads(config.to_json()), keep=1)
    return export_model(path, folder / "theirs"), config.model


def imported(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    config, weights = read_model(folder)
    return config.model, weights


@pytest.mark.full
@given(data=st.data())
@CASES
def test_the_head_of_a_safetensors_file(published, data, record_property):
    record_property("fault", "hypothesis: the header of a safetensors file flipped, cut or overwritten, or its end cut")
    folder, _ = published
    file = folder / WEIGHTS
    _, weights = imported(folder)
    before = file.read_bytes()
    head = 8 + int.from_bytes(before[:8], "little")
    if data.draw(st.booleans()):
        content = data.draw(damages(head))(before[:head]) + before[head:]
    else:
        content = before[: data.draw(st.integers(0, len(before) - 1))]
    with damaged(file, content):
        try:
            _, found = imported(folder)
        except ValueError as error:
            one_line(error, file.name, "tensor", "shape", "weights")
        else:
            assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    record_property("outcome", "each refused in one line, or the same weights")


@pytest.mark.full
@given(data=st.data())
@CASES
def test_fields_of_a_hugging_face_config(published, data, record_property):
    record_property(
        "fault", "hypothesis: config.json of a Hugging Face folder with fields replaced, or its bytes damaged"
    )
    folder, model = published
    file = folder / "config.json"
    if data.draw(st.booleans()):
        content = data.draw(damages(file.stat().st_size))(file.read_bytes())
    else:
        theirs = json.loads(file.read_text())
        theirs[data.draw(st.sampled_from(sorted(theirs)))] = data.draw(VALUES)
        content = json.dumps(theirs).encode()
    with damaged(file, content):
        try:
            found, _ = imported(folder)
        except ValueError as error:
            one_line(error, "config.json", str(folder), "shape", "tensor")
        else:
            # How many heads share a width is in no tensor's shape: only here. The rest must be what it was.
            assert {**vars(found), "n_head": 0} == {**vars(model), "n_head": 0, "dropout": 0.0}
    record_property("outcome", "each refused in one line, or the same model")


def test_an_index_that_names_no_files(published, tmp_path, record_property):
    record_property("fault", "model.safetensors.index.json as a list, without its map, or with numbers for names")
    folder = Path(shutil.copytree(published[0], tmp_path / "theirs"))
    for content in ("[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{", '{"weight_map": {"a": "gone"}}'):
        (folder / INDEX).write_text(content)
        with pytest.raises(ValueError) as refused:
            read_tensors(folder)
        one_line(refused.value, str(folder))
    record_property("outcome", "each refused in one line")
