"""What a model is made of before its first step, and what a step of it costs."""

import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heiretsu.kernels import plain
from heiretsu.model.config import ModelConfig
from heiretsu.model.gpt import GPT, Block
from heiretsu.model.seeding import fold
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.pipeline import Context, Microbatch
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from tests.training import DENSE, MIXTURE, dataset, run_config

# Normals of 0.02, as transformers' GPT2Config has it, and for what adds to the residual stream 1 / sqrt(2 n_layer) of
# that (Radford et al. 2019, section 2.3).
RESIDUAL = re.compile(r"blocks\.\d\.(attn\.proj\.weight|mlp\.proj\.weight|mlp\.w2)")
OTHERS = re.compile(r"(wte|wpe)\.weight|blocks\.\d\.(attn\.qkv\.weight|mlp\.fc\.weight|mlp\.router\.weight|mlp\.w1)")
ONES = re.compile(r"(blocks\.\d\.ln_[12]|ln_f)\.weight")
ZEROS = re.compile(r"(blocks\.\d\.)?(ln_[12f]|attn\.qkv|attn\.proj|mlp\.fc|mlp\.proj)\.bias|blocks\.\d\.mlp\.b[12]")


@pytest.mark.parametrize("num_experts", [0, 4])
def test_initial_values_are_gpt2s(num_experts):
    model = ModelConfig(n_layer=8, n_embed=32, n_head=2, block_size=64, num_experts=num_experts)
    params = build_engine(run_config(model), abstract_mesh(), plain).params
    kinds = {0.02: OTHERS, 0.02 / math.sqrt(16): RESIDUAL}
    for std, names in kinds.items():
        drawn = {name: param[:257] for name, param in params.items() if names.fullmatch(name)}
        for name, values in drawn.items():
            noise = 5 * std / math.sqrt(values.numel())
            assert abs(values.mean()) < noise and abs(values.std() - std) < noise, name
    ones = [name for name, param in params.items() if ONES.fullmatch(name) and (param == 1).all()]
    zeros = [name for name, param in params.items() if ZEROS.fullmatch(name) and (param == 0).all()]
    drawn = [name for name in params if RESIDUAL.fullmatch(name) or OTHERS.fullmatch(name)]
    assert sorted(ones + zeros + drawn) == sorted(params)


@pytest.mark.parametrize("model", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_flops_are_those_that_torch_counts_but_for_the_future_that_attention_masks(model):
    config = run_config(model, global_batch=2, microbatches=1)
    engine = build_engine(config, abstract_mesh(), plain)
    batches = read_batches(config, engine.mesh, dataset(model.vocab_size, model.block_size), 0)
    with FlopCounterMode(display=False) as counter:
        engine.accumulate(batches)
    # plain multiplies all of QK^T and PV, 2 T C each a token; half of that is masked, and no work that a model needs.
    masked = 6 * model.n_layer * model.block_size * model.n_embed
    assert counter.get_total_flops() == config.tokens_per_step * (model.flops_per_token + masked)


def test_flops_of_gpt2_by_hand():
    """12 layers of 12 C^2 weights and T C of causal attention, and the head over 50257 tokens: 6 FLOPs for each."""
    gpt2 = ModelConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embed=768)
    assert gpt2.flops_per_token == 6 * (12 * (12 * 768**2 + 1024 * 768) + 50257 * 768) == 797_815_296


class Watched:
    """plain, and what its attention and dropout were told to drop: [(op, p, seed, offset of the sample)]."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        return getattr(plain, name)

    def attention(self, q, k, v, dropout_p, seed, offsets, **options):
        self.told.append(("attention", dropout_p, seed, offsets))
        return plain.attention(q, k, v, dropout_p=dropout_p, seed=seed, offsets=offsets, **options)

    def dropout(self, x, p, seed, sample_offset):
        self.told.append(("dropout", p, seed, sample_offset))
        return plain.dropout(x, p, seed, sample_offset)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_block_drops_three_times_with_seeds_of_step_layer_and_site_and_not_when_it_evaluates(p):
    ops = Watched()
    block = Block(1, abstract_mesh(), ModelConfig(n_layer=2, n_head=2, n_embed=16, dropout=p), ops, 7, torch.float32)
    x, context = torch.randn(2, 3, 16), Context(step=5, first_sample=4)
    block.train()(x, context)
    attention, *others = ops.told
    if p == 0.0:
        assert (attention, others) == (("attention", 0.0, 0, (4, 0)), [])
        return
    seeds = {site: fold(7, 5, 1, site) for site in ("attention", "attention output", "mlp output")}
    assert attention == ("attention", p, seeds["attention"], (4, 0))
    assert others == [("dropout", p, seeds[site], 4) for site in ("attention output", "mlp output")]
    ops.told.clear()
    block.eval()(x, context)
    assert ops.told == [("attention", 0.0, 0, (4, 0))]


def test_the_embedding_drops_first_with_a_seed_of_its_own():
    ops = Watched()
    config = ModelConfig(vocab_size=9, block_size=3, n_layer=1, n_head=2, n_embed=16, dropout=0.25)
    ids = torch.tensor([[1, 2, 8]])
    GPT(config, abstract_mesh(), ops, seed=7).train()(None, Microbatch(ids, ids, Context(step=5, first_sample=4)))
    assert ops.told[0] == ("dropout", 0.25, fold(7, 5, "embedding"), 4) and len(ops.told) == 4
