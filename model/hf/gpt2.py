"""GPT-2 (Radford et al. 2019) as transformers' GPT2LMHeadModel and GPT2Model are stored.

A linear weight is (in, out), ours (out, in); query, key and value lie side by side in one (C, 3C), ours in (3, C, C).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heiretsu.model.config import ModelConfig
from heiretsu.model.hf import Stored, check_computed, embedding, read_sizes, same, transposed
from heiretsu.model.seeding import INIT_STD

PREFIX = "transformer."
LEFT_OUT = (".attn.bias", ".attn.masked_bias")  # the causal mask, which the files of the first days hold
TIED = {"lm_head.weight": "wte.weight"}

SIZES = {"vocab_size": "vocab_size", "block_size": "n_positions"}
SIZES |= {"n_layer": "n_layer", "n_head": "n_head", "n_embed": "n_embd"}  # ours: theirs

# The first of each is also what transformers takes where config.json does not say.
COMPUTED: dict[str, tuple] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def read_config(theirs: Mapping[str, Any]) -> ModelConfig:
    check_computed(theirs, COMPUTED)
    model = read_sizes(theirs, SIZES)
    if theirs.get("n_inner") not in (None, model.ffn_size):
        raise ValueError(f"n_inner is {theirs['n_inner']}; only 4 * n_embd can be imported")
    return model


def write_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """What transformers' GPT2Config needs. dtype: of the stored weights."""
    if model.num_experts:
        raise ValueError(f"{model.num_experts} experts have no form in GPT-2: only dense models can be exported")
    end_of_text = model.vocab_size - 1  # of both tokenizers
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{key: allowed[0] for key, allowed in COMPUTED.items()},
        **{key: getattr(model, ours) for ours, key in SIZES.items()},
        "n_inner": None,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), model.dropout),
        "initializer_range": INIT_STD,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
    }


def parameters(model: ModelConfig) -> dict[str, Stored]:
    stored = {"wte.weight": embedding("wte.weight", model), "wpe.weight": same("wpe.weight")}
    for layer in range(model.n_layer):
        ours, theirs = f"blocks.{layer}", f"h.{layer}"
        stored[f"{ours}.attn.qkv.weight"] = Stored(
            (f"{theirs}.attn.c_attn.weight",),
            into=lambda side_by_side: side_by_side.T.unflatten(0, (3, -1)),
            back=lambda qkv: (qkv.flatten(0, 1).T,),
        )
        stored[f"{ours}.attn.qkv.bias"] = Stored(
            (f"{theirs}.attn.c_attn.bias",),
            into=lambda side_by_side: side_by_side.unflatten(0, (3, -1)),
            back=lambda qkv: (qkv.flatten(),),
        )
        for here, there in (("attn.proj", "attn.c_proj"), ("mlp.fc", "mlp.c_fc"), ("mlp.proj", "mlp.c_proj")):
            stored[f"{ours}.{here}.weight"] = transposed(f"{theirs}.{there}.weight")
            stored[f"{ours}.{here}.bias"] = same(f"{theirs}.{there}.bias")
        for norm in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            stored[f"{ours}.{norm}"] = same(f"{theirs}.{norm}")
    return stored | {name: same(name) for name in ("ln_f.weight", "ln_f.bias")}
