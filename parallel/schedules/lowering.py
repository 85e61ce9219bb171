"""From compute actions to a program: sends and receives are put in."""

from __future__ import annotations

from heiretsu.parallel.schedules.actions import Action, Kind, Schedule, num_stages


def lower(schedule: Schedule) -> Schedule:
    """The schedule with its sends and receives: a receive right before what uses it, a send right after what made it.

    Sends do not block, so a rank goes on at once. Activations and gradients travel on separate channels, each in order.
    One rank gets none: there is nobody to send to.
    """
    last = num_stages(schedule) - 1
    lowered = []
    for actions in schedule:
        steps = []
        for action in actions:
            before, after = messages(action, len(schedule), last)
            steps += [*before, action, *after]
        lowered.append(steps)
    return lowered


def messages(action: Action, num_ranks: int, last_stage: int) -> tuple[list[Action], list[Action]]:
    """What a compute action receives before and sends after."""
    kind, microbatch, stage = action
    if num_ranks == 1 or kind is Kind.BACKWARD_WEIGHT:
        return [], []
    upstream, downstream = stage > 0, stage < last_stage  # is there a stage before, and one after?

    def one_or_none(message: Kind, there: bool) -> list[Action]:
        return [Action(message, microbatch, stage)] if there else []

    if kind is Kind.FORWARD:
        return one_or_none(Kind.RECV_FORWARD, upstream), one_or_none(Kind.SEND_FORWARD, downstream)
    return one_or_none(Kind.RECV_BACKWARD, downstream), one_or_none(Kind.SEND_BACKWARD, upstream)
