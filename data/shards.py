"""Token shards: the `.bin` files of llm.c and of FineWeb-10B tokenised for GPT-2.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, then zeros) followed by the
tokens as little-endian uint16. A file that is anything else is refused by name when it is opened, because a header read
as tokens, or the half of a download, trains without complaint. (Format: karpathy/llm.c, `dev/data/data_common.py`.)
"""

import os
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_TOKEN = 2**16 - 1

_LLAMA_MAGIC = 20240801  # llm.c's uint32 shards for Llama 3
_SCAN_TOKENS = 2**22  # 8 MB at a time


def read_shard(path: str | os.PathLike) -> np.ndarray:
    """The tokens of one shard, (N,) uint16 with N >= 1, memory-mapped read-only.

    Raises ValueError, naming the file, if it is missing, empty, headerless, truncated, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such token shard")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: empty file (0 bytes), not a token shard; make it again with data/prepare.py")
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
    _check_header(path, header, size)
    # A plain ndarray view: np.memmap's own slicing costs ten times as much per window.
    return np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES))


def _check_header(path: Path, header: np.ndarray, size: int) -> None:
    """ValueError unless `size`, the file's bytes, is what the header promises."""
    first = int(header[:4].view("<i4")[0]) if len(header) >= 4 else None
    if first != MAGIC:
        found = "fewer than 4 bytes" if first is None else f"int32 {first}"
        if first == _LLAMA_MAGIC:
            raise ValueError(
                f"{path}: a Llama-3 shard of uint32 tokens (magic {first}); only uint16 shards can be read"
            )
        raise ValueError(
            f"{path}: not a token shard: it starts with {found}, not with the magic number {MAGIC}. A headerless file "
            f"of raw tokens cannot be told from any other file: make the shard again from its text with data/prepare.py"
        )
    if len(header) < HEADER_BYTES:
        raise ValueError(
            f"{path}: truncated: {size} bytes, but the header alone has {HEADER_BYTES}; copy or download it again"
        )
    version, num_tokens = (int(value) for value in header.view("<i4")[1:3])
    if version != VERSION:
        raise ValueError(f"{path}: shard version {version}, only version {VERSION} (uint16 tokens) can be read")
    if num_tokens == 0 and size == HEADER_BYTES:
        raise ValueError(
            f"{path}: empty shard (a header and no tokens); delete it or make it again with data/prepare.py"
        )
    held, odd = divmod(size - HEADER_BYTES, 2)
    if held != num_tokens or odd:
        what = "truncated" if size < HEADER_BYTES + 2 * num_tokens else "header and size disagree"
        raise ValueError(
            f"{path}: {what}: the header says {num_tokens} tokens ({HEADER_BYTES + 2 * num_tokens} bytes), "
            f"the file has {size} bytes, room for {held} tokens; copy or download it again"
        )


class ShardWriter:
    """Writes one shard piece by piece; the file appears under its name complete, or not at all.

    with ShardWriter(path) as shard:
        shard.append(tokens)        # any number of times; (N,) integers in [0, 65535]

    The tokens go to a file beside `path`, which is renamed on a clean exit and deleted on any exception (Ctrl-C too).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.num_tokens = 0
        self._beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")

    def __enter__(self) -> "ShardWriter":
        self._file = open(self._beside, "wb")
        self._file.write(bytes(HEADER_BYTES))
        return self

    def append(self, tokens) -> None:
        """tokens: (N,) integers; ValueError if one does not fit in uint16, or if the shard grows past 2**31 - 1."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError(f"{self.path}: tokens must be a list of integers, not {tokens.dtype} {tokens.shape}")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) <= MAX_TOKEN:
            raise ValueError(
                f"{self.path}: token ids from {tokens.min()} to {tokens.max()} do not fit in uint16 (0 to {MAX_TOKEN})"
            )
        if self.num_tokens + tokens.size >= 2**31:
            raise ValueError(f"{self.path}: more than {2**31 - 1} tokens in one shard; use smaller shards")
        self._file.write(tokens.astype("<u2").tobytes())
        self.num_tokens += tokens.size

    def __exit__(self, exc_type, exc, trace) -> None:
        try:
            if exc_type is None:
                if self.num_tokens == 0:
                    raise ValueError(f"{self.path}: no tokens to write; an empty shard cannot be trained on")
                header = np.zeros(HEADER_INTS, dtype="<i4")
                header[:3] = MAGIC, VERSION, self.num_tokens
                self._file.seek(0)
                self._file.write(header.tobytes())
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()  # before the rename: Windows renames no open file
                os.replace(self._beside, self.path)
        finally:
            self._file.close()
            self._beside.unlink(missing_ok=True)


def write_shard(path: str | os.PathLike, tokens) -> None:
    """Write (N,) integers in [0, 65535] as one shard, complete or not at all. ValueError as `ShardWriter`."""
    with ShardWriter(path) as shard:
        shard.append(tokens)


def check_vocab(tokens: np.ndarray, vocab_size: int, name: str, limit: int | None = None) -> None:
    """ValueError naming the file, the id and its position if a token id is not below vocab_size.

    tokens: (N,) uint16, usually memory-mapped. It is scanned in pieces (20 GB/s from the page cache on one core),
    so that nothing is copied; `limit` scans the first so many tokens only.
    """
    if vocab_size > MAX_TOKEN and tokens.dtype == np.uint16:
        return
    end = len(tokens) if limit is None else min(limit, len(tokens))
    for start in range(0, end, _SCAN_TOKENS):
        piece = tokens[start : min(start + _SCAN_TOKENS, end)]
        if int(piece.max()) >= vocab_size:
            position = start + int(np.argmax(piece >= vocab_size))
            raise_token_too_large(name, int(tokens[position]), position, vocab_size)


def raise_token_too_large(name: str, token: int, position: int, vocab_size: int) -> None:
    raise ValueError(
        f"{name}: token id {token} at position {position} is not below the vocabulary size {vocab_size}: the shard was "
        f"made with another tokenizer than --tokenizer names (`bytes` has 257 ids, `gpt2` 50257), or is corrupt"
    )
