"""The executor by what it sends, awaits and marks, of one rank alone: the messages of the others are made up."""

from unittest.mock import patch

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.parallel import pipeline
from heiretsu.parallel.activity import ACTIVITY
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.pipeline import Microbatch, run_schedule
from heiretsu.parallel.schedules import SCHEDULES, lower
from heiretsu.parallel.schedules.actions import Kind
from heiretsu.run.building import build_engine
from tests.training import DENSE, run_config


class Work:
    def __init__(self, log, what, done):
        self.log, self.what, self.done = log, what, done

    def wait(self):
        self.log.append(f"{ACTIVITY.where()}: waited for {self.what}")

    def is_completed(self):
        return self.done


def messages_of(rank, done=False):
    """What a rank of two, at two microbatches, sends and waits for, each with the regions that it was in."""
    mesh = abstract_mesh(pp=2, rank=rank)
    engine = build_engine(run_config(DENSE, global_batch=2, microbatches=2, pp=2), mesh, plain)
    ids = torch.arange(8).view(1, 8)
    log: list[str] = []

    def start(verb, tensor, peer, group):
        assert tensor.shape == (1, 8, 16) and tensor.dtype == torch.float64 and tensor.is_contiguous() and group is None
        assert not tensor.requires_grad
        what = f"{verb} {peer}"
        log.append(f"{ACTIVITY.where()}: {what}")
        if verb == "from":
            tensor.fill_(0.5)
        return Work(log, what, done)

    with (
        patch.object(pipeline.dist, "irecv", lambda tensor, peer, group: start("from", tensor, peer, group)),
        patch.object(pipeline.dist, "isend", lambda tensor, peer, group: start("to", tensor, peer, group)),
    ):
        actions = lower(SCHEDULES["gpipe"](2, 2))[rank]
        totals = run_schedule(actions, engine.stages, [Microbatch(ids, ids)] * 2, mesh, 4.0)
    assert len(totals.given["loss"]) == 2 * rank
    return log


def test_the_last_stage_waits_where_it_computes_and_for_its_sends_at_the_end():
    assert messages_of(rank=1) == [
        "receive of activations of microbatch 0 in stage 1: from 0",
        "receive of activations of microbatch 0 in stage 1 / forward of microbatch 0 in stage 1: waited for from 0",
        "receive of activations of microbatch 1 in stage 1: from 0",
        "receive of activations of microbatch 1 in stage 1 / forward of microbatch 1 in stage 1: waited for from 0",
        "send of gradients of microbatch 0 in stage 1: to 0",
        "send of gradients of microbatch 1 in stage 1: to 0",
        "wait for sends: waited for to 0",
        "wait for sends: waited for to 0",
    ]


@pytest.mark.parametrize("done", [False, True])
def test_the_first_stage_keeps_what_it_sends_until_it_has_left(done):
    assert messages_of(rank=0, done=done) == [
        "send of activations of microbatch 0 in stage 0: to 1",
        "send of activations of microbatch 1 in stage 0: to 1",
        "receive of gradients of microbatch 0 in stage 0: from 1",
        "receive of gradients of microbatch 0 in stage 0 / backward of microbatch 0 in stage 0: waited for from 1",
        "receive of gradients of microbatch 1 in stage 0: from 1",
        "receive of gradients of microbatch 1 in stage 0 / backward of microbatch 1 in stage 0: waited for from 1",
        *["wait for sends: waited for to 1"] * (1 if done else 2),
    ]


def test_what_is_sent_lies_in_one_piece_and_lives_until_it_has_left():
    """A stage may hand on a view, and what lies in pieces neither gloo nor NCCL takes."""
    sent, mesh, hidden = [], abstract_mesh(pp=2, rank=0), torch.arange(6.0).view(2, 3).t()
    sends = pipeline._Sends()
    with patch.object(pipeline.dist, "isend", lambda tensor, peer, group: sent.append(tensor) or Work([], "it", False)):
        sends.start(hidden, mesh.pp, Kind.SEND_FORWARD)
    assert sent[0].is_contiguous() and sent[0].equal(hidden)
    assert sends.pending[0][1] is sent[0]


def test_regions_have_short_names_in_traces_and_those_that_wait_are_marked():
    marked, real = [], pipeline.region

    def region(name, waits=False, words=""):
        marked.append((name, waits, words))
        return real(name, waits, words)

    with patch.object(pipeline, "region", region):
        messages_of(rank=0)
    (send,) = (mark for mark in marked if mark[0] == "send F0.0")
    assert send == ("send F0.0", False, "send of activations of microbatch 0 in stage 0")
    assert [mark for mark in marked if mark[1]] == [
        ("receive of gradients of microbatch 0 in stage 0", True, ""),
        ("receive of gradients of microbatch 1 in stage 0", True, ""),
        ("wait for sends", True, ""),
        ("wait for sends", True, ""),
    ]
    assert [mark[0] for mark in marked if not mark[1]] == [
        *("F0.0", "send F0.0", "F1.0", "send F1.0"),
        *("recv B0.0", "B0.0", "recv B1.0", "B1.0"),
    ]


def test_what_a_microbatch_held_is_let_go_with_its_backward():
    """Its graph, and the gradient that came in: else memory grows by every microbatch of a step."""
    flights, real = [], pipeline._InFlight

    def flight():
        flights.append(real())
        return flights[-1]

    with patch.object(pipeline, "_InFlight", flight):
        messages_of(rank=0)
    kept = [flight for flight in flights if flight.out is not None or flight.grad_out is not None]
    assert len(flights) >= 2 and kept == []


def test_a_schedule_needs_no_gradients_where_torch_takes_none():
    engine = build_engine(run_config(DENSE, global_batch=1, microbatches=1, pp=2), abstract_mesh(pp=2, rank=1), plain)
    ids, hidden = torch.arange(8).view(1, 8), torch.zeros(1, 8, 16, dtype=torch.float64)
    for enabled in (True, False):
        flight = pipeline._InFlight(hidden_in=hidden.clone())
        with torch.set_grad_enabled(enabled):
            flight.forward(engine.stages[0], Microbatch(ids, ids))
        assert flight.hidden_in.requires_grad == enabled
