"""Sizes: published parameter counts, which layers are mixtures, and how layers are dealt out to stages."""

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heiretsu.kernels import plain
from heiretsu.model.config import PRESETS, ModelConfig, split_layers
from heiretsu.model.gpt import GPT
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run.building import build_engine
from tests.training import DENSE, MIXTURE, run_config

PUBLISHED = {  # of the released GPT-2 checkpoints
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset):
    assert ModelConfig(**PRESETS[preset], vocab_size=50257).num_parameters == PUBLISHED[preset]


@pytest.mark.parametrize("model", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_count_leaves_out_exactly_the_padding_of_the_vocabulary(model):
    engine = build_engine(run_config(model), abstract_mesh(), plain)
    stored = sum(param.numel() for param in engine.params.values())
    assert stored - model.num_parameters == (128 - 67) * 16
    assert (engine.params["wte.weight"][67:] == 0).all() and (engine.params["wte.weight"][:67] != 0).any(1).all()


@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"ep": 2}, {"ep": 4, "tp": 2}, {"dp": 2, "tp": 4}], ids=str)
@pytest.mark.parametrize("moe_freq", [1, 2])
def test_a_block_has_the_elements_on_a_rank_that_its_modules_declare(sizes, moe_freq):
    model = replace(MIXTURE, moe_freq=moe_freq)
    blocks = GPT(model, abstract_mesh(**sizes, device="meta"), ops=None).blocks
    for layer, block in blocks.items():
        counted = model.block_parameters(model.is_moe(int(layer)), sizes.get("ep", 1), sizes.get("tp", 1))
        assert counted == sum(param.numel() for param in block.parameters())


def test_every_moe_freq_th_layer_is_a_mixture():
    assert ModelConfig(n_layer=6, num_experts=4, moe_freq=2).moe_layers == [1, 3, 5]
    assert ModelConfig(n_layer=7, num_experts=4, moe_freq=3).moe_layers == [2, 5]
    assert ModelConfig(n_layer=3, num_experts=4, moe_freq=1).moe_layers == [0, 1, 2]
    assert ModelConfig(n_layer=6).moe_layers == []


def costliest(config: ModelConfig, cuts) -> int:
    bounds = [0, *cuts, config.n_layer]
    parts = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    head = [0] * (len(parts) - 1) + [config.head_macs]
    return max(sum(map(config.layer_macs, part)) + extra for part, extra in zip(parts, head, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.sampled_from([257, 50257]), st.sampled_from([0, 4]))
def test_stages_are_contiguous_and_no_split_has_a_cheaper_costliest_stage(n_layer, num_stages, vocab_size, num_experts):
    config = ModelConfig(n_layer=n_layer, vocab_size=vocab_size, num_experts=num_experts, moe_freq=1)
    if num_stages > n_layer:
        with pytest.raises(ValueError, match=f"--pp {num_stages} .* --n_layer is {n_layer}"):
            split_layers(config, num_stages)
        return
    stages = split_layers(config, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(n_layer)) and all(stages)
    best = min(costliest(config, cuts) for cuts in combinations(range(1, n_layer), num_stages - 1))
    assert costliest(config, [stage.start for stage in stages[1:]]) == best


def test_the_head_of_a_large_vocabulary_counts_like_layers():
    stages = split_layers(ModelConfig(**{**PRESETS["gpt2"], "vocab_size": 50257}), 4)
    assert len(stages[-1]) < len(stages[0])


@pytest.mark.parametrize(
    "sizes, asked",
    [((4, 1), "--pp 4"), ((2, 2), "--pp 2 x --virtual_stages 2"), ((1, 4), "--pp 1 x --virtual_stages 4")],
)
def test_more_stages_than_layers_are_refused_and_as_many_are_not(sizes, asked):
    with pytest.raises(ValueError) as refused:
        split_layers(ModelConfig(n_layer=3), *sizes)
    assert str(refused.value) == f"{asked} stages need at least as many layers, but --n_layer is 3"
    assert split_layers(ModelConfig(n_layer=4), *sizes) == [range(i, i + 1) for i in range(4)]


def test_a_mixture_may_have_one_expert():
    assert [ModelConfig(num_experts=count, moe_freq=2).is_moe(1) for count in (0, 1, 2)] == [False, True, True]
