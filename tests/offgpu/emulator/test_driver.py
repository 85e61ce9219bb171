"""The emulated driver under Triton's launchers, PyTorch's custom ops and autograd."""

import threading

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver as triton_driver

from heiretsu.kernels.gpu import launch
from heiretsu.offgpu.emulator import EmulatedDriver, PTXError, installed, run


@triton.jit
def double(X, Y, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(Y + offsets, tl.load(X + offsets) * 2)
    else:
        tl.store(Y + offsets, tl.load(X + offsets, offsets < n) * 2, offsets < n)


@torch.library.custom_op("heiretsu_emulator_test::double", mutates_args=())
def double_op(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    double[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), BLOCK=64, EVEN=False)
    return y


double_op.register_autograd(lambda ctx, grad: double_op(grad))


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_a_custom_op_runs_forward_and_backward(target, schedule):
    x = torch.randn(100, requires_grad=True)
    with installed(target, schedule=schedule) as gpu:
        y = double_op(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones(100))
    assert torch.equal(y, 2 * x) and torch.equal(grad, torch.full((100,), 2.0))
    assert len(gpu.reports) == 2 and not gpu.findings and gpu.reports[0].stats["kernel"] == "double"


def test_launches_of_another_thread_are_emulated_too():
    x, out = torch.randn(100), []
    with installed() as gpu:
        thread = threading.Thread(target=lambda: out.append(double_op(x)))
        thread.start()
        thread.join()
    assert torch.equal(out[0], 2 * x) and len(gpu.reports) == 1


def test_our_launchers_take_cpu_tensors_under_the_emulated_driver_only():
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="was given cpu tensors"):
        launch.require_device("bias_gelu", x)
    for target, name in ((80, "ampere"), (90, "hopper")):
        with installed(target):
            launch.require_device("bias_gelu", x)
            assert launch.architecture(x.device) == name


def test_the_driver_before_is_put_back():
    before = triton_driver._active
    with pytest.raises(RuntimeError, match="out of here"), installed():
        assert isinstance(triton_driver.active, EmulatedDriver)
        raise RuntimeError("out of here")
    assert triton_driver._active is before


def test_a_finding_that_stops_a_launch_raises():
    x = torch.randn(100)
    with installed() as gpu, pytest.raises(PTXError, match="outside every tensor"):
        double[(2,)](x, torch.zeros(100), 128, BLOCK=64, EVEN=False)
    assert [finding.kind for finding in gpu.findings] == ["oob"]


def test_an_empty_grid_launches_nothing():
    with installed() as gpu:
        double[(0,)](torch.zeros(1), torch.zeros(1), 0, BLOCK=64, EVEN=False)
    assert not gpu.findings


hooks = []
tuned = triton.heuristics({"EVEN": lambda arguments: arguments["n"] % arguments["BLOCK"] == 0})(double)
tuned = triton.autotune(
    configs=[
        triton.Config({"BLOCK": 64}, num_warps=2, pre_hook=lambda arguments: hooks.append(arguments["BLOCK"])),
        triton.Config({"BLOCK": 128}, num_warps=4, pre_hook=lambda arguments: hooks.append(arguments["BLOCK"])),
    ],
    key=["n"],
)(tuned)


@pytest.mark.parametrize("n", [200, 256])
def test_autotuning_runs_every_config(n):
    x, y = torch.randn(n), torch.zeros(n)
    hooks.clear()
    with installed(90) as gpu:
        tuned[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, y, n)
    assert set(hooks) == {64, 128} and len(gpu.reports) >= 3 and not gpu.findings
    assert torch.equal(y, 2 * x)


@triton.jit
def weighted_sum(Pair, scale, add_one, Third, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(Pair[0] + offsets) * scale
    if add_one:
        x += 1
    if Third is not None:
        x += tl.load(Third + offsets)
    tl.store(Pair[1] + offsets, x)


def test_tuples_floats_flags_and_none_as_arguments():
    x, y = torch.randn(64), torch.zeros(64)
    assert not run(weighted_sum, (1,), [(x, y), 2.5, True, None], dict(BLOCK=64))
    torch.testing.assert_close(y, x * 2.5 + 1)
    assert not run(weighted_sum, (1,), [(x, y), 1, False, x], dict(BLOCK=64))
    assert torch.equal(y, 2 * x)


def test_views_share_one_storage_and_keep_their_alignment():
    storage = torch.zeros(300)
    x, y = storage[1:101], storage[150:250]
    x.copy_(torch.randn(100))
    with installed() as gpu:
        double[(2,)](x, y, 100, BLOCK=64, EVEN=False)
    assert torch.equal(y, 2 * x) and not gpu.findings and not storage[101:150].any()
