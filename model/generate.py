"""Sampling text from a whole model on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from heiretsu.model.gpt import GPT


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

    temperature: divides the logits; 0 takes the likeliest token. top_k: only the k likeliest are drawn from. The last
    block_size tokens are the context; nothing is cached.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token (end-of-text starts a new document)")
    model.eval()
    device = model.wte.weight.device
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        context = torch.tensor([tokens[-model.config.block_size :]], device=device)
        logits = model.next_token_logits(context)[0].float().cpu()
        if temperature == 0:
            choice = int(logits.argmax())
        else:
            logits = logits / temperature
            if top_k is not None and top_k < len(logits):
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            choice = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        tokens.append(choice)
        yield choice
