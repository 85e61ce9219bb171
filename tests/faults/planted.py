"""train.py with a fault planted: python tests/faults/planted.py FAULT FLAGS OF TRAIN.PY...

FAULT is a word of FAULTS, the rank it is for ("all": each), the step (counted from 1) in which it happens, and what
else it needs: "raise:1:3". It happens in the forward of that step, so that the others are in the middle of theirs, and
only in the first of the runs that torchrun starts.
"""

from __future__ import annotations

import math
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from heiretsu.data.batches import TokenDataset
from heiretsu.parallel import pipeline
from heiretsu.parallel.data import GradientAverager
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.profiling import region

TRAIN = Path(__file__).parents[2] / "train.py"


def in_forward(mesh, step, happen):
    """happen() in the first forward of the step."""
    real, done = pipeline._InFlight.forward, []

    def forward(flight, stage, batch):
        if batch.context.step + 1 == step and not done:
            done.append(happen())
        return real(flight, stage, batch)

    pipeline._InFlight.forward = forward


def kill(mesh, step):
    in_forward(mesh, step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def freeze(mesh, step):
    in_forward(mesh, step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def spin(mesh, step):
    def for_ever():
        while True:
            time.sleep(0.01)

    in_forward(mesh, step, for_ever)


def raise_(mesh, step):
    def happen():
        raise RuntimeError("planted: a row of bad data")

    in_forward(mesh, step, happen)


def wait_in_destroy(mesh, step):
    """Raises, and would then wait in the destruction of the process groups, as NCCL may."""
    dist.destroy_process_group = lambda *a: time.sleep(3600)
    raise_(mesh, step)


def lone_receive(mesh, step):
    """One rank waits for a message that nobody sends."""

    def happen():
        with region("receive that nobody sends", waits=True):
            dist.recv(torch.ones(1), 1 - mesh.rank, tag=7)

    in_forward(mesh, step, happen)


def slow(mesh, step):
    real = pipeline._InFlight.forward

    def forward(flight, stage, batch):
        time.sleep(0.5)  # far from what other processes on the machine may cost a step
        return real(flight, stage, batch)

    pipeline._InFlight.forward = forward


def gradient(mesh, step, value, last="0"):
    """One element of the averaged gradient, on this rank alone, in the steps from `step` to `last`."""
    real, steps = GradientAverager.finish, []

    def finish(averager):
        real(averager)
        steps.append(1)
        if step <= len(steps) <= max(step, int(last)):
            list(averager.params.values())[-1].grad.flatten()[0] = float(value)

    GradientAverager.finish = finish


def nan_loss(mesh, step):
    """The weights that this rank reads in one forward are NaN: its loss and all its gradients are."""
    real = pipeline._InFlight.forward

    def forward(flight, stage, batch):
        if batch.context.step + 1 != step:
            return real(flight, stage, batch)
        bias = next(iter(stage.blocks.values())).ln_1.bias
        kept = bias.detach().clone()
        with torch.no_grad():
            bias.fill_(math.nan)
        real(flight, stage, batch)
        with torch.no_grad():
            bias.copy_(kept)

    pipeline._InFlight.forward = forward


def replica(mesh, step, what="parameter", name="ln_f.weight"):
    """One bit of this rank's copy flips after the step."""
    real = Engine.step

    def engine_step(engine, batches, *rest):
        report = real(engine, batches, *rest)
        if batches[0].context.step + 1 == step:
            param = engine.params[name]
            piece = param.data if what == "parameter" else engine.updater.optimizer.state[param][what]
            piece.view(torch.int32).flatten()[-1] ^= 1
        return report

    Engine.step = engine_step


def other_flags(mesh, step, *flags):
    sys.argv += flags


def other_data(mesh, step):
    TokenDataset.digest = lambda dataset: "0" * 16


def other_code(mesh, step):
    from heiretsu.run import prepare

    prepare.code_digest = lambda: "0" * 16


def late(mesh, step, seconds):
    time.sleep(float(seconds))


def none(mesh, step):
    """The run as it is."""


FAULTS = {
    "none": none,
    "kill": kill,
    "freeze": freeze,
    "spin": spin,
    "raise": raise_,
    "wait-in-destroy": wait_in_destroy,
    "lone-receive": lone_receive,
    "slow": slow,
    "gradient": gradient,
    "nan-loss": nan_loss,
    "replica": replica,
    "other-flags": other_flags,
    "other-data": other_data,
    "other-code": other_code,
    "late": late,
}
BEFORE_A_MESH = ("other-flags", "other-data", "other-code", "late")


def main() -> None:
    name, rank, step, *rest = sys.argv.pop(1).split(":")
    sys.argv[0] = str(TRAIN)
    if rank in ("all", os.environ.get("RANK", "0")) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        if name in BEFORE_A_MESH:
            FAULTS[name](None, int(step), *rest)
        else:
            real = Engine.__init__

            def init(engine, stages, mesh: Mesh, *args, **kwargs):
                real(engine, stages, mesh, *args, **kwargs)
                FAULTS[name](mesh, int(step), *rest)

            Engine.__init__ = init  # type: ignore[method-assign]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
