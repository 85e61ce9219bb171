"""Real text that every Python brings along: the standard library's source and the Python language reference.

So a first run needs no download. The files are read from the running interpreter, a few MB in some tenths of a second;
which of them are held out for validation depends on their names alone. Tests, idle, tables of data (character sets,
entities) and packages that distributions split off are left out: the rest is code and prose that a small model can
learn to imitate within minutes.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = 256  # the id that the `bytes` tokenizer gives to <|endoftext|>
VAL_PERCENT = 5
MIN_BYTES = 500_000

_LEFT_OUT = {  # packages and modules at the top of the library
    *("distutils", "ensurepip", "idlelib", "lib2to3", "test", "tkinter", "turtledemo"),  # not on every installation
    *("encodings", "pydoc_data", "stringprep"),  # tables; the reference is read through its own module
}
_LEFT_OUT_BELOW = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
_TABLES = {"html/entities.py", "re/_casefix.py"}


class Split(NamedTuple):
    """Documents as tokens, each preceded by end-of-text.

    tokens: (N,) uint16. documents: their names, in order. num_bytes: of their text, without the end-of-text tokens.
    """

    tokens: np.ndarray
    documents: tuple[str, ...]
    num_bytes: int


def load_corpus(encoding: tiktoken.Encoding | None = None) -> tuple[Split, Split]:
    """The embedded corpus as (train, validation), the same on every call with the same Python.

    encoding: from `load_tokenizer` (default: bytes). A document is validation if the SHA-256 of its name says so, about
    5 in 100. Raises ValueError if this Python comes without its source.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents = dict(sorted(_library_source(folder).items())) | _language_reference()
    if sum(map(len, documents.values())) < MIN_BYTES:
        raise ValueError(
            f"{folder}: this Python comes without the source of its standard library, which is the embedded corpus; "
            f"train on text of your own: python data/prepare.py FILES... --out DIR, then --data_dir DIR"
        )
    held_out = {name: text for name, text in documents.items() if is_validation(name)}
    train = {name: text for name, text in documents.items() if name not in held_out}
    return _join(train, encoding), _join(held_out, encoding)


def is_validation(name: str) -> bool:
    """Whether the document of this name is held out. Depends on nothing else, so no Python moves a file across."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < VAL_PERCENT


def _library_source(folder: Path) -> dict[str, bytes]:
    """Name ('json/decoder.py') -> source, for the modules that Python itself lists as its standard library."""
    sources = {}
    for parent, folders, files in os.walk(folder):
        here = Path(parent).relative_to(folder)
        top = here == Path(".")
        folders[:] = [f for f in folders if (_belongs(f) if top else f not in _LEFT_OUT_BELOW)]
        for file in files:
            name = (here / file).as_posix()
            if file.endswith(".py") and name not in _TABLES and (not top or _belongs(file[:-3])):
                sources[name] = Path(parent, file).read_bytes().replace(b"\r\n", b"\n")
    return sources


def _belongs(module: str) -> bool:
    return module in sys.stdlib_module_names and module not in _LEFT_OUT


def _language_reference() -> dict[str, bytes]:
    """Topic -> text; empty on the few systems that package it apart (the source alone is corpus enough)."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return {}
    return {f"reference/{name}": text.encode("utf-8") for name, text in sorted(topics.items())}


def _join(documents: dict[str, bytes], encoding: tiktoken.Encoding | None) -> Split:
    end_of_text = np.array([END_OF_TEXT if encoding is None else encoding.eot_token], dtype=np.uint16)
    parts: list[np.ndarray] = []
    for text in documents.values():
        if encoding is None:  # no need to go through Unicode
            ids = np.frombuffer(text, dtype=np.uint8)
        else:
            ids = np.array(encoding.encode_ordinary(text.decode("utf-8", "replace")), dtype=np.uint16)
        parts += [end_of_text, ids]
    return Split(np.concatenate(parts, dtype=np.uint16), tuple(documents), sum(map(len, documents.values())))
