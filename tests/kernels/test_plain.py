"""The specification against formulas of its papers, written out in float64 with loops and no op of torch.nn."""

import math

import pytest
import torch

from heiretsu.kernels import fused, plain
from tests.kernels.samples import SAMPLES

exactly = dict(rtol=1e-12, atol=1e-12)


def gelu(u):
    return 0.5 * u * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (u + 0.044715 * u**3)))


def detached(sample, n=5):
    values = SAMPLES[sample][1](n, torch.float64)
    return {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def test_expert_mlp_is_a_sum_over_choices():
    values = detached("expert_mlp")
    values["experts"][1, 0] = -1
    values["experts"][2, 1] = 3
    x, experts, gates, w1, b1, w2, b2 = (values[name] for name in ("x", "experts", "gates", "w1", "b1", "w2", "b2"))
    expected = torch.zeros_like(x)
    for n in range(5):
        for k in range(2):
            e = int(experts[n, k])
            if 0 <= e < 3:
                hidden = torch.tensor([gelu(u) for u in (x[n] @ w1[e] + b1[e]).tolist()], dtype=torch.float64)
                expected[n] += gates[n, k] * (hidden @ w2[e] + b2[e])
    torch.testing.assert_close(plain.expert_mlp(**values), expected, **exactly)


@pytest.mark.parametrize("x_dtype, gates_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64),
                                                  (torch.float32, torch.bfloat16)])  # fmt: skip
def test_gates_may_be_of_another_dtype(x_dtype, gates_dtype):
    values = detached("expert_mlp", n=9)
    narrow = values | {"x": values["x"].to(x_dtype), "gates": values["gates"].to(gates_dtype)}
    wide = {name: v.double() if v.is_floating_point() else v for name, v in narrow.items()}
    for form in (plain.expert_mlp, fused.expert_mlp):
        out = form(**narrow)
        assert out.dtype == x_dtype
        tolerance = 0.05 if x_dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(out.double(), plain.expert_mlp(**wide), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_a_softmax_of_scaled_products(causal):
    values = detached("attention_lse") | {"causal": causal}
    q, k, v = values["q"], values["k"], values["v"]
    out, lse = plain.attention_lse(**values)
    for b, h, i in ((0, 0, 0), (1, 3, 4), (1, 2, 1)):
        seen = i + 5 + 1 if causal else 10
        scores = [float(q[b, h, i] @ k[b, h // 2, j]) / math.sqrt(8) for j in range(seen)]
        total = math.fsum(map(math.exp, scores))
        expected = sum(math.exp(s) / total * v[b, h // 2, j] for j, s in enumerate(scores))
        torch.testing.assert_close(out[b, h, i], expected, **exactly)
        assert math.isclose(lse[b, h, i], math.log(total), rel_tol=1e-12)


def test_linear_cross_entropy_is_the_logarithm_of_a_sum():
    values = detached("linear_cross_entropy") | {"vocab_start": 2}
    logits = (values["x"] @ values["weight"].T).tolist()
    lse, target_logit = plain.linear_cross_entropy(**values)
    for n, target in enumerate((0, 7, 14, 21, 28)):
        assert math.isclose(lse[n], math.log(math.fsum(map(math.exp, logits[n]))), rel_tol=1e-12)
        assert math.isclose(target_logit[n], 0.0 if target < 2 else logits[n][target - 2], rel_tol=1e-12)


def test_layer_norm_route_gelu_and_dropout():
    values = detached("layer_norm, residual")
    y, total = plain.layer_norm(**values, eps=0.01)
    row = (values["x"] + values["residual"])[1, 2]
    mean = row.mean()
    expected = (row - mean) / torch.sqrt(((row - mean) ** 2).mean() + 0.01) * values["weight"] + values["bias"]
    torch.testing.assert_close(y[1, 2], expected, **exactly)
    assert torch.equal(total[1, 2], row)

    logits = detached("route")["logits"]
    gates, experts = plain.route(logits, 2)
    for n, row in enumerate(logits.tolist()):
        best = sorted(range(6), key=lambda e: -row[e])[:2]
        assert experts[n].tolist() == best
        exps = [math.exp(row[e]) for e in best]
        torch.testing.assert_close(gates[n], torch.tensor(exps, dtype=torch.float64) / sum(exps), **exactly)

    values = detached("bias_gelu")
    expected = [gelu(u) for u in (values["x"] + values["bias"]).flatten().tolist()]
    torch.testing.assert_close(
        plain.bias_gelu(**values).flatten(), torch.tensor(expected, dtype=torch.float64), **exactly
    )

    values = detached("dropout")
    out = plain.dropout(**values)
    kept = out != 0
    torch.testing.assert_close(out[kept], values["x"][kept] / 0.7, **exactly)
    assert 0.55 < kept.double().mean() < 0.85 and plain.dropout(values["x"], 0.0, 3) is values["x"]
