import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest.mock
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heiretsu.data import prepare as script
from heiretsu.data.batches import open_data
from heiretsu.data.folder import read_meta
from heiretsu.data.prepare import prepare
from heiretsu.data.shards import read_shard
from heiretsu.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
EOT = 256
STORY = "Once upon a time there was a mesh of four axes.\nIt had no rank.\n\n"


def tokens_of(folder, split):
    return np.concatenate([read_shard(path) for path in sorted(folder.glob(f"{split}_*.bin"))]).tolist()


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_documents_are_the_files_in_order_each_after_end_of_text(tmp_path):
    files = [write(tmp_path / name, name * 50 + "\n") for name in ("b.txt", "a.txt", "c.txt")]
    val = write(tmp_path / "held_out.txt", STORY)
    meta = prepare(files, tmp_path / "out", "bytes", val_files=[val])
    expected = [token for file in files for token in (EOT, *file.read_bytes())]
    assert tokens_of(tmp_path / "out", "train") == expected
    assert tokens_of(tmp_path / "out", "val") == [EOT, *STORY.encode()]
    assert left_in(tmp_path / "out") == ["meta.json", "train_000000.bin", "val_000000.bin"]
    assert (
        meta
        == read_meta(tmp_path / "out")
        == {
            "tokenizer": "bytes",
            "vocab_size": 257,
            "end_of_text": 256,
            "splits": {
                "train": {"tokens": len(expected), "bytes": len(expected) - 3, "documents": 3, "shards": 1},
                "val": {"tokens": len(STORY) + 1, "bytes": len(STORY), "documents": 1, "shards": 1},
            },
        }
    )


def test_validation_is_the_end_of_the_text_cut_at_a_line(tmp_path):
    lines = [f"line {i:04d}\n" for i in range(1000)]
    files = [write(tmp_path / "a.txt", "".join(lines[:600])), write(tmp_path / "b.txt", "".join(lines[600:]))]
    prepare(files, tmp_path / "out", "bytes", val_fraction=0.1)
    train, val = (bytes(t for t in tokens_of(tmp_path / "out", s) if t != EOT).decode() for s in ("train", "val"))
    assert train + val == "".join(lines)
    assert train.endswith("line 0900") or train.endswith("line 0899")
    assert val.startswith("\nline 090")


def test_validation_cut_in_one_long_line_falls_between_words(tmp_path):
    file = write(tmp_path / "a.txt", "word " * 1000)
    prepare([file], tmp_path / "out", "bytes", val_fraction=0.25)
    assert bytes(tokens_of(tmp_path / "out", "val")[1:]).decode() == " word" * 249 + " "


def test_validation_takes_whole_files_after_the_cut(tmp_path):
    files = [write(tmp_path / f"{i}.txt", f"{i}" * 100) for i in range(10)]
    prepare(files, tmp_path / "out", "bytes", val_fraction=0.2)
    assert tokens_of(tmp_path / "out", "val") == [EOT, *b"8" * 100, EOT, *b"9" * 100]


def test_separator_makes_documents_and_keeps_them_whole(tmp_path):
    documents = [f"story {i}\n" * (i + 1) for i in range(40)]
    file = write(tmp_path / "stories.txt", "<|endoftext|>".join(documents) + "<|endoftext|>\n")
    meta = prepare([file], tmp_path / "out", "bytes", separator="<|endoftext|>", val_fraction=0.3)
    train, val = tokens_of(tmp_path / "out", "train"), tokens_of(tmp_path / "out", "val")
    assert train + val == [token for document in documents for token in (EOT, *document.encode())]
    assert val[0] == EOT
    counts = meta["splits"]
    assert counts["train"]["documents"] + counts["val"]["documents"] == 40
    assert counts["train"]["bytes"] + counts["val"]["bytes"] == sum(map(len, documents))


HARD_TEXT = st.text(st.sampled_from("ab1'sl.! \n\r\t\x0b\x1c\x85\u00a0\u3000éß漢😀")) | st.text()


@settings(max_examples=300, deadline=None)
@given(HARD_TEXT, st.integers(1, 9))
def test_gpt2_tokens_do_not_depend_on_where_the_text_is_cut(vocab_dir, text, piece_bytes):
    """Also with a reading block so small that characters and lines straddle it."""
    gpt2 = script._encoding("gpt2", str(vocab_dir))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "PIECE_BYTES", piece_bytes)
        patch.setattr(script, "_BLOCK_BYTES", 3)
        path = write(Path(folder, "a.txt"), text)
        pieces = list(script._pieces(path, 0, path.stat().st_size, "train", None))
        tokens = [t for piece in pieces for t in script._encode(piece, "gpt2", str(vocab_dir), None)[0].tolist()]
    assert tokens == ([gpt2.eot_token, *gpt2.encode_ordinary(text)] if text else [])
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces)][: len(pieces)]


@settings(max_examples=300, deadline=None)
@given(HARD_TEXT, st.integers(1, 20), st.sampled_from([None, "l.", "!"]))
def test_cut_is_the_first_place_where_no_token_can_span_it(text, offset, separator):
    """Between a character that is no space and one that is, and never within a character; or before a separator.

    After a control character there is no cut: it is none of those that are known to be safe.
    """
    content = text.encode()

    def between(before: str, after: str) -> bool:
        shown = "!" <= before <= "~" or (before > "\x7f" and not before.isspace())
        return shown and after in " \t\r\n"

    expected = [
        len(text[:i].encode())
        for i in range(1, len(text))
        if (text.startswith(separator, i) if separator else between(text[i - 1], text[i]))
    ]
    expected = next((cut for cut in expected if cut >= offset), len(content))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "_BLOCK_BYTES", 3)
        path = write(Path(folder, "a.txt"), content)
        assert script._boundary(path, offset, len(content), separator, script._BEFORE_SPACE) == expected


def test_words_are_cut_into_pieces_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PIECE_BYTES", 100)
    path = write(tmp_path / "a.txt", STORY * 50)
    assert len(list(script._pieces(path, 0, path.stat().st_size, "train", None))) > 25


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path, vocab_dir, monkeypatch):
    monkeypatch.setattr(script, "PIECE_BYTES", 10_000)
    file = write(tmp_path / "a.txt", "".join(f"{STORY}{i}" for i in range(8_000)))
    for workers in (1, 2):
        prepare([file], tmp_path / str(workers), "gpt2", str(vocab_dir), workers=workers, shard_tokens=40_000)
    names = left_in(tmp_path / "1")
    assert len(names) == 6  # four of them train shards
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize("num_tokens, expected", [(100, [100]), (101, [101]), (199, [199]), (200, [100, 100])])
def test_shards_hold_shard_tokens_and_a_short_rest_joins_the_last(num_tokens, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PIECE_BYTES", 10)
    text = " ".join(map(str, range(1000)))
    train, val = write(tmp_path / "a.txt", text[: num_tokens - 1]), write(tmp_path / "b.txt", text[:450])
    prepare([train], tmp_path / "out", "bytes", val_files=[val], shard_tokens=100)
    assert [len(read_shard(p)) for p in sorted((tmp_path / "out").glob("train_*.bin"))] == expected
    assert [len(read_shard(p)) for p in sorted((tmp_path / "out").glob("val_*.bin"))] == [100, 100, 100, 151]
    assert tokens_of(tmp_path / "out", "train") == [EOT, *text[: num_tokens - 1].encode()]
    assert tokens_of(tmp_path / "out", "val") == [EOT, *text[:450].encode()]


def test_result_opens_as_training_data(tmp_path, vocab_dir):
    file = write(tmp_path / "a.txt", STORY * 100)
    prepare([file], tmp_path / "deep" / "out", "gpt2", str(vocab_dir))
    train, val = open_data(tmp_path / "deep" / "out", block_size=8, seed=0, vocab_size=50257)
    decoded = load_tokenizer("gpt2", vocab_dir).decode(train.batch(0, [0])[0][0].tolist())
    assert decoded in STORY * 2
    assert 3 < val.bytes_per_token < 5


def call(tmp_path, **changes):
    file = write(tmp_path / "text.txt", STORY * 30)
    arguments = {"files": [file], "out": tmp_path / "out", "tokenizer": "bytes"} | changes
    return prepare(**arguments)


MISUSE = {
    "missing file": ({"files": ["nowhere.txt"]}, r"nowhere\.txt: no such file$"),
    "missing validation file": ({"val_files": ["nowhere.txt"]}, r"nowhere\.txt: no such file$"),
    "folder": ({"files": [ROOT / "data"]}, "data: is a folder; name the files in it"),
    "fraction of zero": ({"val_fraction": 0.0}, r"--val_fraction 0\.0: must lie between 0 and 1"),
    "fraction of one": ({"val_fraction": 1.0}, r"--val_fraction 1\.0"),
    "no workers": ({"workers": 0}, "--workers 0: must be at least 1"),
    "no tokens in a shard": ({"shard_tokens": 0}, "--shard_tokens 0: must be at least 2"),
    "blank separator": ({"separator": " \n"}, "--separator .* other than white space"),
    "unknown tokenizer": ({"tokenizer": "words"}, "--tokenizer words: unknown"),
    "no vocabulary": ({"tokenizer": "gpt2", "vocab_dir": "nowhere"}, "--vocab_dir nowhere: cannot read"),
    "separator that leaves no validation": ({"separator": "%%"}, "no text was left for the val split"),
}


@pytest.mark.parametrize("kind", MISUSE)
def test_misuse_is_named_and_leaves_nothing(kind, tmp_path):
    changes, message = MISUSE[kind]
    with pytest.raises(ValueError, match=message):
        call(tmp_path, **changes)
    assert left_in(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("text, message", [(b"", "no text at all"), (b"word", "no text was left for the val split")])
def test_text_too_short_to_split_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path, files=[write(tmp_path / "text2.txt", text)])
    assert left_in(tmp_path) == ["text.txt"] + ["text2.txt"]


@pytest.mark.parametrize("workers", [1, 2])
def test_text_that_is_not_utf8_is_refused_with_its_place(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PIECE_BYTES", 10_000)
    file = write(tmp_path / "latin.txt", STORY.encode() * 1000 + "caf\xe9\n".encode("latin-1") + STORY.encode())
    with pytest.raises(
        ValueError, match=rf"latin\.txt: not UTF-8 text \(byte 0xe9 at position {len(STORY) * 1000 + 3}\)"
    ):
        call(tmp_path, files=[file], workers=workers, val_fraction=0.001)
    assert left_in(tmp_path) == ["latin.txt", "text.txt"]


@pytest.mark.parametrize("separator", [None, "---"])
def test_a_byte_order_mark_is_no_text(separator, tmp_path):
    files = [write(tmp_path / name, b"\xef\xbb\xbf" + name.encode()) for name in ("one", "two")]
    val = write(tmp_path / "val", b"\xef\xbb\xbf" + STORY.encode())
    meta = prepare(files, tmp_path / "out", "bytes", val_files=[val], separator=separator)
    assert tokens_of(tmp_path / "out", "train") == [EOT, *b"one", EOT, *b"two"]
    assert tokens_of(tmp_path / "out", "val") == [EOT, *STORY.encode()]
    assert meta["splits"]["train"]["bytes"] == 6


def test_the_place_of_a_bad_byte_counts_the_byte_order_mark(tmp_path):
    file = write(tmp_path / "latin.txt", b"\xef\xbb\xbfcaf\xe9")
    with pytest.raises(ValueError, match=r"byte 0xe9 at position 6\)"):
        prepare([file], tmp_path / "out", "bytes", val_files=[file])


def test_text_that_tiktoken_gives_up_on_is_named(tmp_path, monkeypatch):
    def gives_up(encoding, text):
        raise ValueError("tiktoken gave up on 9 characters")

    monkeypatch.setattr(script, "encode", gives_up)
    with pytest.raises(ValueError, match=r"text\.txt: tiktoken gave up on 9 characters, at or after byte 0"):
        call(tmp_path)
    assert left_in(tmp_path) == ["text.txt"]


def is_killed(piece):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told_in_one_line():
    pieces = [script.Piece("some.txt", start, start + 10, "train", False) for start in (70_000, 70_010)]
    with pytest.raises(ValueError, match=r"killed, .* around byte 70,000 of some\.txt: try fewer --workers") as told:
        list(script._in_order(is_killed, pieces, 2))
    assert "\n" not in str(told.value)


def test_folder_that_holds_anything_is_refused_without_overwrite(tmp_path):
    call(tmp_path)
    before = tokens_of(tmp_path / "out", "train")
    with pytest.raises(ValueError, match=r"--out .*out: is not empty; .*--overwrite"):
        call(tmp_path, val_fraction=0.5)
    assert tokens_of(tmp_path / "out", "train") == before
    call(tmp_path, val_fraction=0.5, overwrite=True)
    assert len(tokens_of(tmp_path / "out", "train")) < len(before)
    assert left_in(tmp_path) == ["out", "text.txt"]


def test_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    call(tmp_path)
    assert left_in(tmp_path) == ["out", "text.txt"]
    assert "meta.json" in left_in(tmp_path / "out")


def test_overwrite_deletes_nothing_that_it_did_not_make(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "train_000000.bin", "mine")
    with pytest.raises(ValueError, match=r"replaces only what this script made, and it has no meta\.json"):
        call(tmp_path, overwrite=True)
    write(tmp_path / "out" / "thesis.tex", "mine")
    with pytest.raises(ValueError, match=r"and it holds thesis\.tex"):
        call(tmp_path, overwrite=True)
    write(tmp_path / "file", "mine")
    with pytest.raises(ValueError, match=r"file: is a file; name a folder"):
        call(tmp_path, out=tmp_path / "file", overwrite=True)
    assert left_in(tmp_path / "out") == ["thesis.tex", "train_000000.bin"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_failure_halfway_leaves_the_earlier_result_and_nothing_else(failure, tmp_path, monkeypatch):
    call(tmp_path)
    before = tokens_of(tmp_path / "out", "train")
    real, calls = script._encode, []

    def fails_later(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise failure
        return real(*args, **kwargs)

    monkeypatch.setattr(script, "_encode", fails_later)
    monkeypatch.setattr(script, "PIECE_BYTES", 100)
    with pytest.raises(failure):
        call(tmp_path, overwrite=True, val_fraction=0.5)
    assert len(calls) == 3
    assert tokens_of(tmp_path / "out", "train") == before
    assert left_in(tmp_path) == ["out", "text.txt"]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_command_leaves_nothing(number, status, tmp_path):
    file = write(tmp_path / "text.txt", STORY * 300_000)  # far more than can be done before the signal
    command = [sys.executable, ROOT / "data" / "prepare.py", file, "--tokenizer", "bytes", "--out", tmp_path / "out"]
    running = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 2048 for path in tmp_path.glob(".out.*/.train*")):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == status
    assert "Traceback" not in errors
    assert left_in(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("how", [["data/prepare.py"], ["-m", "heiretsu.data.prepare"]])
def test_command_makes_the_folder_and_says_how_to_train(how, tmp_path):
    file = write(tmp_path / "text.txt", STORY * 30)
    command = [sys.executable, *how, file, "--tokenizer", "bytes", "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"train.py --data_dir {tmp_path / 'out'} --tokenizer bytes" in done.stdout
    assert "100%" in done.stderr
    assert len(tokens_of(tmp_path / "out", "train")) > 1000


def test_command_reports_an_error_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"prepare\.py: nowhere\.txt: no such file$"):
        script.main(["nowhere.txt", "--tokenizer", "bytes", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"val_fraction": 0}, "--val_fraction 0: must lie between 0 and 1"),
        ({"val_fraction": 1}, "--val_fraction 1: must lie between 0 and 1"),
        ({"shard_tokens": 1}, "--shard_tokens 1: must be at least 2"),
        ({"workers": 0}, "--workers 0: must be at least 1"),
        ({"workers": 0, "shard_tokens": 2}, "--workers 0: must be at least 1"),
        ({"separator": " \n"}, "--separator .*: must hold a character other than white space"),
    ],
)
def test_the_first_value_that_is_too_small_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path, **changes)


def test_the_smallest_values_are_taken(tmp_path):
    meta = call(tmp_path, shard_tokens=2, workers=1, val_fraction=0.001)
    assert meta["splits"]["train"]["shards"] > 1
    assert call(tmp_path, out=tmp_path / "other", val_fraction=0.999)["splits"]["train"]["tokens"] < 300


def test_no_more_workers_are_started_than_there_are_pieces(tmp_path, monkeypatch):
    asked = []

    def in_order(encode, pieces, workers):
        asked.append(workers)
        return ((piece, encode(piece)) for piece in pieces)

    monkeypatch.setattr(script, "_in_order", in_order)
    monkeypatch.setattr(script, "PIECE_BYTES", 1000)
    for size, name in ((2999, "a"), (3000, "b")):
        call(
            tmp_path,
            files=[write(tmp_path / f"{name}.txt", "x\n" * (size // 2) + "x" * (size % 2))],
            out=tmp_path / name,
            workers=9,
        )
    assert asked == [3, 4]


def test_text_is_cut_into_pieces_of_a_megabyte_and_shards_of_a_block_at_least():
    """A piece is what one worker has in memory; 65,536 tokens are more than any block of a model."""
    assert (script.PIECE_BYTES, script._LEAST_TOKENS) == (1_048_576, 65_536)


def test_few_pieces_wait_to_be_written(tmp_path, monkeypatch):
    """At most four for each worker, however fast they encode: the memory is bounded."""
    under_way = []

    class Pool:
        def __init__(self, workers, mp_context, initializer, initargs):
            assert workers == 2
            assert mp_context.get_start_method() == "spawn"  # tqdm and tiktoken have threads
            assert (initializer, initargs) == (signal.signal, (signal.SIGINT, signal.SIG_IGN))

        def submit(self, encode, piece):
            assert encode == "encode"
            under_way.append(piece)
            return unittest.mock.Mock(result=lambda: piece)

        def shutdown(self, cancel_futures):
            assert cancel_futures
            under_way.append("shut down")

    monkeypatch.setattr(script, "ProcessPoolExecutor", Pool)
    most = 0
    for count, (piece, result) in enumerate(script._in_order("encode", range(20), 2)):
        assert piece == result == count < 20
        most = max(most, len(under_way) - count)
    assert most == 8 and under_way == [*range(20), "shut down"]


def test_workers_that_are_gone_when_more_is_asked_of_them_are_blamed_for_the_oldest_piece(monkeypatch):
    pool = unittest.mock.Mock()
    pool.submit.side_effect = [unittest.mock.Mock(), unittest.mock.Mock(), BrokenProcessPool()]
    monkeypatch.setattr(script, "ProcessPoolExecutor", lambda *_, **__: pool)
    pieces = [script.Piece("some.txt", start, start + 10, "train", False) for start in (10, 20, 30, 40)]
    with pytest.raises(ValueError, match=r"^one of 2 worker .* byte 10 of some\.txt: try fewer --workers$"):
        list(script._in_order(None, pieces, 2))


def test_the_command_prints_the_counts_of_both_splits_and_its_progress(tmp_path, capsys):
    texts = [
        write(tmp_path / "a.txt", "é\n" * 900),
        write(tmp_path / "b.txt", "!" * 1299),
        write(tmp_path / "c.txt", "v"),
    ]
    train, val = map(str, texts[:2]), str(texts[2])
    flags = ["--tokenizer", "bytes", "--workers", "1", "--val_files", val, "--shard_tokens", "9", "--out"]
    script.main([*train, *flags, str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert shown.out == (
        "train: 4,001 tokens, 1.000 bytes a token, 2 documents, 444 shard(s)\n"
        "val: 2 tokens, 0.500 bytes a token, 1 documents, 1 shard(s)\n"
        f"train on it with: python train.py --data_dir {tmp_path / 'out'} --tokenizer bytes\n"
    )
    assert re.search(r"bytes: 100%\|[^|]*\| 4\.00k/4\.00k \[[^]]*B/s\]\n$", shown.err)
    call(tmp_path, out=tmp_path / "silent")
    assert capsys.readouterr() == ("", "")


def test_progress_counts_each_piece_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "PIECE_BYTES", 1000)
    call(tmp_path, files=[write(tmp_path / "a.txt", "word\n" * 1000)], progress=True)
    assert " 5.00k/5.00k [" in capsys.readouterr().err


def test_a_first_file_gives_the_training_split_a_line_at_least(tmp_path):
    call(tmp_path, files=[write(tmp_path / "a.txt", "a\nb\nc\n")], val_fraction=0.99)
    assert tokens_of(tmp_path / "out", "train") == [EOT, *b"a"]
    assert tokens_of(tmp_path / "out", "val") == [EOT, *b"\nb\nc\n"]


@pytest.mark.parametrize("separator, mark", [(None, "😀 "), ("<|end|>", "<|end|>")])
def test_a_cut_is_found_wherever_it_lies_in_what_is_read_at_a_time(separator, mark, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "_BLOCK_BYTES", 16)
    for before in range(60):
        path = write(tmp_path / "a.txt", "x" * before + mark + "y")
        at = before + (0 if separator else 4)
        for offset in {1, max(at, 1)}:
            if at:
                assert script._boundary(path, offset, path.stat().st_size, separator, script._BEFORE_SPACE) == at


def test_a_cut_may_follow_bytes_that_are_no_text(tmp_path):
    """A surrogate: refused with its place when it is read, as it would be anywhere."""
    path = write(tmp_path / "a.txt", b"\xed\xa0\x80 b")
    assert script._boundary(path, 1, 5, None, script._BEFORE_SPACE) == 3


def test_a_worker_sends_back_two_bytes_a_token(tmp_path):
    path = write(tmp_path / "a.txt", "word")
    tokens, num_bytes, num_documents = script._encode(script.Piece(str(path), 0, 4, "train", True), "bytes", None, None)
    assert tokens.dtype == np.uint16 and tokens.tolist() == [EOT, *b"word"] and (num_bytes, num_documents) == (4, 1)
