"""Run a Hugging Face GPT-2 on heiretsu's fused attention and fused bias + GELU, without touching its weights.

    python examples/patch_transformers.py

builds a GPT-2 with random weights, and compares loss, gradients and generated tokens before and after `patch`. In a
program of your own:

    model = patch(GPT2LMHeadModel.from_pretrained("gpt2"))

The ops run as Triton kernels on a GPU and as fast CPU forms elsewhere. Batches with padding are refused, because the
attention has no mask but the causal one: pack sequences, or leave those calls to the unpatched model.
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
    """transformers' attention interface. query: (B, H, T, D); key, value: (B, H, S, D). Returns (B, T, H, D), None."""
    if attention_mask is not None:
        raise ValueError("heiretsu's attention has the causal mask and no other")
    seed = int(torch.randint(2**62, ())) if dropout else 0  # the caller's random state decides the mask
    out = fused.attention(query, key, value, causal=True, scale=scaling, dropout_p=dropout, seed=seed)
    return out.transpose(1, 2), None


def no_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, **kwargs
):
    """transformers' mask interface: nothing to build, if the causal mask is all there is."""
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("heiretsu's attention takes no padding: pack the sequences, or batch those of equal length")
    if int(q_offset) + q_length != kv_length:
        raise ValueError("heiretsu's attention needs keys and values of their true length: use a dynamic cache")


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
    AttentionMaskInterface.register("heiretsu", no_mask)
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
