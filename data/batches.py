"""Batches of tokens that depend on (seed, step, sample) and on nothing else.

Sample i of step s is the same window of text whoever reads it: one process or eight, grouped into any microbatches, in
a first run or in a resumed one. So the reader has no position to save and no generator to synchronise.
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import torch

from heiretsu.data.corpus import load_corpus
from heiretsu.data.folder import META, find_shards, first_chunks, read_meta
from heiretsu.data.shards import check_vocab, raise_token_too_large, read_shard
from heiretsu.data.tokenizer import load_tokenizer

_FULL_SCAN_TOKENS = 2**30  # up to 2 GB of shards are checked whole before the run starts, in 0.1 s if cached
_PART_SCAN_TOKENS = 2**20  # of each shard of a larger set; every window is checked again when it is read
_FULL_DIGEST_TOKENS = 2**24  # 32 MB, a tenth of a second
_DIGEST_PIECE = 2**15
_64_BITS = 2**64 - 1


class TokenDataset:
    """Windows of block_size + 1 tokens from one split, as inputs and the targets one token further on.

    shards: paths of token shards, or (N,) integer arrays, or (name, array) pairs; a window never crosses from one into
    the next. seed: of the random windows. vocab_size: ids at or above it are refused.
    bytes_per_token: mean bytes of text that a token of this split stands for, if known (for bits per byte).

    Raises ValueError, naming the file, for a bad shard, one shorter than block_size + 1, or a token id >= vocab_size.
    """

    def __init__(
        self,
        shards: Sequence[str | os.PathLike | np.ndarray | tuple[str, np.ndarray]],
        block_size: int,
        seed: int,
        vocab_size: int,
        bytes_per_token: float | None = None,
    ):
        self.block_size, self.seed, self.vocab_size = block_size, seed, vocab_size
        self.bytes_per_token = bytes_per_token
        self.names, self._shards = zip(*(_open(i, shard) for i, shard in enumerate(shards)), strict=True)
        lengths = np.array([len(shard) for shard in self._shards])
        for name, length in zip(self.names, lengths, strict=True):
            if length < block_size + 1:
                smaller = f"--block_size {length - 1} or less, or " if length > 1 else ""
                raise ValueError(
                    f"{name}: {length} tokens, but --block_size {block_size} needs at least {block_size + 1} in every "
                    f"shard; use {smaller}more text"
                )
        self.num_tokens = int(lengths.sum())
        limit = None if self.num_tokens <= _FULL_SCAN_TOKENS else _PART_SCAN_TOKENS
        for name, shard in zip(self.names, self._shards, strict=True):
            check_vocab(shard, vocab_size, name, limit)
        self._starts_end = np.cumsum(lengths - block_size)  # start positions in the shards up to and including this one
        self._windows_end = np.cumsum((lengths - 1) // block_size)  # non-overlapping windows, likewise
        self.num_windows = int(self._windows_end[-1])

    def digest(self) -> str:
        """Of the shards' file names, lengths and tokens: all of a small set, pieces of a large one's."""
        digest, whole = hashlib.sha256(), self.num_tokens <= _FULL_DIGEST_TOKENS
        for name, shard in zip(self.names, self._shards, strict=True):
            digest.update(f"{os.path.basename(name)} {len(shard)}\0".encode())
            last = max(0, len(shard) - _DIGEST_PIECE)
            for start in [0] if whole else sorted({last * i // 7 for i in range(8)}):
                piece = shard if whole else shard[start : start + _DIGEST_PIECE]
                digest.update(np.ascontiguousarray(piece).tobytes())
        return digest.hexdigest()[:16]

    def batch(self, step: int, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples `indices` of step `step`: inputs and targets, each (len(indices), block_size) int64 on the CPU.

        Each is a window that starts anywhere in the split with equal probability; sample i of step s is a function of
        (seed, s, i) alone.
        """
        num_starts = int(self._starts_end[-1])
        places = []
        for i in indices:
            # Philox is a function of its key and counter, and numpy promises never to change its output.
            counter = np.array([0, i & _64_BITS, step & _64_BITS, 0], dtype=np.uint64)
            key = np.array([self.seed & _64_BITS, 0], dtype=np.uint64)
            bits = int(np.random.Philox(counter=counter, key=key).random_raw())
            places.append(_locate(self._starts_end, bits * num_starts >> 64))
        return self._read(places)

    def eval_batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows number `indices` of a fixed evaluation: inputs and targets, (len(indices), block_size) int64.

        The split is cut into `num_windows` windows side by side, and window j is a function of j alone, so that an
        evaluation of n windows is the same on every topology. Any first few are spread evenly over the split (one long
        file at its start is a poor sample of it), windows 0 to num_windows - 1 are each of them once, and further ones
        begin again.
        """
        stride = _spread(self.num_windows)
        places = []
        for j in indices:
            shard, window = _locate(self._windows_end, j * stride % self.num_windows)
            places.append((shard, window * self.block_size))
        return self._read(places)

    def _read(self, places: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.empty((len(places), self.block_size + 1), dtype=np.int64)
        for row, (shard, start) in zip(rows, places, strict=True):
            row[:] = self._shards[shard][start : start + self.block_size + 1]
            if row.max() >= self.vocab_size:
                position = int(np.argmax(row >= self.vocab_size))
                raise_token_too_large(self.names[shard], int(row[position]), start + position, self.vocab_size)
        windows = torch.from_numpy(rows)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _open(index: int, shard) -> tuple[str, np.ndarray]:
    if isinstance(shard, tuple):
        return shard
    if isinstance(shard, np.ndarray):
        return f"array {index}", shard
    return str(shard), read_shard(shard)


def _locate(ends: np.ndarray, number: int) -> tuple[int, int]:
    """(shard, number within it) of a number that counts through all shards; `ends` are the cumulative counts."""
    shard = int(np.searchsorted(ends, number, side="right"))
    return shard, number - (int(ends[shard - 1]) if shard else 0)


def _spread(count: int) -> int:
    """A stride near the golden section of `count` (at least 1) with no common factor: j * stride % count visits all."""
    stride = round(count * 0.6180339887498949)
    while np.gcd(stride, count) != 1:
        stride += 1
    return stride


def open_data(
    data_dir: str | os.PathLike | None,
    block_size: int,
    seed: int,
    vocab_size: int,
    num_train_chunks: int | None = None,
    num_val_chunks: int | None = None,
    tokenizer: str | None = None,
    vocab_dir: str | os.PathLike | None = None,
) -> tuple[TokenDataset, TokenDataset]:
    """The training and the validation split of `--data_dir`, or of the embedded corpus if it is None.

    A folder holds `*train*.bin` and `*val*.bin` shards: FineWeb's `fineweb_train_000001.bin`, or what data/prepare.py
    writes. They are read in the order of their names, the first num_*_chunks of them if that is given.
    tokenizer: what --tokenizer asks for (default: what the data is made with). The embedded corpus is encoded with it,
    gpt2 with the vocabulary of `vocab_dir` as `load_tokenizer` has it; shards must not have been made with another.
    Raises ValueError if the folder or a split is missing, has fewer shards than asked, holds two data sets or was made
    with another tokenizer, and whatever `TokenDataset` and `load_tokenizer` raise.
    """
    how = block_size, seed, vocab_size
    if data_dir is None:
        for flag, chunks in (("--num_train_chunks", num_train_chunks), ("--num_val_chunks", num_val_chunks)):
            if chunks is not None:
                raise ValueError(
                    f"{flag} {chunks}: the embedded corpus has no chunks; give --data_dir too, or leave it out"
                )
        encoding = None if tokenizer in (None, "bytes") else load_tokenizer(tokenizer, vocab_dir)
        train, val = (
            TokenDataset([(f"embedded corpus ({name})", split.tokens)], *how, split.num_bytes / len(split.tokens))
            for name, split in zip(("train", "validation"), load_corpus(encoding), strict=True)
        )
        return train, val
    found, meta = find_shards(data_dir), read_meta(data_dir)
    if meta and tokenizer not in (None, meta["tokenizer"]):
        raise ValueError(
            f"--tokenizer {tokenizer}: --data_dir {data_dir} was made with --tokenizer {meta['tokenizer']}; use that, "
            f"or make the shards again with data/prepare.py --tokenizer {tokenizer}"
        )
    if meta and meta["vocab_size"] > vocab_size:
        raise ValueError(
            f"--data_dir {data_dir}: its {META} says tokenizer {meta['tokenizer']} with {meta['vocab_size']} ids, more "
            f"than the model's vocabulary of {vocab_size}; use --tokenizer {meta['tokenizer']}"
        )
    datasets = []
    for split, chunks in (("train", num_train_chunks), ("val", num_val_chunks)):
        counts = meta["splits"][split] if meta else None
        paths = first_chunks(data_dir, split, found[split], chunks)
        bytes_per_token = counts["bytes"] / counts["tokens"] if counts else None
        datasets.append(TokenDataset(paths, *how, bytes_per_token))
    return datasets[0], datasets[1]
