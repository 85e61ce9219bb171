import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heiretsu.data import shards
from heiretsu.data.shards import ShardWriter, check_vocab, read_shard, write_shard


def file_bytes(tokens, magic=20240520, version=1, count=None):
    """A shard by the letter of the format, without the writer under test."""
    count = len(tokens) if count is None else count
    return struct.pack("<256i", magic, version, count, *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 65535)), min_size=1).filter(any))
def test_shard_reads_back_as_written_and_is_the_format_to_the_byte(parts):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train_000000.bin")
        with ShardWriter(path) as shard:
            for part in parts:
                shard.append(part)
        tokens = [token for part in parts for token in part]
        assert path.read_bytes() == file_bytes(tokens)
        read = read_shard(path)
        assert read.dtype == np.uint16
        assert read.tolist() == tokens
        assert [p.name for p in Path(folder).iterdir()] == [path.name]


def test_shard_is_mapped_and_read_only(tmp_path):
    write_shard(tmp_path / "a.bin", [1, 2, 3])
    tokens = read_shard(tmp_path / "a.bin")
    assert isinstance(tokens.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 5


GOOD = file_bytes([7, 8, 9])
BAD_FILES = {
    "empty file": (b"", r"empty file \(0 bytes\)"),
    "headerless": (
        struct.pack("<2000H", *[50256] * 2000),
        r"starts with int32 -\d+, not with the magic number 20240520",
    ),
    "text": (b"Once upon a time " * 200, r"not with the magic number 20240520.*data/prepare.py"),
    "three bytes": (b"\x00\x01\x02", "fewer than 4 bytes"),
    "only the magic number": (GOOD[:4], "truncated: 4 bytes, but the header alone has 1024"),
    "header without its last byte": (GOOD[:1023], "truncated: 1023 bytes, but the header alone has 1024"),
    "header cut short": (GOOD[:500], r"truncated: 500 bytes, but the header alone has 1024"),
    "another version": (file_bytes([7], version=2), "shard version 2, only version 1"),
    "Llama 3": (file_bytes([7], magic=20240801, version=7), "Llama-3 shard of uint32"),
    "no tokens": (file_bytes([]), "empty shard"),
    "tokens cut short": (
        GOOD[:-2],
        r"truncated: the header says 3 tokens \(1030 bytes\), the file has 1028 bytes, .* 2",
    ),
    "half a token": (GOOD[:-1], r"truncated: the header says 3 tokens \(1030 bytes\), the file has 1029 bytes"),
    "only the header": (GOOD[:1024], "truncated: the header says 3 tokens"),
    "too many tokens": (GOOD + b"\0\0", r"header and size disagree: the header says 3 tokens .* room for 4"),
    "negative count": (file_bytes([7], count=-1), "header and size disagree: the header says -1 tokens"),
    "zero count with tokens": (file_bytes([7], count=0), "header and size disagree: the header says 0 tokens"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_refused_by_name_with_what_was_found(kind, tmp_path):
    content, message = BAD_FILES[kind]
    path = tmp_path / "train_000003.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.bin: no such token shard"):
        read_shard(tmp_path / "nowhere.bin")


@pytest.mark.parametrize("tokens", [[-1], [65536], [0, 70000, 1], [0.5], [[1, 2]]])
def test_tokens_that_do_not_fit_in_uint16_are_refused(tokens, tmp_path):
    with pytest.raises(ValueError, match=r"a\.bin: (token ids from|tokens must be)"):
        write_shard(tmp_path / "a.bin", tokens)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokens", [[0], [65535], np.array([], dtype=np.float64)])
def test_tokens_at_the_ends_of_uint16_are_taken(tokens, tmp_path):
    with ShardWriter(tmp_path / "a.bin") as shard:
        shard.append([7])
        shard.append(tokens)
    assert read_shard(tmp_path / "a.bin").tolist() == [7, *tokens]


def test_a_shard_counts_its_tokens_in_an_int32(tmp_path):
    with pytest.raises(ValueError, match=r"a\.bin: more than 2147483647 tokens in one shard; use smaller shards"):
        with ShardWriter(tmp_path / "a.bin") as shard:
            shard.num_tokens = 2**31 - 3
            shard.append([1, 2])
            assert shard.num_tokens == 2**31 - 1
            shard.append([3])
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    real, done = (shards.os.fsync, shards.os.replace), []

    def fsync(descriptor):
        done.append(("on the disk", shards.os.fstat(descriptor).st_size))
        real[0](descriptor)

    def replace(source, target):
        done.append(("named", Path(source).stat().st_size))
        real[1](source, target)

    monkeypatch.setattr(shards.os, "fsync", fsync)
    monkeypatch.setattr(shards.os, "replace", replace)
    write_shard(tmp_path / "a.bin", range(100))
    assert done == [("on the disk", 1224), ("named", 1224)]


def test_empty_shard_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="no tokens to write"):
        write_shard(tmp_path / "a.bin", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interrupted_writer_leaves_the_earlier_shard_and_nothing_else(interruption, tmp_path):
    path = tmp_path / "a.bin"
    write_shard(str(path), [1, 2, 3])
    with pytest.raises(interruption):
        with ShardWriter(path) as shard:
            shard.append([4, 5])
            raise interruption
    assert read_shard(str(path)).tolist() == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]
    assert shard._file.closed


@pytest.mark.parametrize("position", [0, 9, 10, 24])
def test_vocab_check_names_file_id_and_position_in_any_piece(position, monkeypatch):
    monkeypatch.setattr(shards, "_SCAN_TOKENS", 10)
    tokens = np.full(25, 256, dtype=np.uint16)
    check_vocab(tokens, 257, "train_000000.bin")
    tokens[position] = 257
    with pytest.raises(ValueError, match=rf"train_000000\.bin: token id 257 at position {position} .* size 257"):
        check_vocab(tokens, 257, "train_000000.bin")
    check_vocab(tokens, 258, "train_000000.bin")


def test_a_vocabulary_of_all_uint16_needs_no_check():
    tokens = np.array([65535], dtype=np.uint16)
    check_vocab(tokens, 65536, "a.bin")
    with pytest.raises(ValueError, match="token id 65535 at position 0 is not below the vocabulary size 65535"):
        check_vocab(tokens, 65535, "a.bin")
    with pytest.raises(ValueError, match="token id 70000 at position 0"):
        check_vocab(np.array([70_000]), 65536, "a.bin")


def test_vocab_check_stops_at_its_limit():
    tokens = np.array([1, 1, 300], dtype=np.uint16)
    check_vocab(tokens, 257, "a.bin", limit=2)
    with pytest.raises(ValueError, match="position 2"):
        check_vocab(tokens, 257, "a.bin", limit=3)
