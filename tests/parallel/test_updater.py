"""The loss scale beside torch.amp.GradScaler's; any optimizer; and all that ranks tell each other in one message."""

import math
import random

import torch

from heiretsu.parallel.updater import LossScaler


def test_the_scale_moves_as_torchs_gradscaler_moves_it():
    window, chance = 4, random.Random(3)
    ours = LossScaler(2.0**16, window)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=window)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    seen = set()
    for step in range(300):
        overflow = chance.random() < 0.12
        theirs.scale(weight)  # where it makes its tensors
        weight.grad = torch.tensor(math.inf if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflow)
        assert ours.scale == theirs.get_scale(), f"step {step}"
        assert ours.good_steps == theirs.state_dict()["_growth_tracker"], f"step {step}"
        seen.add((overflow, ours.good_steps))
    assert {(False, n) for n in range(window)} | {(True, 0)} == seen


def test_the_scale_stops_halving_at_one_and_stays_where_it_does_not_grow():
    small, fixed = LossScaler(2.0, 4), LossScaler()
    for overflow in (True, True, False):
        small.update(overflow)
        fixed.update(overflow)
    assert (small.scale, small.good_steps) == (1.0, 1) and fixed == LossScaler()
