import json

import pytest

from heiretsu.data.folder import find_shards, first_chunks, read_meta, shard_name, tokenizer_of, write_meta

COUNTS = {"tokens": 10, "bytes": 30, "documents": 2, "shards": 1}
META = {"tokenizer": "gpt2", "vocab_size": 50257, "end_of_text": 50256, "splits": {"train": COUNTS, "val": COUNTS}}
ZEROS = [("train", "tokens"), ("train", "bytes"), ("val", "tokens"), ("val", "bytes")]


def make(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    "train, val",
    [
        (["fineweb_train_000001.bin", "fineweb_train_000002.bin"], ["fineweb_val_000000.bin"]),
        (["train_000000.bin", "train_000001.bin", "train_000010.bin"], ["val_000000.bin", "val_000001.bin"]),
        (["tiny_shakespeare_train.bin"], ["tiny_shakespeare_val.bin"]),
        (["train.bin"], ["val.bin"]),
    ],
)
def test_shards_are_found_by_split_in_the_order_of_their_names(train, val, tmp_path):
    make(
        tmp_path, *reversed(train), *reversed(val), "meta.json", "constrain.bin", "retrain_000000.bin", "evaluation.bin"
    )
    found = find_shards(str(tmp_path))
    assert [path.name for path in found["train"]] == train
    assert [path.name for path in found["val"]] == val


def test_names_that_prepare_gives_are_found(tmp_path):
    make(tmp_path, shard_name("train", 3), shard_name("val", 0))
    assert {split: [p.name for p in paths] for split, paths in find_shards(tmp_path).items()} == {
        "train": ["train_000003.bin"],
        "val": ["val_000000.bin"],
    }


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"--data_dir {tmp_path}/nowhere: no such folder"):
        find_shards(tmp_path / "nowhere")


@pytest.mark.parametrize("present, missing", [("val", "train"), ("train", "val")])
def test_missing_split_is_named_with_the_way_to_make_it(present, missing, tmp_path):
    make(tmp_path, f"fineweb_{present}_000001.bin")
    with pytest.raises(ValueError, match=rf"--data_dir {tmp_path}: no {missing} shards .*prepare\.py.*fineweb\.py"):
        find_shards(tmp_path)


def test_two_data_sets_in_one_folder_are_refused(tmp_path):
    make(tmp_path, "fineweb_train_000001.bin", "fineweb_val_000000.bin", "train_000000.bin", "val_000000.bin")
    with pytest.raises(ValueError, match=r"more than one data set \(train_\*\.bin, fineweb_\*\.bin\)"):
        find_shards(tmp_path)


def test_chunks_are_the_first_ones(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    assert first_chunks(tmp_path, "train", paths, None) == paths
    assert first_chunks(tmp_path, "train", paths, 3) == paths
    assert first_chunks(tmp_path, "train", paths, 1) == paths[:1]


@pytest.mark.parametrize("chunks", [0, -1, 4])
def test_more_chunks_than_there_are_is_an_error_with_both_numbers(chunks, tmp_path):
    with pytest.raises(ValueError, match=rf"--num_val_chunks {chunks}: .*{tmp_path} has 3 val shard"):
        first_chunks(tmp_path, "val", [tmp_path] * 3, chunks)


def test_meta_reads_back_and_names_the_tokenizer(tmp_path):
    assert read_meta(tmp_path) is None
    assert tokenizer_of(tmp_path) == "gpt2"
    one_each = META | {"splits": dict.fromkeys(("train", "val"), dict.fromkeys(COUNTS, 1)), "vocab_size": 1}
    write_meta(tmp_path, one_each)
    assert read_meta(tmp_path) == one_each
    write_meta(tmp_path, META | {"tokenizer": "bytes"})
    text = (tmp_path / "meta.json").read_text()
    assert text.startswith('{\n  "tokenizer": "bytes",\n') and text.endswith("\n}\n")  # to be read by people, too
    assert read_meta(tmp_path) == META | {"tokenizer": "bytes"}
    assert tokenizer_of(tmp_path) == "bytes"
    assert tokenizer_of(None) == "bytes"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"tokenizer": "gpt2"}', json.dumps(META)[:-3], "null"]
    + [json.dumps(META | change) for change in ({"tokenizer": 5}, {"vocab_size": 0})]
    + [json.dumps(META | {"splits": META["splits"] | {split: COUNTS | {key: 0}}}) for split, key in ZEROS],
)
def test_damaged_meta_is_refused_by_name(content, tmp_path):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/meta\.json: not what data/prepare\.py writes"):
        read_meta(tmp_path)
