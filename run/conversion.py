"""A model of Hugging Face's as a checkpoint of ours, and back, for every family in heiretsu.model.hf.

An imported checkpoint is one of step 0 with a fresh optimizer, from which any topology starts (--init_from).
transformers' from_pretrained reads an exported folder. Neither direction needs transformers itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from heiretsu.data.tokenizer import TOKENIZERS
from heiretsu.model import hf
from heiretsu.parallel.checkpoint_folder import checkpoints
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run.building import build_engine
from heiretsu.run.config import RunConfig
from heiretsu.run.saved import load_model
from heiretsu.run.state import save

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def import_model(source: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Write the model of a Hugging Face folder as a checkpoint of step 0. Returns its path, out/step_00000000.

    Raises ValueError, in one line, for a model that ours cannot be, tensors that do not fit, or an `out` with
    checkpoints.
    """
    if checkpoints(out):
        raise ValueError(f"{out}: holds checkpoints already; import into another folder")
    config, weights = read_model(Path(source))
    engine = build_engine(config, abstract_mesh(), ops=None)  # nothing is computed
    for name, param in engine.params.items():
        with torch.no_grad():
            param.copy_(weights[name])
    return save(out, 0, engine, config.as_json(), keep=1)


def export_model(source: str | os.PathLike, out: str | os.PathLike, family: str = "gpt2") -> Path:
    """Write a checkpoint as a folder that transformers reads. Returns the folder.

    Raises ValueError, in one line, for a model that the family has no form for, a torn checkpoint, or an `out` that has
    a model.
    """
    out, into = Path(out), hf.find_family(family, "exported")
    taken = [name for name in (CONFIG, WEIGHTS, INDEX) if (out / name).exists()]
    if taken:
        raise ValueError(f"{out}: holds {taken[0]} already; export into another folder")
    model, run = load_model(source, ops=None)
    config = into.write_config(model.config, run["config"]["dtype"])
    tensors = hf.to_hf(into, dict(model.named_parameters()), model.config)
    out.mkdir(parents=True, exist_ok=True)
    # transformers wants to be told that these are PyTorch's
    _safetensors().save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return out


def read_model(folder: Path) -> tuple[RunConfig, dict[str, torch.Tensor]]:
    """Of a Hugging Face folder: a run's config with its sizes and tokenizer, and our whole parameters, float32."""
    theirs = _read_object(folder / CONFIG)
    try:
        family = hf.find_family(theirs.get("model_type"), "imported")
        model = family.read_config(theirs)
        config = RunConfig(model=model, tokenizer=_tokenizer_of(model.vocab_size))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return config, hf.from_hf(family, read_tensors(folder), model)


def _tokenizer_of(vocab_size: int) -> str:
    for name, size in TOKENIZERS.items():
        if size == vocab_size:
            return name
    known = ", ".join(f"{name} ({size})" for name, size in sorted(TOKENIZERS.items()))
    raise ValueError(f"vocab_size is {vocab_size}, of no tokenizer that train.py has: {known}")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the files that its index names."""
    files: Iterable[str] = [WEIGHTS]
    if (folder / INDEX).is_file():
        placed = _read_object(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
            raise ValueError(f"{folder}: {INDEX} does not say in which files the weights are")
        files = sorted(set(placed.values()))
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: no {file}; only weights in safetensors can be imported")
        load = _safetensors().load_file
        try:
            tensors |= load(folder / file)
        except Exception as error:  # safetensors has an error of its own, and passes on those of torch and the system
            raise ValueError(f"{folder / file}: not readable as safetensors ({error}): copy it again") from error
    return tensors


def _read_object(file: Path) -> dict:
    """ValueError unless the file holds a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.parent}: no readable {file.name} of a Hugging Face model ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.parent}: {file.name} holds no JSON object")
    return content


def _safetensors():
    try:
        import safetensors.torch  # only this page needs it
    except ModuleNotFoundError as error:
        raise ValueError("safetensors is not installed: pip install 'heiretsu[hf]'") from error
    return safetensors.torch
