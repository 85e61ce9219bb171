"""A float32 run makes no float64 tensor on its device, which may have none (Apple's mps), and its numbers are right all
the same."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heiretsu.kernels import plain
from heiretsu.parallel import metrics, updater
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.updater import two_norm
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from heiretsu.run.sampling import generate
from tests.training import DENSE, MIXTURE, dataset, run_config


def is_wide(tree) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(tree))


class NoFloat64(TorchDispatchMode):
    """The CPU as a device without float64: what makes such a tensor raises, as on mps, unless it is made of one that
    `widened` took to the host."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.to_host = False
        for module in (metrics, updater):
            monkeypatch.setattr(module, "widened", self.widened)

    def widened(self, x):
        self.to_host = True
        try:
            return x.double()
        finally:
            self.to_host = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if is_wide(out) and not (self.to_host or is_wide((args, kwargs))):
            raise TypeError(f"{func}: this device has no float64")
        return out


def test_what_is_widened_leaves_a_device_without_float64_first():
    """On tensors without memory, which say that they are on such a device."""

    class OnDevice(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert not (is_wide(out) and out.device.type == "mps"), func
            return out

    for device, host in (("mps", "cpu"), ("cuda", "cuda"), ("cpu", "cpu")):
        with FakeTensorMode(), OnDevice():
            wide = metrics.widened(torch.empty(3, device=device))
            assert wide.dtype == torch.float64 and wide.device.type == host


@pytest.mark.parametrize("model", [DENSE, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_float32_run_needs_no_float64(monkeypatch, model, amp):
    config = replace(run_config(replace(model, dropout=0.1), microbatches=2), dtype="float32", amp=amp)
    mesh, data = abstract_mesh(), dataset(model.vocab_size, model.block_size)
    with NoFloat64(monkeypatch):
        engine = build_engine(config, mesh, plain)
        batches = read_batches(config, mesh, data, 0)
        first = engine.step(batches)
        again = engine.evaluate(batches)
        text = list(generate(engine.stages[0], [1], 4, temperature=0.8, top_k=5))
    assert again["loss"] < first.metrics["loss"] and first.grad_norm > 0 and len(text) == 4


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
