"""Text to token ids and back, always through a `tiktoken.Encoding`.

`bytes` needs nothing but this file: 256 single bytes and `<|endoftext|>`. `gpt2` is GPT-2's byte-pair encoding (Radford
et al. 2019); its two files come from a folder, from tiktoken's cache, or from the network, and where none of them has
them the error says how to supply them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken

TOKENIZERS = {"bytes": 257, "gpt2": 50257}  # name: vocabulary size
END_OF_TEXT = "<|endoftext|>"

# Radford et al. 2019. The possessive form that newer tiktokens use gives the same pieces; this one works in all. Their
# `\s+(?!\S)` is bounded (a longer run is two pieces): on a million blanks it runs out of room, and tiktoken panics.
_GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s{1,500000}(?!\S)|\s+"""
# Any split into pieces gives the same bytes; long pieces keep the regular expression off the clock.
_BYTE_PATTERN = r"[\s\S]{1,64}"
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_FILES = {  # name: sha256 of the published file
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_TIMEOUTS_S = (5, 20)  # to connect, and between two pieces of the answer: tiktoken itself would wait for ever


def load_tokenizer(name: str, vocab_dir: str | os.PathLike | None = None) -> tiktoken.Encoding:
    """The encoding `bytes` (257 ids, end of text 256) or `gpt2` (50257 ids, end of text 50256).

    vocab_dir: folder with GPT-2's `encoder.json` and `vocab.bpe`; without it, tiktoken's cache (TIKTOKEN_CACHE_DIR) and
    then the network are tried. Raises ValueError for another name, and where the vocabulary cannot be had or is wrong.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"--tokenizer {name}: unknown; choose one of {', '.join(TOKENIZERS)}")
    if name == "bytes":
        return _encoding("bytes", _BYTE_PATTERN, {bytes([byte]): byte for byte in range(256)})
    files = {file: _read_from(Path(vocab_dir), file) if vocab_dir else _read_cached(file) for file in _GPT2_FILES}
    ranks = _merge_ranks(files["vocab.bpe"], files["encoder.json"], vocab_dir)
    return _encoding("gpt2", _GPT2_PATTERN, ranks)


def _encoding(name: str, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """Every id of `ranks`, and end of text behind them. ValueError where there is no tiktoken."""
    try:
        import tiktoken  # not at the top: who reads token shards needs none, and may be on a machine without it
    except ModuleNotFoundError as error:
        raise ValueError(f"--tokenizer {name}: tiktoken is not installed (pip install tiktoken)") from error
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """`encoding.encode_ordinary(text)`. Raises ValueError where tiktoken gives up."""
    try:
        return encoding.encode_ordinary(text)
    except BaseException as error:  # a panic in Rust is no Exception, and its class cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"tiktoken gave up on {len(text):,} characters ({str(error)[:80]!r})") from error


def _read_from(folder: Path, file: str) -> bytes:
    try:
        return (folder / file).read_bytes()
    except OSError as error:
        raise ValueError(
            f"--vocab_dir {folder}: cannot read {file} ({error.strerror}); the folder must hold GPT-2's encoder.json "
            f"and vocab.bpe"
        ) from error


def _read_cached(file: str) -> bytes:
    """One vocabulary file from tiktoken's cache, or downloaded into it. Same places and names as tiktoken's own."""
    url = _GPT2_URL + file
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    cached = Path(folder, hashlib.sha1(url.encode()).hexdigest()) if folder else None
    if cached and cached.is_file():
        content = cached.read_bytes()
        if hashlib.sha256(content).hexdigest() == _GPT2_FILES[file]:
            return content
    content = _download(url, _GPT2_FILES[file])
    if cached:
        _store(cached, content)
    return content


def _download(url: str, sha256: str) -> bytes:
    import requests  # tiktoken depends on it; 60 ms that only a download pays for

    try:
        answer = requests.get(url, timeout=_TIMEOUTS_S)
        answer.raise_for_status()
        if hashlib.sha256(answer.content).hexdigest() != sha256:
            raise OSError("what arrived is not the published file")
    except OSError as error:  # every requests exception is one
        reason = str(error) if len(str(error)) < 120 else type(error).__name__
        raise ValueError(
            f"--tokenizer gpt2: its vocabulary is not on this machine and could not be downloaded from {url} "
            f"({reason}). Supply it with --vocab_dir DIR, where DIR holds encoder.json and vocab.bpe, or point "
            f"TIKTOKEN_CACHE_DIR at the tiktoken cache of a machine that has it; or use --tokenizer bytes"
        ) from error
    return answer.content


def _store(path: Path, content: bytes) -> None:
    """Best effort: the vocabulary is in memory already, so a read-only cache is no reason to stop."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()


def _merge_ranks(vocab_bpe: bytes, encoder_json: bytes, source: object) -> dict[bytes, int]:
    """Bytes of each token -> its rank, which is also its id; ValueError unless the two files are GPT-2's.

    vocab.bpe lists the merges in order; encoder.json the ids. Both write bytes as printable characters: a byte that is
    printable in Latin-1 stands for itself, the others take the characters from U+0100 on, in order.
    """
    byte_of = {chr(byte): byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "}
    for byte in range(256):
        if byte not in byte_of.values():
            byte_of[chr(256 + len(byte_of) - 188)] = byte  # 188 bytes are printable
    try:
        lines = vocab_bpe.decode("utf-8").splitlines()
        merges = [line.split() for line in lines if line and not line.startswith("#version")]
        tokens = [bytes([byte]) for byte in byte_of.values()]
        tokens += [bytes(byte_of[char] for char in left + right) for left, right in merges]
        ids = {key: number for key, number in json.loads(encoder_json).items() if key != END_OF_TEXT}
        ranks = {bytes(byte_of[char] for char in key): number for key, number in ids.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{source}: encoder.json or vocab.bpe is not what GPT-2 published ({type(error).__name__}: {error})"
        ) from error
    if ranks != {token: rank for rank, token in enumerate(tokens)} or len(ranks) + 1 != TOKENIZERS["gpt2"]:
        raise ValueError(
            f"{source}: encoder.json ({len(ranks)} tokens) and vocab.bpe ({len(merges)} merges) do not belong together "
            f"or are not GPT-2's, which have 50256 tokens (and {END_OF_TEXT}) and 50000 merges"
        )
    return ranks
