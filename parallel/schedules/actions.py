"""The words of a schedule: an action, what kinds there are, and a schedule as the actions of every rank.

A stage is a range of the model's layers, numbered from its first layers to its last. A rank is a process of the axis
pp; it runs one stage, or several: stage s belongs to rank s % num_ranks. Activations go from stage s to s + 1,
gradients from s to s - 1.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Kind(enum.Enum):
    """What an action does: its letter in drawings and messages, and its words."""

    FORWARD = "F", "forward"
    BACKWARD = "B", "backward"  # gradients of input and weights together
    BACKWARD_INPUT = "I", "input gradient"
    BACKWARD_WEIGHT = "W", "weight gradient"
    SEND_FORWARD = "send F", "send of activations"  # the output of stage s, to s + 1
    RECV_FORWARD = "recv F", "receive of activations"
    SEND_BACKWARD = "send B", "send of gradients"  # the gradient of s's input, to s - 1
    RECV_BACKWARD = "recv B", "receive of gradients"

    def __init__(self, letter: str, words: str):
        self.letter, self.words = letter, words


# The receive that answers each send, and which of a stage's neighbours is at the other end.
ANSWER = {Kind.SEND_FORWARD: Kind.RECV_FORWARD, Kind.SEND_BACKWARD: Kind.RECV_BACKWARD}
RECEIVES = tuple(ANSWER.values())
NEIGHBOUR = {Kind.SEND_FORWARD: +1, Kind.RECV_BACKWARD: +1, Kind.RECV_FORWARD: -1, Kind.SEND_BACKWARD: -1}


class Action(NamedTuple):
    """One thing that the rank of a stage does. microbatch and stage are those of the rank's own forward, for messages
    too."""

    kind: Kind
    microbatch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind.letter}{self.microbatch}.{self.stage}"

    @property
    def words(self) -> str:
        """Spelt out, for messages: "backward of microbatch 3 in stage 1"."""
        return f"{self.kind.words} of microbatch {self.microbatch} in stage {self.stage}"


Schedule = list[list[Action]]  # [rank][step]


def num_stages(schedule: Schedule) -> int:
    return 1 + max((action.stage for actions in schedule for action in actions), default=0)


def peer(kind: Kind, rank: int, num_ranks: int) -> int:
    """The rank that a message goes to or comes from. The ring closes: the last rank's stages feed the first's next."""
    return (rank + NEIGHBOUR[kind]) % num_ranks
