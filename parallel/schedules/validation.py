"""What must hold of a program before any process runs it."""

from __future__ import annotations

from collections import Counter

from heiretsu.parallel.schedules.actions import Action, Kind, Schedule, num_stages
from heiretsu.parallel.schedules.lowering import messages
from heiretsu.parallel.schedules.playing import play


def validate(program: Schedule) -> None:
    """Raise ValueError, naming rank and action, unless the lowered program is complete, in order and free of deadlock.

    Complete: each rank runs forward and backward (whole, or input and weight) of every microbatch and stage of its own
    once, with exactly the sends and receives that they need. In order: a receive, its use, its product's send; backward
    after forward; weight gradients added in the order of microbatches, so that their sum is the same whatever the
    schedule. Free of deadlock: with receives that block and sends that do not, and messages taken in the order sent.
    """
    num_microbatches = 1 + max((action.microbatch for actions in program for action in actions), default=-1)
    for rank, actions in enumerate(program):
        needed = _needed(actions, rank, len(program), num_stages(program), num_microbatches)
        seen = Counter(actions)
        for action in [*needed, *seen]:
            if seen[action] != (action in needed):
                raise ValueError(f"rank {rank}: {action} occurs {seen[action]} times, not {int(action in needed)}")
        place = {action: step for step, action in enumerate(actions)}
        for action, earlier in needed.items():
            for other in earlier:
                if place[other] > place[action]:
                    raise ValueError(f"rank {rank}, step {place[action]}: {action} comes before {other}")
    for _ in play(program):
        pass


def _needed(
    actions: list[Action], rank: int, num_ranks: int, num_stages: int, num_microbatches: int
) -> dict[Action, list[Action]]:
    """Every action that the rank must run, and which of its actions come earlier."""
    split = {action[1:] for action in actions if action.kind in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)}

    def backward_of(microbatch: int, stage: int) -> Action:
        return Action(Kind.BACKWARD_INPUT if (microbatch, stage) in split else Kind.BACKWARD, microbatch, stage)

    needed: dict[Action, list[Action]] = {}
    for stage in range(rank, num_stages, num_ranks):
        added: list[Action] = []  # what adds to this stage's gradients, so far
        for microbatch in range(num_microbatches):
            forward, backward = Action(Kind.FORWARD, microbatch, stage), backward_of(microbatch, stage)
            needed[forward], needed[backward] = [], [forward]
            is_split = backward.kind is Kind.BACKWARD_INPUT
            adds = Action(Kind.BACKWARD_WEIGHT, microbatch, stage) if is_split else backward
            needed.setdefault(adds, []).extend(([backward] if is_split else []) + added[-1:])
            added.append(adds)
            for action in (forward, backward):
                before, after = messages(action, num_ranks, num_stages - 1)
                needed[action] += before
                needed.update({message: [] for message in before} | {message: [action] for message in after})
            if num_ranks == 1 and stage > 0:  # nothing but the order of its actions says so
                needed[forward].append(Action(Kind.FORWARD, microbatch, stage - 1))
                needed[backward_of(microbatch, stage - 1)].append(backward)
    return needed
