"""A float32 run makes no float64 tensor, which not every device has (Apple's mps), and its numbers are right all the
same."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heiretsu.kernels import plain
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.optimizer import two_norm
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from heiretsu.run.sampling import generate
from tests.training import DENSE, MIXTURE, dataset, run_config


class NoFloat64(TorchDispatchMode):
    """The CPU as a device without float64: what makes such a tensor raises, as on mps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            raise TypeError(f"{func}: this device has no float64")
        return out


@pytest.mark.parametrize("model", [DENSE, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_float32_run_needs_no_float64(model, amp):
    config = replace(run_config(replace(model, dropout=0.1), microbatches=2), dtype="float32", amp=amp)
    mesh, data = abstract_mesh(), dataset(model.vocab_size, model.block_size)
    with NoFloat64():
        engine = build_engine(config, mesh, plain)
        batches = read_batches(config, mesh, data, 0)
        first = engine.step(batches)
        again = engine.evaluate(batches)
        text = list(generate(engine.stages[0], [1], 4, temperature=0.8, top_k=5))
    assert again < first.loss and first.grad_norm > 0 and len(text) == 4


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 3_000_001])
def test_the_norm_of_many_float32_is_exact_to_rounding(size):
    x = torch.full((size,), 0.1)  # equal numbers: the sum's rounding errors do not cancel
    exact = torch.linalg.vector_norm(x, dtype=torch.float64).item()
    assert two_norm(x).item() == pytest.approx(exact, rel=2e-6)
    assert torch.equal(two_norm(x.view(-1, 1)), two_norm(x))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_norm_of_what_is_not_finite_is_not_finite(bad):
    x = torch.ones(5000)
    x[4321] = bad
    assert not two_norm(x).isfinite()
