"""The order in which a program's actions can run, as messages let them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from heiretsu.parallel.schedules.actions import ANSWER, NEIGHBOUR, RECEIVES, Action, Kind, Schedule, peer


def play(program: Schedule) -> Iterator[tuple[int, Action]]:
    """(rank, action) of the whole program in an order in which it can run: receives block, sends do not.

    Raises ValueError at a receive that no send will answer, or that would take another message than its own.
    """
    num_ranks = len(program)
    channels: dict[tuple[int, int, Kind], deque[Action]] = {}  # (from, to, kind of receive) -> messages under way
    step = [0] * num_ranks
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(program):
            while step[rank] < len(actions):
                action = actions[step[rank]]
                if action.kind in RECEIVES:
                    queue = channels.get((peer(action.kind, rank, num_ranks), rank, action.kind))
                    if not queue:
                        break
                    if (sent := queue.popleft()) != action:
                        raise ValueError(f"rank {rank}, step {step[rank]}: {action} would take {sent}, sent before it")
                elif action.kind in ANSWER:
                    received = answer(action)
                    target = peer(action.kind, rank, num_ranks)
                    channels.setdefault((rank, target, received.kind), deque()).append(received)
                yield rank, action
                step[rank] += 1
                moved = True
    for rank, actions in enumerate(program):
        if step[rank] < len(actions):
            raise ValueError(f"deadlock: rank {rank} waits at step {step[rank]}, {actions[step[rank]]}, for ever")


def answer(send: Action) -> Action:
    """The receive that answers a send."""
    return Action(ANSWER[send.kind], send.microbatch, send.stage + NEIGHBOUR[send.kind])
