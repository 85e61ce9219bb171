"""GPT-2's config.json, whole, and each refusal of what our model does not compute, to the last word."""

from pathlib import Path

import pytest
import torch

from heiretsu.model import hf
from heiretsu.model.config import ModelConfig
from heiretsu.model.gpt import GPT
from heiretsu.model.hf import gpt2
from heiretsu.parallel.mesh import abstract_mesh

MODEL = ModelConfig(vocab_size=50257, block_size=16, n_layer=2, n_head=2, n_embed=8, dropout=0.1)
THEIRS = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "vocab_size": 50257,
    "n_positions": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "n_inner": None,
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "initializer_range": 0.02,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "dtype": "bfloat16",
}


def test_the_config_of_a_model_is_this():
    assert gpt2.write_config(MODEL, "bfloat16") == THEIRS
    read = gpt2.read_config(THEIRS)
    assert read == ModelConfig(vocab_size=50257, block_size=16, n_layer=2, n_head=2, n_embed=8)  # no dropout
    sizes = {key: THEIRS[key] for key in gpt2.SIZES.values()}
    assert gpt2.read_config(sizes) == gpt2.read_config(THEIRS | {"n_inner": 32}) == read
    assert gpt2.read_config(THEIRS | {"activation_function": "gelu_pytorch_tanh"}) == read


REFUSED = [
    ({"activation_function": "gelu"}, "activation_function is 'gelu'; only 'gelu_new' or 'gelu_pytorch_tanh'"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; only 1e-05"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False; only True"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; only False"),
    ({"add_cross_attention": True}, "add_cross_attention is True; only False"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is False; only True"),
    ({"n_inner": 31}, "n_inner is 31; only 4 * n_embd"),
]


@pytest.mark.parametrize("change, why", REFUSED, ids=str)
def test_what_our_model_does_not_compute_is_refused(change, why):
    with pytest.raises(ValueError) as refused:
        gpt2.read_config(THEIRS | change)
    assert str(refused.value) == f"{why} can be imported"


@pytest.mark.parametrize("key", list(gpt2.SIZES.values()))
def test_a_size_is_a_whole_number_from_1_to_131072(key):
    for bad in (0, 131073, 2.0, True, "2", None):
        with pytest.raises(ValueError) as refused:
            gpt2.read_config(THEIRS | {key: bad, "n_inner": None})
        assert str(refused.value) == f"config.json has no {key}, or one that is no size: {bad!r}"
    for good in (1, 131072):
        assert getattr(gpt2.read_config(THEIRS | {key: good}), {v: k for k, v in gpt2.SIZES.items()}[key]) == good


def test_only_a_family_that_is_there_is_found():
    families = sorted({path.stem for path in Path(hf.__file__).parent.glob("*.py")} - {"__init__"})
    assert hf.families() == families and hf.find_family("gpt2", "imported") is gpt2
    for name in ("bert", None, ["gpt2"]):
        with pytest.raises(ValueError) as refused:
            hf.find_family(name, "imported")
        assert str(refused.value) == f"model_type is {name!r}; only {' or '.join(map(repr, families))} can be imported"
    with pytest.raises(ValueError) as refused:
        gpt2.write_config(ModelConfig(num_experts=3), "float32")
    assert str(refused.value) == "3 experts have no form in GPT-2: only dense models can be exported"


@pytest.fixture(scope="module")
def stored():
    """(our parameters, theirs), each element of ours another number."""
    named = GPT(MODEL, abstract_mesh(device="meta"), ops=None).named_parameters()
    ours, first = {}, 1.0
    for name, param in named:
        ours[name] = torch.arange(first, first + param.numel()).view(param.shape)
        first += param.numel()
    ours["wte.weight"][MODEL.vocab_size :] = 0.0
    return ours, hf.to_hf(gpt2, ours, MODEL)


def test_each_tensor_of_theirs_is_this_one_of_ours(stored):
    ours, theirs = stored
    assert all(tensor.is_contiguous() for tensor in theirs.values()) and len(theirs) == 4 + 2 * 12
    assert torch.equal(theirs["transformer.wte.weight"], ours["wte.weight"][:50257])
    assert torch.equal(theirs["transformer.wpe.weight"], ours["wpe.weight"])
    layer, block = "transformer.h.1", "blocks.1"
    qkv = ours[f"{block}.attn.qkv.weight"]
    assert torch.equal(theirs[f"{layer}.attn.c_attn.weight"], torch.cat([qkv[0].T, qkv[1].T, qkv[2].T], dim=1))
    assert torch.equal(theirs[f"{layer}.attn.c_attn.bias"], torch.cat(list(ours[f"{block}.attn.qkv.bias"])))
    for there, here in (("attn.c_proj", "attn.proj"), ("mlp.c_fc", "mlp.fc"), ("mlp.c_proj", "mlp.proj")):
        assert torch.equal(theirs[f"{layer}.{there}.weight"], ours[f"{block}.{here}.weight"].T)
        assert torch.equal(theirs[f"{layer}.{there}.bias"], ours[f"{block}.{here}.bias"])
    for same in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
        assert torch.equal(theirs[f"{layer}.{same}"], ours[f"{block}.{same}"])
    assert torch.equal(theirs["transformer.ln_f.bias"], ours["ln_f.bias"])
    back = hf.from_hf(gpt2, theirs, MODEL)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}


def test_tensors_that_do_not_fit_one_to_one_are_named(stored):
    theirs = stored[1]
    head, table = "lm_head.weight", "transformer.wte.weight"
    mask = {"transformer.h.0.attn.bias": torch.ones(1), "h.1.attn.masked_bias": torch.ones(1)}
    trunk = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    for fine in (theirs | {head: theirs[table]}, theirs | mask, trunk):
        assert hf.from_hf(gpt2, fine, MODEL).keys() == stored[0].keys()
    without = {name: tensor for name, tensor in theirs.items() if not name.startswith("transformer.h.1.ln_")}
    wrong = [
        (without, "the weights have no tensor h.1.ln_1.bias"),
        (theirs | {"z": mask, "b": mask}, "the weights have an unknown tensor b"),
        (
            theirs | {"transformer.ln_f.bias": torch.ones(9)},
            "ln_f.bias has shape (9,), but config.json asks for (8,)",
        ),
        (
            theirs | {head: theirs[table] + 1},
            "lm_head.weight differs from wte.weight; only a tied head can be imported",
        ),
    ]
    for tensors, why in wrong:
        with pytest.raises(ValueError) as refused:
            hf.from_hf(gpt2, tensors, MODEL)
        assert str(refused.value) == why


def test_tensors_are_stacked_in_the_order_of_their_names():
    one, two = torch.ones(2), torch.zeros(2)
    how = hf.stacked("one", "two")
    assert how.names == ("one", "two") and torch.equal(how.into(one, two), torch.stack([one, two]))
    assert [torch.equal(a, b) for a, b in zip(how.back(torch.stack([one, two])), (one, two), strict=True)] == [True] * 2
