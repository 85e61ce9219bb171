"""Parity cases and planted bugs of route. In the interpreter a block is 32 tokens.

Experts whose results are exactly zero crowd the peers of the small elements in the parity rule, so that a 16-bit
rounding error has nothing to compare with: cases that have many run in float32 alone.
"""

import torch

from tests.kernels.parity import Case, Mutation


def _route(N, E, top_k, edit=lambda logits: logits):
    def inputs(generator, dtype):
        logits = edit(torch.randn(N, E, generator=generator))
        return {"logits": logits.to(dtype).requires_grad_(), "top_k": top_k}

    return inputs


def _ties(logits):
    return (logits * 2).round() / 2  # about ten values: most rows of 8 hold equal ones


def _closed(logits):
    """Experts that a mask has closed, in some rows all but one."""
    logits[:, 1] = -torch.inf
    logits[::3, 2:] = -torch.inf
    return logits


def _strided_logits(generator, dtype):
    table = torch.randn(6, 90, generator=generator).to(dtype)
    return {"logits": table.T[::2].requires_grad_(), "top_k": 2}  # (45, 6): experts far apart, every other token


FLOAT32 = (torch.float32,)
TWO = (torch.float32, torch.bfloat16)

CASES = [
    Case("route", "2 of 8", "three blocks of tokens with a tail", _route(70, 8, 2)),
    Case("route", "ties", "equal logits go to the lower expert", _route(40, 8, 3, _ties), FLOAT32),
    Case("route", "ties of 40", "ATen's sort is stable of its own below 17 elements", _route(9, 40, 9, _ties), FLOAT32),
    Case("route", "1 of 1", "one expert: a gate of 1, no gradient", _route(5, 1, 1), FLOAT32),
    Case("route", "1 of 5", "top 1: gates are 1 whatever the logits", _route(33, 5, 1), FLOAT32),
    Case("route", "all of 3", "a plain softmax, sorted; E and K no powers of two", _route(33, 3, 3), TWO),
    Case(
        "route", "closed experts", "logits of -inf, chosen where nothing else is left", _route(12, 6, 2, _closed), TWO
    ),
    Case("route", "large logits", "overflows without the maximum", _route(10, 4, 2, lambda logits: logits * 300), TWO),
    Case("route", "strided", "transposed, every other token left out", _strided_logits, FLOAT32),
    Case("route", "8 of 64", "many experts and choices", _route(20, 64, 8), FLOAT32),
    Case("route", "no tokens", "N = 0", _route(0, 4, 2), FLOAT32),
    Case("route", "tiny", "for the emulator", _route(9, 5, 2), TWO, emulate=True),
]

MUTATIONS = [
    Mutation(
        "tie order flipped",
        "index = tl.min(tl.where(left & (keys == best), e, E_PAD), 1)",
        "index = tl.max(tl.where(left & (keys == best), e, -1), 1)",
        caught_by="ties",
    ),
    Mutation(
        "gates not renormalised",
        "gates = exps / tl.sum(exps, 1)[:, None]",
        "gates = exps",
        caught_by="all of 3",
    ),
    Mutation(
        "maximum not subtracted",
        "tl.exp(chosen - tl.max(chosen, 1)[:, None])",
        "tl.exp(chosen)",
        caught_by="large logits",
    ),
    Mutation("expert chosen twice", "left = left & (e != index)", "left = left", caught_by="all of 3"),
    Mutation(
        "softmax backward without its mean",
        "gates * (dgates - tl.sum(gates * dgates, 1)[:, None])",
        "gates * dgates",
        caught_by="all of 3",
    ),
    Mutation(
        "strides of the logits ignored in the backward",
        "n * stride_n + experts * stride_e",
        "n * num_experts + experts",
        caught_by="strided",
    ),
]
