"""Sampling draws each token as often as its probability says."""

import math

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.model.config import ModelConfig
from heiretsu.model.gpt import GPT
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run.sampling import generate

# Those of the ids that the model below can say, whatever came before. No two are equal.
LOGITS = {3: 2.0, 8: 1.5, 100: 1.0, 200: 0.0, 256: -1.0}
DRAWS = 800


@pytest.fixture(scope="module")
def model():
    """A GPT whose last norm gives (0, 1, 0, ...) for any text, so that column 1 of the embedding is the logits."""
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embed=4, block_size=1), abstract_mesh(), plain)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
        model.wte.weight[:, 1] = -100.0
        for token, logit in LOGITS.items():
            model.wte.weight[token, 1] = logit
    return model


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (2.5, 3), (0.7, 2)])
def test_tokens_come_as_often_as_the_softmax_of_the_divided_logits_says(model, temperature, top_k):
    drawn = list(generate(model, [0], DRAWS, temperature, top_k, seed=7))
    likeliest = sorted(LOGITS, key=LOGITS.get, reverse=True)[:top_k]
    weights = {token: math.exp(LOGITS[token] / temperature) for token in likeliest}
    assert set(drawn) <= weights.keys()
    for token, weight in weights.items():
        p = weight / sum(weights.values())
        allowed = 4 * math.sqrt(DRAWS * p * (1 - p))  # standard deviations of the count
        assert abs(drawn.count(token) - DRAWS * p) <= allowed + 1, f"token {token} drawn {drawn.count(token)} times"


def test_a_model_that_was_training_drops_nothing_when_it_is_sampled(model):
    model.train()
    assert next(generate(model, [0], 1)) in LOGITS
    assert not model.training


def test_unless_told_otherwise_it_draws_from_all_at_a_temperature_of_one_with_a_seed_of_zero(model):
    assert list(generate(model, [0], 100)) == list(generate(model, [0], 100, temperature=1.0, top_k=None, seed=0))


def test_a_temperature_of_zero_says_the_likeliest(model):
    assert list(generate(model, [0], 3, temperature=0)) == [3, 3, 3]
