"""Sampling at its edges: ties, temperatures near 0, and what cannot be sampled from."""

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.model.config import ModelConfig
from heiretsu.model.gpt import GPT
from heiretsu.model.seeding import initialise
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.placement import placement_table
from heiretsu.run.sampling import generate


@pytest.fixture
def model():
    mesh = abstract_mesh()
    model = GPT(ModelConfig(vocab_size=40, n_layer=1, n_head=2, n_embed=8, block_size=8), mesh, plain)
    initialise(model, placement_table(model, mesh), seed=1)
    return model


@pytest.fixture
def undecided(model):
    """All of its logits are equal."""
    with torch.no_grad():
        model.wte.weight.zero_()
    return model


def test_top_k_keeps_k_of_those_that_tie_the_lower_first(undecided):
    drawn = {k: set(generate(undecided, [3], 60, top_k=k, seed=k)) for k in (1, 2, 5, 40, 1000)}
    assert drawn[1] == {0} and drawn[2] == {0, 1} and drawn[5] == set(range(5))
    assert max(drawn[40]) > 20 and max(drawn[1000]) > 20


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40, 1e-320])
def test_a_temperature_near_0_takes_the_likeliest_token(model, temperature):
    cold = list(generate(model, [3, 4], 12, temperature=0))
    assert list(generate(model, [3, 4], 12, temperature=temperature)) == cold


def test_an_infinite_temperature_knows_no_preference(model):
    assert len(set(generate(model, [3], 200, temperature=float("inf")))) > 30


@pytest.mark.parametrize(
    "options, what",
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"prompt": []}, "the prompt is empty"),
    ],
)
def test_what_is_no_way_to_sample_is_refused(model, options, what):
    with pytest.raises(ValueError, match=what):
        list(generate(model, **{"prompt": [3], "num_tokens": 1, **options}))


def test_a_diverged_model_is_named_as_such(model):
    with torch.no_grad():
        model.ln_f.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        list(generate(model, [3], 1))
