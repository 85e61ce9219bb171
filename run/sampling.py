"""Sampling text from a whole model on one device: for sample.py, and at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from heiretsu.data.tokenizer import load_tokenizer
from heiretsu.model.gpt import GPT
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import Mesh
from heiretsu.run.config import RunConfig


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Sequence[int],
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Tokens that continue `prompt`, one by one. model: all layers, tp 1. prompt: at least one token id.

    temperature: divides the logits; 0 takes the likeliest token. top_k: only the k likeliest are drawn from, the lower
    of equal ones first. The last block_size tokens are the context; nothing is cached. Raises ValueError for an empty
    prompt, another temperature or top_k, and where the model's logits are not finite.
    """
    if not temperature >= 0:  # NaN too
        raise ValueError(f"temperature {temperature}: must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k}: must be at least 1")
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token (end-of-text starts a new document)")
    model.eval()
    device = model.wte.weight.device
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        context = torch.tensor([tokens[-model.config.block_size :]], device=device)
        logits = model.next_token_logits(context)[0].float().cpu()
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: its training has diverged")
        if temperature == 0:
            choice = int(logits.argmax())
        else:
            if top_k is not None:
                logits[logits.argsort(descending=True, stable=True)[top_k:]] = -torch.inf
            # From the largest, so that nothing overflows; 1e-30 is a temperature at which only equal ones compete.
            logits = (logits - logits.max()) / max(temperature, 1e-30)
            choice = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        tokens.append(choice)
        yield choice


def find_tokenizer(config: RunConfig, mesh: Mesh):
    """What turns the sample at the end of a run into text. None where there is to be none; where it cannot be had, a
    line says why."""
    if not config.sample_tokens or mesh.world.size > 1:
        return None
    try:
        return load_tokenizer(config.tokenizer, config.vocab_dir)
    except ValueError as error:
        print(f"there will be no sample at the end: {error}", flush=True)
        return None


def sample(config: RunConfig, engine: Engine, tokenizer) -> str:
    """A piece of text by the trained model, after an end-of-text."""
    model = engine.stages[0]
    assert isinstance(model, GPT)
    try:
        tokens = list(generate(model, [tokenizer.eot_token], config.sample_tokens, temperature=0.9, seed=config.seed))
    except ValueError as error:
        return f"there is no sample: {error}"
    return "--- sample ---\n" + tokenizer.decode(tokens) + "\n---"
