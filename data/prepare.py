"""Turn text files into token shards: `python data/prepare.py FILES... --tokenizer gpt2|bytes --out DIR`.

Each file is one document (or several, with --separator), preceded by end-of-text. The text is cut into pieces of about
a MB for the workers, only where no token can span the cut, so the shards do not depend on the number of workers. The
last --val_fraction of the text, in the order given, is the validation split, unless --val_files names one.

Everything is written into a folder beside DIR, which takes DIR's name at the very end: after a failure or Ctrl-C there
is no DIR.
"""

import argparse
import codecs
import functools
import importlib.util
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

if importlib.util.find_spec("heiretsu") is None:
    sys.exit(
        "heiretsu is not installed: run `pip install -e .` in the checkout, or `make train`, which does it for you"
    )

from heiretsu.data.folder import META, read_meta, shard_name, write_meta
from heiretsu.data.shards import ShardWriter
from heiretsu.data.terminal import escape_what_cannot_be_printed
from heiretsu.data.tokenizer import TOKENIZERS, encode, load_tokenizer

PIECE_BYTES = 2**20
_LEAST_TOKENS = 2**16  # a last shard shorter than this joins the one before: a block must fit in every shard
_BLOCK_BYTES = 2**16  # read at a time when looking for a place to cut

# Both GPT-2's pattern and single bytes give the same tokens on the two sides of "not space | space" as across it.
_NOT_SPACE = rb"(?:[\x21-\x7e]|[\xc2-\xf4][\x80-\xbf]{1,3})"
_BEFORE_SPACE = re.compile(_NOT_SPACE + rb"(?=[ \t\r\n])")
_BEFORE_NEWLINE = re.compile(_NOT_SPACE + rb"(?=[\r\n])")


class Piece(NamedTuple):
    """Bytes start to end of a file, for one split. `opens`: whether a document begins at `start`."""

    path: str
    start: int
    end: int
    split: str
    opens: bool


def prepare(
    files: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    tokenizer: str = "gpt2",
    vocab_dir: str | None = None,
    val_files: Sequence[str | os.PathLike] = (),
    val_fraction: float = 0.05,
    separator: str | None = None,
    shard_tokens: int = 100_000_000,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> dict:
    """Write the shards and meta.json of `files` as folder `out`, and return what meta.json says (see `read_meta`).

    Raises ValueError for input that cannot be used, naming it, and leaves nothing behind on any exception.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction {val_fraction}: must lie between 0 and 1")
    for flag, value, least in (("--shard_tokens", shard_tokens, 2), ("--workers", workers, 1)):
        if value < least:
            raise ValueError(f"{flag} {value}: must be at least {least}")
    if separator is not None and not separator.strip():
        raise ValueError(f"--separator {separator!r}: must hold a character other than white space")
    encoding = load_tokenizer(tokenizer, vocab_dir)  # before anything is written: it is the likeliest to be missing
    out = Path(out).resolve()
    _check_out(out, overwrite)
    total = _total_bytes([*files, *val_files])
    pieces = _plan(files, val_files, val_fraction, separator)
    encode = functools.partial(_encode, tokenizer=tokenizer, vocab_dir=vocab_dir, separator=separator)

    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        beside.mkdir()
        with ExitStack() as stack:
            splits = {name: stack.enter_context(_SplitWriter(beside, name, shard_tokens)) for name in ("train", "val")}
            bar = stack.enter_context(
                tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc=tokenizer)
            )
            for piece, encoded in _in_order(encode, pieces, min(workers, total // PIECE_BYTES + 1)):
                splits[piece.split].append(*encoded)
                bar.update(piece.end - piece.start)
            for writer in splits.values():
                writer.finish()
        meta = {"tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "end_of_text": encoding.eot_token}
        meta["splits"] = {name: split.counts for name, split in splits.items()}
        write_meta(beside, meta)
        _take_name(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return meta


def _check_out(out: Path, overwrite: bool) -> None:
    """ValueError if `out` may not be (over)written: only an earlier result of this script is ever deleted."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    names = os.listdir(out) if out.exists() else []
    if not names:
        return
    if not overwrite:
        raise ValueError(f"--out {out}: is not empty; name another folder, or replace it with --overwrite")
    foreign = sorted(name for name in names if name != META and not re.fullmatch(r"(train|val)_\d{6}\.bin", name))
    if foreign or read_meta(out) is None:
        what = f"it holds {foreign[0]}" if foreign else f"it has no {META}"
        raise ValueError(f"--out {out}: --overwrite replaces only what this script made, and {what}")


def _take_name(beside: Path, out: Path) -> None:
    """Rename folder `beside` to `out`, in the place of an earlier one that `_check_out` allowed."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    beside.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _total_bytes(files: Iterable[str | os.PathLike]) -> int:
    total = 0
    for path in map(Path, files):
        if not path.is_file():
            what = "is a folder; name the files in it" if path.is_dir() else "no such file"
            raise ValueError(f"{path}: {what}")
        total += path.stat().st_size
    if total == 0:
        raise ValueError("the files hold no text at all")
    return total


def _plan(files, val_files, val_fraction: float, separator: str | None) -> Iterator[Piece]:
    """The pieces of all files in order, training before validation. Lazy: it looks into the files to find the cuts."""
    if val_files:
        for split, paths in (("train", files), ("val", val_files)):
            for path in paths:
                yield from _pieces(path, 0, os.path.getsize(path), split, separator)
        return
    train_bytes = round(sum(map(os.path.getsize, files)) * (1 - val_fraction))
    before = 0  # bytes of text before this file
    for path in files:
        size = os.path.getsize(path)
        wanted = max(train_bytes - before, 0 if before else 1)
        cut = _boundary(path, wanted, size, separator, _BEFORE_NEWLINE)
        if cut == size:  # one long line
            cut = _boundary(path, wanted, size, separator, _BEFORE_SPACE)
        yield from _pieces(path, 0, cut, "train", separator)
        yield from _pieces(path, cut, size, "val", separator)
        before += size


def _pieces(path, start: int, end: int, split: str, separator: str | None) -> Iterator[Piece]:
    """Bytes start to end of a file in pieces of about PIECE_BYTES, cut where no token can span the cut."""
    opens = True
    while start < end:
        cut = _boundary(path, start + PIECE_BYTES, end, separator, _BEFORE_SPACE)
        yield Piece(str(path), start, cut, split, opens)
        start, opens = cut, False


def _boundary(path, offset: int, end: int, separator: str | None, pattern: re.Pattern) -> int:
    """First place at or after `offset` to cut: before a separator if there is one, else after `pattern`; or `end`."""
    if not 0 < offset < end:
        return min(offset, end)
    back = 4  # the longest character in UTF-8: it may begin before `offset`
    if separator:
        pattern, back = re.compile(b"(?=" + re.escape(separator.encode()) + b")"), len(separator.encode())
    start = max(offset - back, 0)
    with open(path, "rb") as file:
        while start < end:
            file.seek(start)
            block = file.read(_BLOCK_BYTES + back)
            for match in pattern.finditer(block):
                if offset <= start + match.end() < end and not match[0].decode("utf-8", "replace").isspace():
                    return start + match.end()
            start += _BLOCK_BYTES
    return end


_encoding = functools.cache(load_tokenizer)  # once in each worker


def _encode(piece: Piece, tokenizer: str, vocab_dir: str | None, separator: str | None) -> tuple[np.ndarray, int, int]:
    """Tokens (N,) uint16 of one piece, the bytes of text they stand for, and how many documents begin in it."""
    encoding = _encoding(tokenizer, vocab_dir)
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        content = file.read(piece.end - piece.start)
    if piece.start == 0:
        content = content.removeprefix(codecs.BOM_UTF8)  # says how the file is written, and is no text
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, position = content[error.start], piece.end - len(content) + error.start
        raise ValueError(
            f"{piece.path}: not UTF-8 text (byte 0x{byte:02x} at position {position}); convert it first, for example "
            f"with `iconv -f latin1 -t utf-8`"
        ) from error
    documents = [document for document in text.split(separator) if document.strip()] if separator else [text]
    tokens: list[int] = []
    for document in documents:
        if separator or piece.opens:
            tokens.append(encoding.eot_token)
        try:
            tokens += encode(encoding, document)
        except ValueError as error:
            raise ValueError(f"{piece.path}: {error}, at or after byte {piece.start:,}: what is there?") from error
    num_bytes = sum(len(document.encode()) for document in documents)
    return np.array(tokens, dtype=np.uint16), num_bytes, len(documents) if separator else int(piece.opens)


def _in_order(encode, pieces: Iterable[Piece], workers: int) -> Iterator[tuple[Piece, tuple]]:
    """(piece, encode(piece)) in the order of the pieces, from worker processes if there is more than one worker."""
    if workers == 1:
        yield from ((piece, encode(piece)) for piece in pieces)
        return
    # Spawned, not forked: tqdm and tiktoken have threads. Ctrl-C is the parent's to handle.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    pieces = iter(pieces)
    waiting: deque = deque()
    try:
        while True:
            # So many at a time bound the memory when writing is slower than encoding.
            for piece in itertools.islice(pieces, 4 * workers - len(waiting)):
                waiting.append((piece, pool.submit(encode, piece)))
            if not waiting:
                return
            piece, future = waiting[0]
            yield piece, future.result()
            waiting.popleft()
    except BrokenProcessPool as error:
        piece = waiting[0][0]
        raise ValueError(
            f"one of {workers} worker processes was killed, perhaps for want of memory, while tokenizing around byte "
            f"{piece.start:,} of {piece.path}: try fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _SplitWriter:
    """The shards of one split, each of `shard_tokens` tokens; the last may be up to _LEAST_TOKENS longer."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.counts = {"tokens": 0, "bytes": 0, "documents": 0, "shards": 0}
        self._held = np.empty(0, dtype=np.uint16)  # tokens that do not fit in the shard and are too few for the next

    def __enter__(self) -> "_SplitWriter":
        self._shard = ShardWriter(self.folder / shard_name(self.split, self.counts["shards"])).__enter__()
        self.counts["shards"] += 1
        return self

    def append(self, tokens: np.ndarray, num_bytes: int, num_documents: int) -> None:
        self.counts["tokens"] += len(tokens)
        self.counts["bytes"] += num_bytes
        self.counts["documents"] += num_documents
        tokens = np.concatenate([self._held, tokens])
        while True:
            room = self.shard_tokens - self._shard.num_tokens
            self._shard.append(tokens[:room])
            tokens = tokens[room:]
            if len(tokens) < min(self.shard_tokens, _LEAST_TOKENS):
                break
            self._shard.__exit__(None, None, None)
            self.__enter__()
        self._held = tokens

    def finish(self) -> None:
        if not self.counts["tokens"]:
            raise ValueError(
                f"no text was left for the {self.split} split: the files are too short to cut; give more text, or "
                f"name validation files of their own with --val_files"
            )
        self._shard.append(self._held)

    def __exit__(self, *exception) -> None:
        self._shard.__exit__(*exception)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description="Turn text files into token shards that train.py --data_dir reads.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILES", help="UTF-8 text; each file is a document")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="gpt2", help="GPT-2's byte pairs, or plain bytes")
    parser.add_argument("--vocab_dir", metavar="D", help="folder with GPT-2's encoder.json and vocab.bpe")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="share of the text, at its end, to hold out")
    parser.add_argument("--val_files", nargs="+", default=[], metavar="F", help="hold out these files instead")
    parser.add_argument("--separator", metavar="S", help="text between two documents in a file, e.g. '<|endoftext|>'")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, metavar="N", help="tokens in a shard")
    parser.add_argument("--workers", type=int, default=min(cores, 32), metavar="N", help="processes that tokenize")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote to DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    escape_what_cannot_be_printed()
    args = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a plain `kill` tidies up as Ctrl-C does
    try:
        meta = prepare(**vars(args), progress=True)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare.py: {error}")
    except KeyboardInterrupt:
        print(f"prepare.py: interrupted; nothing was written to {args.out}", file=sys.stderr)
        sys.exit(130)
    for split, counts in meta["splits"].items():
        print(
            f"{split}: {counts['tokens']:,} tokens, {counts['bytes'] / counts['tokens']:.3f} bytes a token, "
            f"{counts['documents']:,} documents, {counts['shards']} shard(s)"
        )
    print(f"train on it with: python train.py --data_dir {args.out} --tokenizer {args.tokenizer}")


if __name__ == "__main__":
    main()
