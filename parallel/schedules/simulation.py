"""A program against a clock: when each rank computes what, how long it waits, what it holds; and as a drawing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from heiretsu.parallel.schedules.actions import ANSWER, RECEIVES, Action, Kind, Schedule, num_stages, peer
from heiretsu.parallel.schedules.playing import answer, play

_FREES = (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)  # the actions after which a forward's activations are no longer held


class Span(NamedTuple):
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each rank computes what. peak_activations: the most forwards held at once for their backward, by rank."""

    spans: list[list[Span]]  # [rank], compute actions only
    peak_activations: list[int]

    @property
    def makespan(self) -> float:
        return max(span.end for spans in self.spans for span in spans)

    @property
    def bubble(self) -> float:
        """The share of the ranks' time in which they wait."""
        busy = sum(span.end - span.start for spans in self.spans for span in spans)
        return 1.0 - busy / (self.makespan * len(self.spans))

    @property
    def stages_per_rank(self) -> int:
        return num_stages([[span.action for span in spans] for spans in self.spans]) // len(self.spans)


def simulate(program: Schedule, forward_cost: float, backward_cost: float, comm_cost: float = 0.0) -> Timeline:
    """Run a lowered program against a clock. Costs are in any one unit: of one microbatch through one stage (input and
    weight gradient take half of backward_cost each), and of one message, which its sender does not wait for."""
    cost = {Kind.FORWARD: forward_cost, Kind.BACKWARD: backward_cost}
    cost |= {Kind.BACKWARD_INPUT: backward_cost / 2, Kind.BACKWARD_WEIGHT: backward_cost / 2}
    num_ranks = len(program)
    clock = [0.0] * num_ranks
    spans: list[list[Span]] = [[] for _ in program]
    live, peak = [0] * num_ranks, [0] * num_ranks
    arrival: dict[tuple[int, Action], float] = {}
    for rank, action in play(program):
        if action.kind in ANSWER:
            arrival[peer(action.kind, rank, num_ranks), answer(action)] = clock[rank] + comm_cost
        elif action.kind in RECEIVES:
            clock[rank] = max(clock[rank], arrival[rank, action])
        else:
            spans[rank].append(Span(action, clock[rank], clock[rank] + cost[action.kind]))
            clock[rank] = spans[rank][-1].end
            live[rank] += (action.kind is Kind.FORWARD) - (action.kind in _FREES)
            peak[rank] = max(peak[rank], live[rank])
    return Timeline(spans, peak)


def draw(timeline: Timeline) -> str:
    """The timeline as text: a line a rank, each action from its start to its end, dots where the rank waits.

    With one stage a rank, an action's stage is its line, and is not written.
    """

    def label(action: Action) -> str:
        return f"{action.kind.letter}{action.microbatch}" if timeline.stages_per_rank == 1 else str(action)

    shortest = min(span.end - span.start for spans in timeline.spans for span in spans)
    width = 1 + max(len(label(span.action)) for spans in timeline.spans for span in spans)

    def column(time: float) -> int:
        return round(time / shortest * width)

    lines = []
    for rank, spans in enumerate(timeline.spans):
        line = ["."] * column(timeline.makespan)
        for action, start, end in spans:
            begin, length = column(start), column(end) - column(start)
            line[begin : begin + length] = label(action).ljust(length - 1, "-") + " "
        lines.append(f"rank {rank}  " + "".join(line).rstrip())
    peaks = " ".join(map(str, timeline.peak_activations))
    return "\n".join([*lines, f"bubble {timeline.bubble:.1%}, activations held {peaks}"])
