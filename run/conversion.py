"""GPT-2 between Hugging Face's files and our checkpoints, both ways.

    python -m heiretsu.run.conversion import GPT2_DIR OUT      # config.json, *.safetensors -> OUT/step_00000000
    python -m heiretsu.run.conversion export CKPT DIR          # a checkpoint, or a run's newest -> the same two

An imported checkpoint is one of step 0 with a fresh optimizer. Any topology starts from it, with `train.py --init_from
OUT --preset gpt2 --tokenizer gpt2` or the flags of its sizes. transformers' GPT2LMHeadModel.from_pretrained reads an
exported folder. Neither direction needs transformers itself.

Hugging Face stores a linear weight as (in, out), we as (out, in); it holds query, key and value side by side in one
(C, 3C), we as (3, C, C). Its embedding has as many rows as there are tokens, ours is padded with zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from heiretsu.data.tokenizer import TOKENIZERS
from heiretsu.model.config import ModelConfig
from heiretsu.parallel.checkpoint import SaveError
from heiretsu.parallel.checkpoint_folder import checkpoints
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run.building import build_engine
from heiretsu.run.options import parse_args
from heiretsu.run.saved import load_model
from heiretsu.run.state import save

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# What our model computes. The first of each is also what transformers takes where config.json does not say.
_COMPUTED: dict[str, tuple] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
_LARGEST_SIZE = 2**17  # of anything in config.json: a damaged one must not ask for more than there is
_SIZES = {"vocab_size": "vocab_size", "block_size": "n_positions"}
_SIZES |= {"n_layer": "n_layer", "n_head": "n_head", "n_embed": "n_embd"}  # ours: theirs

# Each parameter of a block: ours, theirs. Every `.weight` but a norm's is a linear one.
_BLOCK = {
    "ln_1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "ln_2": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}


def import_gpt2(source: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Write the GPT-2 of a Hugging Face folder as a checkpoint of step 0. Returns its path, out/step_00000000.

    Raises ValueError, in one line, for another architecture, tensors that do not fit, or an `out` with checkpoints.
    """
    if checkpoints(out):
        raise ValueError(f"{out}: holds checkpoints already; import into another folder")
    model = read_config(Path(source))
    weights = from_hf(read_tensors(Path(source)), model)
    tokenizer = {size: name for name, size in TOKENIZERS.items()}[model.vocab_size]
    config = replace(parse_args(["--tokenizer", tokenizer], world_size=1), model=model)
    engine = build_engine(config, abstract_mesh(), ops=None)  # nothing is computed
    for name, param in engine.params.items():
        with torch.no_grad():
            param.copy_(weights[name])
    return save(out, 0, engine, json.loads(config.to_json()), keep=1)


def export_gpt2(source: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Write a dense checkpoint as a folder that transformers reads. Returns the folder.

    Raises ValueError, in one line, for a mixture of experts, a torn checkpoint, or an `out` that has a model.
    """
    out = Path(out)
    taken = [name for name in ("config.json", WEIGHTS, INDEX) if (out / name).exists()]
    if taken:
        raise ValueError(f"{out}: holds {taken[0]} already; export into another folder")
    model, run = load_model(source, ops=None)
    tensors = to_hf(dict(model.named_parameters()), model.config)
    out.mkdir(parents=True, exist_ok=True)
    # transformers wants to be told that these are PyTorch's
    _safetensors().save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(hf_config(model.config, run["config"]["dtype"]), indent=2) + "\n")
    return out


def read_config(folder: Path) -> ModelConfig:
    """The sizes in a folder's config.json. ValueError unless it is a GPT-2 that our model computes exactly.

    Its dropout is left at 0: that belongs to a run, not to the weights.
    """
    theirs = _read_object(folder / "config.json")
    if theirs.get("model_type") != "gpt2":
        raise ValueError(f"{folder}: model_type is {theirs.get('model_type')!r}; only 'gpt2' can be imported")
    for key, allowed in _COMPUTED.items():
        value = theirs.get(key, allowed[0])
        if value not in allowed:
            raise ValueError(f"{folder}: {key} is {value!r}; only {' or '.join(map(repr, allowed))} can be imported")
    for key in _SIZES.values():
        if type(theirs.get(key)) is not int or not 1 <= theirs[key] <= _LARGEST_SIZE:
            raise ValueError(f"{folder}: config.json has no {key}, or one that is no size: {theirs.get(key)!r}")
    model = ModelConfig(**{ours: theirs[key] for ours, key in _SIZES.items()})
    if theirs.get("n_inner") not in (None, model.ffn_size):
        raise ValueError(f"{folder}: n_inner is {theirs['n_inner']}; only 4 * n_embd can be imported")
    if model.vocab_size not in TOKENIZERS.values():
        known = ", ".join(f"{name} ({size})" for name, size in sorted(TOKENIZERS.items()))
        raise ValueError(f"{folder}: vocab_size is {model.vocab_size}, of no tokenizer that train.py has: {known}")
    return model


def hf_config(model: ModelConfig, dtype: str) -> dict:
    """What transformers' GPT2Config needs to build this model. dtype: of the stored weights."""
    end_of_text = model.vocab_size - 1  # of both tokenizers
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{key: _COMPUTED[key][0] for key in _COMPUTED},
        **{key: getattr(model, ours) for ours, key in _SIZES.items()},
        "n_inner": None,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), model.dropout),
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
    }


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


def from_hf(tensors: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Our whole parameters, float32, from GPT2LMHeadModel's or GPT2Model's. ValueError unless they fit one to one."""
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    head = theirs.pop("lm_head.weight", None)  # the tied copy, which some files hold too
    shapes = _shapes(model)
    for problem, names in (("no", shapes.keys() - theirs.keys()), ("an unknown", theirs.keys() - shapes.keys())):
        if names:
            raise ValueError(f"the weights have {problem} tensor {min(names)}")
    for name, shape in shapes.items():
        if tuple(theirs[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(theirs[name].shape)}, but config.json asks for {shape}")
    if head is not None and not torch.equal(head, theirs["wte.weight"]):
        raise ValueError("lm_head.weight differs from wte.weight; only a tied head can be imported")

    ours = {}
    for name, key in _names(model).items():
        tensor = theirs[key].float()
        if _is_linear(key):
            tensor = tensor.T
        if ".qkv." in name:
            tensor = tensor.unflatten(0, (3, -1))
        ours[name] = tensor
    padding = model.padded_vocab_size - model.vocab_size
    ours["wte.weight"] = torch.nn.functional.pad(ours["wte.weight"], (0, 0, 0, padding))
    return ours


def to_hf(params: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """GPT2LMHeadModel's state from our whole parameters, in their dtype. ValueError for a mixture of experts."""
    if model.num_experts:
        raise ValueError(f"{model.num_experts} experts have no form in GPT-2: only dense models can be exported")
    theirs = {}
    for name, key in _names(model).items():
        tensor = params[name].detach()
        if ".qkv." in name:
            tensor = tensor.flatten(0, 1)
        if _is_linear(key):
            tensor = tensor.T
        theirs[f"transformer.{key}"] = tensor[: model.vocab_size] if key == "wte.weight" else tensor
    return {key: tensor.contiguous() for key, tensor in theirs.items()}


def _names(model: ModelConfig) -> dict[str, str]:
    """Our name -> theirs, without the prefix `transformer.`."""
    names = {"wte.weight": "wte.weight", "wpe.weight": "wpe.weight"}
    for layer in range(model.n_layer):
        for ours, theirs in _BLOCK.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"h.{layer}.{theirs}.{kind}"
    return names | {"ln_f.weight": "ln_f.weight", "ln_f.bias": "ln_f.bias"}


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Their shapes, by their names."""
    C, F = model.n_embed, model.ffn_size
    outputs = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, F), "mlp.c_proj": (F, C)}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (model.vocab_size, C), "wpe.weight": (model.block_size, C)}
    for key in set(_names(model).values()) - shapes.keys():
        linear = outputs.get(".".join(key.split(".")[2:-1]))
        shapes[key] = (C,) if linear is None else linear if key.endswith("weight") else linear[1:]
    return shapes


def _is_linear(key: str) -> bool:
    return key.startswith("h.") and key.endswith(".weight") and ".ln_" not in key


def _safetensors():
    try:
        import safetensors.torch  # only this page needs it
    except ModuleNotFoundError as error:
        raise ValueError("safetensors is not installed: pip install 'heiretsu[hf]'") from error
    return safetensors.torch


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    run = {"import": import_gpt2, "export": export_gpt2}[args.direction]
    try:
        path = run(args.source, args.out)
    except (ValueError, SaveError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    print(f"wrote {path}", file=sys.stderr)  # which prints any name, whatever its encoding


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heiretsu.run.conversion", description="GPT-2 to and from Hugging Face's files."
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    add = directions.add_parser("import", help="a Hugging Face folder -> a checkpoint of step 0").add_argument
    add("source", metavar="GPT2_DIR", help="folder with config.json and model.safetensors")
    add("out", metavar="OUT", help="folder of checkpoints to make")
    add = directions.add_parser("export", help="a dense checkpoint -> a folder that transformers reads").add_argument
    add("source", metavar="CKPT", help="one step's folder, or a run's, whose newest is taken")
    add("out", metavar="DIR", help="folder to make")
    return parser


if __name__ == "__main__":
    main()
