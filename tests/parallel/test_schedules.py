"""Schedules are right before any process runs them: complete, in order, free of deadlock, as fast as the papers say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heiretsu.parallel import schedules
from heiretsu.parallel.schedules import SCHEDULES, draw, forward_only, lower, simulate, validate
from heiretsu.parallel.schedules.actions import Action, Kind, peer
from heiretsu.parallel.schedules.gpipe import gpipe
from heiretsu.parallel.schedules.interleaved import interleaved_1f1b
from heiretsu.parallel.schedules.one_f_one_b import one_f_one_b
from heiretsu.parallel.schedules.playing import play
from heiretsu.parallel.schedules.zero_bubble import zero_bubble

SIZES = [(p, m) for p in range(1, 7) for m in (1, 2, 3, 5, 8, 12)]
RANKS, MICROBATCHES = st.integers(1, 6), st.integers(1, 12)
ONE_STAGE = [gpipe, one_f_one_b, zero_bubble]


def timeline(schedule, forward_cost=1.0, backward_cost=2.0, comm_cost=0.0):
    return simulate(lower(schedule), forward_cost, backward_cost, comm_cost)


@given(name=st.sampled_from(sorted(SCHEDULES)), p=RANKS, m=MICROBATCHES, stages=st.integers(1, 4))
def test_every_schedule_is_valid_for_every_size(name, p, m, stages):
    validate(lower(SCHEDULES[name](p, m, stages if SCHEDULES[name].several_stages else 1)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_keeps_all_if_every_rank_holds_every_microbatch(name):
    held = timeline(SCHEDULES[name](4, 24)).peak_activations
    assert SCHEDULES[name].keeps_all == (min(held) == 24)


@given(p=RANKS, m=MICROBATCHES, stages=st.integers(1, 4))
def test_evaluation_runs_every_forward(p, m, stages):
    whole = lower(SCHEDULES["interleaved"](p, m, stages))  # which is validated above
    kinds = (Kind.RECV_FORWARD, Kind.FORWARD, Kind.SEND_FORWARD)
    forwards = [[action for action in actions if action.kind in kinds] for actions in whole]
    assert lower(forward_only(p, m, stages)) == forwards
    assert len(list(play(forwards))) == sum(map(len, forwards))


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
@pytest.mark.parametrize("forward_cost, backward_cost", [(1.0, 2.0), (3.0, 4.0)])
def test_bubble_is_the_closed_form(schedule, forward_cost, backward_cost):
    """Huang et al. 2018, section 2.3: (p - 1) / (m + p - 1) of the time, whatever the costs."""
    for p, m in SIZES:
        bubble = timeline(schedule(p, m), forward_cost, backward_cost).bubble
        assert bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12), (p, m)


def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank():
    """Narayanan et al. 2021, section 2.2.2: the bubble is (p - 1) / (stages * m) of the work, for m a multiple of p."""
    for p in range(2, 7):
        for m in (p, 2 * p, 3 * p):
            for stages in (2, 3):
                share = (p - 1) / (stages * m)
                bubble = timeline(interleaved_1f1b(p, m, stages)).bubble
                assert bubble == pytest.approx(share / (1 + share), abs=1e-12), (p, m, stages)
                assert bubble < timeline(one_f_one_b(p, m)).bubble


def test_zero_bubble_leaves_only_what_the_weight_gradients_cannot_fill():
    """Qi et al. 2023, table 2: a bubble of (p - 1)(F + B - W) for ZB-H1, against (p - 1)(F + B + W), for m >= p."""
    for p in range(1, 7):
        for m in range(p, 13):
            run = timeline(zero_bubble(p, m))  # F = B = W = 1
            assert run.makespan - 3 * m == p - 1, (p, m)
            assert timeline(one_f_one_b(p, m)).makespan - 3 * m == 3 * (p - 1)


@given(p=RANKS, m=MICROBATCHES)
def test_1f1b_warms_up_with_as_many_forwards_as_ranks_follow(p, m):
    for rank, actions in enumerate(one_f_one_b(p, m)):
        before_first_backward = next(i for i, action in enumerate(actions) if action.kind is Kind.BACKWARD)
        warmup = min(p - rank - 1, m)
        assert before_first_backward == min(warmup + 1, m)


@given(p=RANKS, m=MICROBATCHES)
def test_activations_held(p, m):
    """GPipe holds all microbatches, 1F1B no more than ranks are left, ZB-H1 no more than rank 0 of 1F1B."""
    assert timeline(gpipe(p, m)).peak_activations == [m] * p
    assert timeline(one_f_one_b(p, m)).peak_activations == [min(p - rank, m) for rank in range(p)]
    assert max(timeline(zero_bubble(p, m)).peak_activations) == min(p, m)


def test_messages_cost_time_only_to_those_who_wait():
    free, charged = timeline(gpipe(3, 4)), timeline(gpipe(3, 4), comm_cost=0.5)
    assert charged.makespan == free.makespan + 4 * 0.5  # two hops down, two hops up
    assert timeline(gpipe(1, 4), comm_cost=0.5).makespan == 12


def test_lowering_two_ranks_by_hand():
    forwards, backwards = ([Action(kind, 0, stage) for stage in (0, 1)] for kind in (Kind.FORWARD, Kind.BACKWARD))
    assert lower(gpipe(2, 1)) == [
        [forwards[0], Action(Kind.SEND_FORWARD, 0, 0), Action(Kind.RECV_BACKWARD, 0, 0), backwards[0]],
        [Action(Kind.RECV_FORWARD, 0, 1), forwards[1], backwards[1], Action(Kind.SEND_BACKWARD, 0, 1)],
    ]


def test_the_gradient_leaves_before_the_weights_wait_for_theirs():
    last = lower(zero_bubble(2, 1))[1]
    kinds = [action.kind for action in last]
    assert kinds == [Kind.RECV_FORWARD, Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.SEND_BACKWARD, Kind.BACKWARD_WEIGHT]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_one_rank_neither_sends_nor_receives(name):
    schedule = SCHEDULES[name](1, 4, 1)
    assert lower(schedule) == schedule


def test_the_ring_closes_between_the_stages_of_a_rank():
    assert peer(Kind.SEND_FORWARD, 3, 4) == 0 and peer(Kind.RECV_FORWARD, 0, 4) == 3
    assert peer(Kind.SEND_BACKWARD, 0, 4) == 3 and peer(Kind.RECV_BACKWARD, 3, 4) == 0
    first_rank = lower(interleaved_1f1b(2, 2, 2))[0]
    assert Action(Kind.RECV_FORWARD, 0, 2) in first_rank and Action(Kind.RECV_FORWARD, 0, 0) not in first_rank


# What validate is for: each of these programs has one fault.


def drop(program, rank, action):
    program[rank].remove(action)


def swap(program, rank, first, second):
    actions = program[rank]
    i, j = actions.index(first), actions.index(second)
    actions[i], actions[j] = actions[j], actions[i]


FAULTS = {
    "a forward is missing": (
        lambda program: drop(program, 1, Action(Kind.FORWARD, 2, 1)),
        "rank 1: F2.1 occurs 0 times",
    ),
    "a backward runs twice": (
        lambda program: program[0].append(Action(Kind.BACKWARD, 3, 0)),
        "rank 0: B3.0 occurs 2 times",
    ),
    "a send is missing": (
        lambda program: drop(program, 0, Action(Kind.SEND_FORWARD, 1, 0)),
        "rank 0: send F1.0 occurs 0 times",
    ),
    "a receive for nothing": (
        lambda program: program[0].insert(0, Action(Kind.RECV_FORWARD, 0, 0)),
        "rank 0: recv F0.0 occurs 1 times, not 0",
    ),
    "backward before its forward": (
        lambda program: swap(program, 2, Action(Kind.FORWARD, 3, 2), Action(Kind.BACKWARD, 3, 2)),
        "rank 2, step .*: B3.2 comes before F3.2",
    ),
    "sent before it is made": (
        lambda program: swap(program, 0, Action(Kind.FORWARD, 0, 0), Action(Kind.SEND_FORWARD, 0, 0)),
        "rank 0, step 0: send F0.0 comes before F0.0",
    ),
    "used before it is received": (
        lambda program: swap(program, 1, Action(Kind.FORWARD, 0, 1), Action(Kind.RECV_FORWARD, 0, 1)),
        "rank 1, step 0: F0.1 comes before recv F0.1",
    ),
    "sends overtake each other": (
        lambda program: swap(program, 0, Action(Kind.SEND_FORWARD, 0, 0), Action(Kind.SEND_FORWARD, 1, 0)),
        "rank 0, step .*: send F1.0 comes before F1.0",
    ),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_corrupted_program_is_refused(fault):
    spoil, message = FAULTS[fault]
    program = lower(gpipe(3, 4))
    validate(program)
    spoil(program)
    with pytest.raises(ValueError, match=message):
        validate(program)


def test_gradients_added_in_another_order_are_refused():
    program = lower(zero_bubble(3, 4))
    swap(program, 2, Action(Kind.BACKWARD_WEIGHT, 2, 2), Action(Kind.BACKWARD_WEIGHT, 3, 2))
    with pytest.raises(ValueError, match="rank 2, step .*: W3.2 comes before W2.2"):
        validate(program)


def test_messages_in_another_order_than_they_are_taken_are_refused():
    program = lower(gpipe(2, 2))
    sends = [action for action in program[0] if action.kind is Kind.SEND_FORWARD]
    program[0] = [action for action in program[0] if action.kind is not Kind.SEND_FORWARD]
    program[0][2:2] = reversed(sends)
    with pytest.raises(ValueError, match="rank 1, step 0: recv F0.1 would take recv F1.1"):
        validate(program)


def test_a_rank_that_waits_for_what_waits_for_it_is_a_deadlock():
    """Without warm-up, rank 0 wants microbatch 0's gradient before rank 1, which runs GPipe, has all forwards."""
    eager, patient = one_f_one_b(1, 2)[0], gpipe(2, 2)[1]
    with pytest.raises(ValueError, match="deadlock: rank 0 waits at step 2, recv B0.0"):
        validate(lower([eager, patient]))


def test_a_program_of_nothing_is_complete():
    validate([[], []])


def test_backward_halves_must_both_run():
    program = lower(zero_bubble(2, 2))
    drop(program, 0, Action(Kind.BACKWARD_WEIGHT, 1, 0))
    with pytest.raises(ValueError, match="rank 0: W1.0 occurs 0 times"):
        validate(program)


@pytest.mark.parametrize("sizes", [(0, 2, 3), (1, 0, 3), (1, 2, 0)])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_sizes_below_one_are_refused(name, sizes):
    said = "num_ranks={}, num_microbatches={}, stages_per_rank={}: each must be at least 1".format(*sizes)
    with pytest.raises(ValueError, match=f"^{said}$"):
        SCHEDULES[name](*sizes)


@pytest.mark.parametrize("schedule", ONE_STAGE)
def test_schedules_of_one_stage_a_rank_refuse_more(schedule):
    with pytest.raises(ValueError, match="stages_per_rank=2"):
        schedule(2, 2, 2)


def test_drawing():
    assert draw(timeline(one_f_one_b(2, 3), 0.5, 1.0)) == "\n".join(
        [
            "rank 0  F0 F1 ......B0--- F2 B1--- ...B2---",
            "rank 1  ...F0 B0--- F1 B1--- F2 B2--- ......",
            "bubble 25.0%, activations held 2 1",
        ]
    )


def test_the_shortest_action_is_as_wide_as_its_label_whenever_it_comes():
    assert draw(timeline(one_f_one_b(2, 2), 2.0, 1.0)) == "\n".join(
        [
            "rank 0  F0--- F1--- ...B0 ......B1",
            "rank 1  ......F0--- B0 F1--- B1 ...",
            "bubble 33.3%, activations held 2 1",
        ]
    )


def test_drawing_names_the_stage_where_a_rank_has_several():
    assert draw(timeline(interleaved_1f1b(2, 1, 2), 3.0, 6.0)) == "\n".join(
        [
            "rank 0  F0.0 .....F0.2 ...............B0.2----- ..........B0.0-----",
            "rank 1  .....F0.1 .....F0.3 B0.3----- ..........B0.1----- ..........",
            "bubble 50.0%, activations held 2 2",
        ]
    )


def test_a_schedule_is_found_by_its_file_alone(tmp_path):
    """A copy of the folder with one more file: the name is there, it is valid, and the command line offers it."""
    folder = tmp_path / "heiretsu" / "parallel" / "schedules"
    shutil.copytree(Path(schedules.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "one_at_a_time.py").write_text(ONE_AT_A_TIME)
    program = """
import sys
import heiretsu.parallel
heiretsu.parallel.__path__.insert(0, sys.argv[1])
from heiretsu.run.options import parse_args
from heiretsu.parallel.schedules import SCHEDULES, lower, validate
validate(lower(SCHEDULES["one-at-a-time"](3, 4)))
print(parse_args(["--pp", "3", "--schedule", "one-at-a-time"], world_size=3).schedule)
"""
    ran = subprocess.run([sys.executable, "-c", program, str(folder.parent)], capture_output=True, text=True)
    assert ran.stdout == "one-at-a-time\n", ran.stderr


ONE_AT_A_TIME = '''
from heiretsu.parallel.schedules.actions import Action, Kind
from heiretsu.parallel.schedules.registry import schedule

@schedule("one-at-a-time")
def one_at_a_time(num_ranks, num_microbatches):
    """Forward and backward of a microbatch before the next one."""
    one = range(num_microbatches)
    return [[Action(kind, i, rank) for i in one for kind in (Kind.FORWARD, Kind.BACKWARD)] for rank in range(num_ranks)]
'''
