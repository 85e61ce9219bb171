"""Hugging Face's files and our parameters: one file here a family of models, named as its `model_type` in config.json.

A family's file knows neither checkpoints nor runs. It has

    read_config(theirs)         the ModelConfig of a config.json; ValueError for what our model does not compute
    write_config(model, dtype)  the config.json of a ModelConfig; ValueError for what the family has no form for
    parameters(model)           {our name: Stored}, for every parameter of the model
    PREFIX                      of their names where the whole model is stored, not where its trunk alone is
    LEFT_OUT                    endings of names that files may hold besides, and that are no parameters
    TIED                        {name: the name of which it must be a copy, if it is there}

What is done with these is the same for all: `from_hf`, `to_hf`. How to add one: docs/adding-a-model-family.md.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from heiretsu.model.config import ModelConfig
from heiretsu.model.gpt import GPT
from heiretsu.parallel.mesh import abstract_mesh

_LARGEST_SIZE = 2**17  # of anything in config.json: a damaged one must not ask for more than there is


@dataclass(frozen=True)
class Stored:
    """How they store one of our parameters: under which names, and what makes ours of theirs and theirs of ours."""

    names: tuple[str, ...]
    into: Callable[..., torch.Tensor]
    back: Callable[[torch.Tensor], Sequence[torch.Tensor]]


def same(name: str) -> Stored:
    return Stored((name,), lambda theirs: theirs, lambda ours: (ours,))


def transposed(name: str) -> Stored:
    """A linear weight as (in, out), where ours is (out, in)."""
    return Stored((name,), lambda theirs: theirs.T, lambda ours: (ours.T,))


def stacked(*names: str) -> Stored:
    """Several tensors, which ours has as one with a dim for them in front."""
    return Stored(names, lambda *theirs: torch.stack(theirs), lambda ours: ours.unbind())


def embedding(name: str, model: ModelConfig) -> Stored:
    """(V, C), where ours has rows of zeros below."""
    rows = model.padded_vocab_size - model.vocab_size
    pad = torch.nn.functional.pad
    return Stored((name,), lambda theirs: pad(theirs, (0, 0, 0, rows)), lambda ours: (ours[: model.vocab_size],))


def families() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_family(name: object, to_be: str) -> ModuleType:
    """to_be: what it is wanted for, in words. ValueError if there is none of that name."""
    if name not in families():
        raise ValueError(f"model_type is {name!r}; only {' or '.join(map(repr, families()))} can be {to_be}")
    return importlib.import_module(f"{__name__}.{name}")


def read_sizes(theirs: Mapping[str, Any], names: Mapping[str, str]) -> ModelConfig:
    """names: our field, their key. Dropout is left at 0: that belongs to a run, not to the weights."""
    for key in names.values():
        if type(theirs.get(key)) is not int or not 1 <= theirs[key] <= _LARGEST_SIZE:
            raise ValueError(f"config.json has no {key}, or one that is no size: {theirs.get(key)!r}")
    return ModelConfig(**{ours: theirs[key] for ours, key in names.items()})


def check_computed(theirs: Mapping[str, Any], computed: Mapping[str, tuple]) -> None:
    """computed: by key, the values that our model computes, first the one that counts where config.json has none."""
    for key, allowed in computed.items():
        value = theirs.get(key, allowed[0])
        if value not in allowed:
            raise ValueError(f"{key} is {value!r}; only {' or '.join(map(repr, allowed))} can be imported")


def from_hf(family: ModuleType, tensors: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Our whole parameters, float32, from all tensors of their files. ValueError unless they fit one to one."""
    theirs = {name.removeprefix(family.PREFIX): tensor for name, tensor in tensors.items()}
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith(family.LEFT_OUT)}
    copies = {name: theirs.pop(name) for name in family.TIED if name in theirs}
    ours = dict(GPT(model, abstract_mesh(device="meta"), ops=None).named_parameters())
    stored = _stored(family, model, ours)
    shapes = {key: tuple(tensor.shape) for key, tensor in _their_tensors(stored, ours)}
    for problem, names in (("no", shapes.keys() - theirs.keys()), ("an unknown", theirs.keys() - shapes.keys())):
        if names:
            raise ValueError(f"the weights have {problem} tensor {min(names)}")
    for name, shape in shapes.items():
        if tuple(theirs[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(theirs[name].shape)}, but config.json asks for {shape}")
    for name, tensor in copies.items():
        if not torch.equal(tensor, theirs[family.TIED[name]]):
            raise ValueError(f"{name} differs from {family.TIED[name]}; only a tied head can be imported")
    return {name: how.into(*(theirs[key].float() for key in how.names)) for name, how in stored.items()}


def to_hf(family: ModuleType, params: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Their tensors, by their names, from our whole parameters, in the same dtype."""
    stored = _stored(family, model, params)
    return {family.PREFIX + key: tensor.contiguous() for key, tensor in _their_tensors(stored, params)}


def _stored(family: ModuleType, model: ModelConfig, ours: Mapping[str, torch.Tensor]) -> dict[str, Stored]:
    stored = family.parameters(model)
    assert stored.keys() == ours.keys(), f"{family.__name__}: {stored.keys() ^ ours.keys()} on one side only"
    return stored


def _their_tensors(stored: Mapping[str, Stored], ours: Mapping[str, torch.Tensor]):
    """Pairs of their name and their tensor. Of tensors on the meta device: for their shapes."""
    for name, how in stored.items():
        yield from zip(how.names, how.back(ours[name].detach()), strict=True)
