"""TRITON_INTERPRET=1 trains in bfloat16 as plain does: whoever imports the kernels gets a mended interpreter."""

import subprocess
import sys
from dataclasses import replace

import pytest

from heiretsu.kernels import fused, plain
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from tests.training import MIXTURE, dataset, run_config


@pytest.fixture
def config():
    model = replace(MIXTURE, n_layer=2, n_head=2, num_experts=2, dropout=0.1)
    return replace(run_config(model, global_batch=2, microbatches=1), dtype="float32", amp="bf16")


def test_two_steps_in_bfloat16_are_those_of_plain(config):
    mesh, data = abstract_mesh(), dataset(config.model.vocab_size, config.model.block_size)
    reports = {}
    for ops in (plain, fused):
        engine = build_engine(config, mesh, ops)
        reports[ops] = [engine.step(read_batches(config, mesh, data, step)) for step in range(2)]
    for ours, theirs in zip(reports[fused], reports[plain], strict=True):
        assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=2e-3)  # bfloat16 has 8 bits: 4e-3
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-2)


@pytest.mark.parametrize("importing", ["heiretsu.kernels.fused", "heiretsu.kernels.gpu.bias_gelu", "heiretsu.kernels"])
def test_importing_a_kernel_mends_the_interpreter(importing):
    """In a process of its own, where no test has mended anything."""
    program = f"""
import torch, warnings
warnings.simplefilter("error")
import {importing} as ops
x = torch.tensor([-1e9, 1.0]).bfloat16()
print(ops.bias_gelu(x, torch.ones(2).bfloat16()).tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[-0.0, 1.953125]\n", done.stderr
