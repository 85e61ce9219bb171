"""A data folder: the shards of a training and a validation split, and perhaps a `meta.json` on what made them."""

import json
import os
import re
from pathlib import Path

META = "meta.json"
# fineweb_train_000001.bin (FineWeb), train_000000.bin (data/prepare.py), tiny_shakespeare_val.bin (llm.c)
_SHARD_NAME = re.compile(r"(?P<prefix>.*?)_?(?<![a-zA-Z0-9])(?P<split>train|val)(_\d+)?\.bin")


def shard_name(split: str, index: int) -> str:
    """File name of a split's shard as data/prepare.py writes it; the names sort in the order of the shards."""
    return f"{split}_{index:06d}.bin"


def find_shards(folder: str | os.PathLike) -> dict[str, list[Path]]:
    """{"train": paths, "val": paths}, each in the order of the names.

    Raises ValueError if the folder or a split is missing, or if the shards are of more than one data set.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--data_dir {folder}: no such folder; leave it out to train on the embedded corpus")
    found: dict[str, list[Path]] = {"train": [], "val": []}
    prefixes = set()
    for path in sorted(folder.glob("*.bin")):
        match = _SHARD_NAME.fullmatch(path.name)
        if match:
            found[match["split"]].append(path)
            prefixes.add(match["prefix"])
    for split, paths in found.items():
        if not paths:
            raise ValueError(
                f"--data_dir {folder}: no {split} shards (fineweb_{split}_*.bin or {split}_*.bin) in it; make them "
                f"with `python data/prepare.py FILES... --out DIR` or `python data/fineweb.py N`"
            )
    if len(prefixes) > 1:
        names = ", ".join(f"{prefix}_*.bin" if prefix else "train_*.bin" for prefix in sorted(prefixes))
        raise ValueError(f"--data_dir {folder}: shards of more than one data set ({names}); keep one in a folder")
    return found


def first_chunks(folder: str | os.PathLike, split: str, paths: list[Path], chunks: int | None) -> list[Path]:
    """The first `chunks` shards (None: all); ValueError, naming the flag, if there are not so many."""
    if chunks is None:
        return paths
    if not 1 <= chunks <= len(paths):
        raise ValueError(
            f"--num_{split}_chunks {chunks}: --data_dir {folder} has {len(paths)} {split} shard(s); "
            f"choose 1 to {len(paths)}, or leave it out for all"
        )
    return paths[:chunks]


def read_meta(folder: str | os.PathLike) -> dict | None:
    """What data/prepare.py wrote, or None if the folder has no meta.json; ValueError if it is damaged.

    {"tokenizer": name, "vocab_size": V, "end_of_text": id,
     "splits": {"train": {"tokens": n, "bytes": n, "documents": n, "shards": n}, "val": the same}}
    """
    path = Path(folder, META)
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        counts = [meta["splits"][split][key] for split in ("train", "val") for key in ("tokens", "bytes")]
        sound = isinstance(meta["tokenizer"], str) and min(meta["vocab_size"], *counts) > 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what data/prepare.py writes ({type(error).__name__}: {error})") from error
    if not sound:
        raise ValueError(f"{path}: not what data/prepare.py writes (a count is not positive)")
    return meta


def write_meta(folder: str | os.PathLike, meta: dict) -> None:
    Path(folder, META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def tokenizer_of(data_dir: str | os.PathLike | None) -> str:
    """Tokenizer that made this data: what prepare.py noted, else `gpt2`; `bytes` for the embedded corpus (None)."""
    if data_dir is None:
        return "bytes"
    meta = read_meta(data_dir)
    return meta["tokenizer"] if meta else "gpt2"  # llm.c's version 1 shards are GPT-2's by definition
