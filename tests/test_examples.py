"""examples/: what a patched transformers GPT-2 computes is what it computed before."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    """examples/patch_transformers.py as a module; transformers never asks its hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    spec = importlib.util.spec_from_file_location("patch_transformers", EXAMPLES / "patch_transformers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gpt2(example, **changes):
    sizes = {"vocab_size": 61, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
    config = example.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **changes)
    torch.manual_seed(0)
    model = example.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.2 * torch.randn_like(param))
    return model


def ids() -> torch.Tensor:
    return torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(ids(), **inputs).logits
    logits.square().mean().backward()
    return {"logits": logits.detach(), **{name: param.grad.clone() for name, param in model.named_parameters()}}


@pytest.mark.parametrize("changes", [{}, {"scale_attn_by_inverse_layer_idx": True}], ids=["gpt2", "other scale"])
def test_logits_and_gradients_stay_the_same(example, changes):
    model = gpt2(example, **changes)
    before = logits_and_gradients(model)
    after = logits_and_gradients(example.patch(model), attention_mask=torch.ones(3, 20))
    for name, tensor in before.items():
        assert (after[name] - tensor).abs().max() <= 1e-12 * tensor.abs().max(), name


def test_the_fused_ops_are_what_runs(example, monkeypatch):
    calls = []
    for name in ("attention", "bias_gelu"):
        op = getattr(example.fused, name)
        monkeypatch.setattr(
            example.fused, name, lambda *args, op=op, name=name, **kw: (calls.append(name), op(*args, **kw))[1]
        )
    model = gpt2(example)
    model(ids())
    assert calls == []
    example.patch(model)(ids())
    assert calls == ["attention", "bias_gelu"] * 2


def test_generation_with_a_cache_stays_the_same(example):
    model = gpt2(example)
    flags = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = ids()[:, :5]
    before = model.generate(prompt, attention_mask=torch.ones_like(prompt), **flags)
    after = example.patch(model).generate(prompt, attention_mask=torch.ones_like(prompt), **flags)
    assert torch.equal(before, after)


def test_dropout_follows_the_random_state_and_keeps_the_mean(example):
    module, q = torch.nn.Module(), torch.zeros(1, 1, 1, 4)
    key, value = torch.zeros(1, 1, 4096, 4), torch.ones(1, 1, 4096, 4)
    out = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out.append(example.attention(module, q, key, value, None, dropout=0.5)[0])
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    # the mean of 4096 coins of 0 or 2, whose standard deviation is 1 / 64; five of them
    assert 0 < (out[0] - 1).abs().max() < 5 / 64


@pytest.mark.parametrize("mask", [torch.ones(3, 20).tril(5)[:3], torch.ones(3, 1, 20, 20)], ids=["padding", "4d"])
def test_a_mask_is_refused(example, mask):
    with pytest.raises(ValueError, match="heiretsu's attention"):
        example.patch(gpt2(example))(ids(), attention_mask=mask)


PACKED = {  # lengths of the documents in each row, which transformers itself keeps apart
    "one row": [[7, 13]] * 3,
    "each row its own": [[7, 13], [20], [1, 1, 17, 1]],
}


@pytest.mark.parametrize("rows", PACKED.values(), ids=PACKED)
def test_packed_documents_stay_apart_as_they_do_in_transformers(example, rows):
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    model = gpt2(example)
    before = logits_and_gradients(model, position_ids=positions, use_cache=False)
    after = logits_and_gradients(example.patch(model), position_ids=positions, use_cache=False)
    for name, tensor in before.items():
        assert (after[name] - tensor).abs().max() <= 1e-12 * tensor.abs().max(), name
    alone = model(ids()[:1, -rows[0][-1] :]).logits
    assert torch.allclose(after["logits"][:1, -rows[0][-1] :], alone, atol=1e-12)


def test_packed_documents_have_dropout_masks_of_their_own(example):
    q, value = torch.zeros(1, 1, 6, 4), torch.ones(1, 1, 6, 4)
    begins = torch.tensor([[True, False, False, True, False, False]])
    torch.manual_seed(0)
    pieces = [example.attention(None, q, q, value, begins, dropout=0.5)[0].view(2, 3, 4) for _ in range(8)]
    assert any(not torch.equal(*halves) for halves in pieces)


def test_attention_to_later_tokens_is_refused(example):
    model = example.patch(gpt2(example))
    model.config.is_causal = False  # transformers' way to make a decoder see both ways
    with pytest.raises(ValueError, match="causal mask within documents and no other"):
        model(ids(), use_cache=False)


@pytest.mark.parametrize("changes", [{"activation_function": "relu"}, {"add_cross_attention": True}], ids=str)
def test_another_model_is_refused(example, changes):
    with pytest.raises(ValueError, match="only a GPT-2"):
        example.patch(gpt2(example, **changes))


def test_the_script_shows_that_nothing_changed(example, capsys):
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fused kernels") and lines[3].split() == ["20", "tokens", "the", "same"]
    for line in lines[1:3]:
        before, after = line.split()[-3::2]
        assert float(before) == pytest.approx(float(after), rel=1e-5)
