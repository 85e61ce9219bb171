"""Run a Hugging Face GPT-2 on heiretsu's fused attention and fused bias + GELU, without touching its weights.

    python examples/patch_transformers.py

builds a GPT-2 with random weights, and compares loss, gradients and generated tokens before and after `patch`. In a
program of your own:

    model = patch(GPT2LMHeadModel.from_pretrained("gpt2"))

The ops run as Triton kernels on a GPU and as fast CPU forms elsewhere. The attention is causal, and documents packed
into one row stay apart, as they do in transformers: where position_ids begin anew (and there is neither a mask nor a
cache: pass use_cache=False). Any other mask is refused, padding too: pack the sequences, or leave those calls to the
unpatched model.
"""

import sys
from types import MethodType

try:
    import torch
    import torch.nn.functional as F
    from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel

    from heiretsu.kernels import fused
except ModuleNotFoundError as error:
    sys.exit(f"{error}: this example needs `pip install -e . transformers` (heiretsu itself is this checkout)")


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention interface. query: (B, H, T, D); key, value: (B, H, S, D). Returns (B, T, H, D), None.

    attention_mask: None, or what `documents` returned.
    """
    seed = int(torch.randint(2**62, (), device="cpu")) if dropout else 0  # the caller's random state decides the mask
    options = {"causal": True, "scale": scaling, "dropout_p": dropout, "seed": seed}
    if attention_mask is None:
        return fused.attention(query, key, value, **options).transpose(1, 2), None
    if attention_mask.dim() != 2:
        raise ValueError("heiretsu's attention has the causal mask and no other")
    rows, number = [], 0  # each document alone, and for dropout as a sample of its own
    for row, begins in enumerate(attention_mask):
        cuts = [*begins.nonzero()[:, 0].tolist(), len(begins)]
        parts = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            q, k, v = (tensor[row : row + 1, :, start:end] for tensor in (query, key, value))
            parts.append(fused.attention(q, k, v, offsets=(number, 0), **options))
            number += 1
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows).transpose(1, 2), None


def documents(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, device=None,
    **kwargs,
):  # fmt: skip
    """transformers' mask interface: None where the causal mask is all there is; else, (B, T) bool, where in each row a
    document begins. ValueError for a mask that is not causal within documents."""
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("heiretsu's attention takes no padding: pack the sequences, or batch those of equal length")
    if int(q_offset) + q_length != kv_length:
        raise ValueError("heiretsu's attention needs keys and values of their true length: use a dynamic cache")
    if q_length != kv_length:  # later tokens, beside a cache: transformers packs none of those
        return None
    row, at = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length, device=device)[None, :]

    def sees(query, key):  # mask_function is written for single indices, and made of comparisons and look-ups
        return torch.as_tensor(mask_function(row, 0, query, key), device=device).expand(batch_size, query.shape[1])

    begins = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    begins[:, 1:] = ~sees(at[:, 1:], at[:, :-1])
    first = torch.where(begins, at, 0).cummax(1).values  # of the document
    hidden = sees(at, (first - 1).clamp(min=0)) & (first > 0)
    if not sees(at, first).all() or hidden.any() or sees(at[:, :-1], at[:, 1:]).any():
        raise ValueError("heiretsu's attention has the causal mask within documents and no other")
    return begins if begins[:, 1:].any() else None


def mlp(self, hidden_states):
    """GPT2MLP.forward with bias and GELU in one pass. transformers keeps linear weights as (in, out)."""
    hidden = fused.bias_gelu(hidden_states @ self.c_fc.weight, self.c_fc.bias)
    return self.dropout(self.c_proj(hidden))


def patch(model):
    """Make a transformers GPT-2 (any of its heads) use the fused ops. Returns the same model."""
    config = model.config
    if config.model_type != "gpt2" or config.activation_function != "gelu_new" or config.add_cross_attention:
        raise ValueError("only a GPT-2 with its own activation, gelu_new, and without cross-attention can be patched")
    AttentionInterface.register("heiretsu", attention)
    AttentionMaskInterface.register("heiretsu", documents)
    model.set_attn_implementation("heiretsu")
    for block in model.base_model.h:
        block.mlp.forward = MethodType(mlp, block.mlp)
    return model


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = GPT2Config(vocab_size=256, n_layer=4, n_embd=128, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval().to(device)
    ids = torch.randint(1, 256, (2, 200), device=device)
    before = report(model, ids)
    after = report(patch(model), ids)
    print(fused.describe(torch.device(device)))
    print(f"loss           {before[0]:.6f} -> {after[0]:.6f}")
    print(f"gradient norm  {before[1]:.6f} -> {after[1]:.6f}")
    print(f"20 tokens      {'the same' if before[2] == after[2] else 'not the same'}")


def report(model, ids: torch.Tensor) -> tuple[float, float, list[int]]:
    """Loss, gradient norm, and 20 tokens that the model finds likeliest."""
    model.zero_grad()
    loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([param.grad for param in model.parameters()])
    prompt = ids[:1, :8]
    new = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    return loss.item(), norm.item(), new[0, 8:].tolist()


if __name__ == "__main__":
    main()
