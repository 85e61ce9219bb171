"""Pipeline schedules as data: for each stage, the list of what it does, in order.

A schedule is a pure function of sizes; `lower` adds the sends and receives; `validate`, `simulate` and `draw` work on
the lists alone, without a process group. The executor that carries them out is in `pipeline.py`.

A stage is one rank of the axis pp. It may hold several chunks of the model: virtual stage v = chunk * num_stages +
stage lives on stage v % num_stages, activations go from v to v + 1 and gradients from v to v - 1.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Kind(enum.Enum):
    """What an action does; the value is its letter in drawings and messages."""

    FORWARD = "F"
    BACKWARD = "B"  # gradients of input and weights together
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SEND_FORWARD = "send F"  # the output of virtual stage v, to v + 1
    RECV_FORWARD = "recv F"
    SEND_BACKWARD = "send B"  # the gradient of v's input, to v - 1
    RECV_BACKWARD = "recv B"


FORWARD, BACKWARD = Kind.FORWARD, Kind.BACKWARD
BACKWARD_INPUT, BACKWARD_WEIGHT = Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT
SEND_FORWARD, RECV_FORWARD = Kind.SEND_FORWARD, Kind.RECV_FORWARD
SEND_BACKWARD, RECV_BACKWARD = Kind.SEND_BACKWARD, Kind.RECV_BACKWARD

_TO_THE_NEXT = (SEND_FORWARD, RECV_BACKWARD)  # these talk to stage + 1, the other two to stage - 1
_SENDS = {SEND_FORWARD: RECV_FORWARD, SEND_BACKWARD: RECV_BACKWARD}
_FORWARDS = (RECV_FORWARD, FORWARD, SEND_FORWARD)
_RECEIVES = (RECV_FORWARD, RECV_BACKWARD)
_ACCUMULATES = (BACKWARD, BACKWARD_WEIGHT)  # the actions that add to the weights' gradients, and free the activations


class Action(NamedTuple):
    """One step of one stage. microbatch and chunk are those of this stage's own forward, for receives too."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


Schedule = list[list[Action]]  # [stage][step]


def peer(kind: Kind, stage: int, num_stages: int) -> int:
    """The stage that a send or receive talks to. The ring closes: the last stage's chunk c feeds the first's c + 1."""
    return (stage + (1 if kind in _TO_THE_NEXT else -1)) % num_stages


# Schedules: compute actions only


def forward_only(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """For evaluation. Not in SCHEDULES, because it trains nothing."""
    _check_sizes(num_stages, num_microbatches, num_chunks)
    forwards, _ = _in_groups(num_stages, num_microbatches, num_chunks)
    return [[action for action in forwards if action.microbatch < num_microbatches] for _ in range(num_stages)]


def gpipe(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2018, arXiv:1811.06965). Keeps every microbatch's activations."""
    _check_sizes(num_stages, num_microbatches, num_chunks, at_most=1)
    microbatches = range(num_microbatches)
    stage = [Action(FORWARD, i) for i in microbatches] + [Action(BACKWARD, i) for i in microbatches]
    return [list(stage) for _ in range(num_stages)]


def one_f_one_b(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """One forward, one backward (Narayanan et al. 2019, PipeDream-Flush, arXiv:2006.09503, section 2.2).

    Stage s warms up with min(num_stages - s - 1, num_microbatches) forwards, and holds the activations of at most
    num_stages - s microbatches.
    """
    _check_sizes(num_stages, num_microbatches, num_chunks, at_most=1)
    forwards = [Action(FORWARD, i) for i in range(num_microbatches)]
    backwards = [Action(BACKWARD, i) for i in range(num_microbatches)]
    return [_alternate(forwards, backwards, num_stages - stage - 1) for stage in range(num_stages)]


def interleaved_1f1b(num_stages: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """1F1B over num_chunks chunks a stage (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    The bubble shrinks by num_chunks, for as many times the messages and some more activations. Microbatches pass
    through a chunk in groups of num_stages. Where they are no multiple of it, the schedule is that of the next multiple
    without the microbatches that are not there: leaving actions out cannot make another wait for longer.
    """
    _check_sizes(num_stages, num_microbatches, num_chunks)
    if num_chunks == 1:
        return one_f_one_b(num_stages, num_microbatches)
    forwards, backwards = _in_groups(num_stages, num_microbatches, num_chunks)
    schedule = []
    for stage in range(num_stages):
        actions = _alternate(forwards, backwards, 2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages)
        schedule.append([action for action in actions if action.microbatch < num_microbatches])
    return schedule


def zero_bubble(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """ZB-H1: 1F1B with backward split in two (Qi et al. 2023, arXiv:2401.10241, section 2.1).

    The gradient of the input goes out at once; that of the weights waits for a gap. Stage s keeps s of them back, so
    that no stage holds more than num_stages activations, which is what 1F1B needs on stage 0.
    """
    _check_sizes(num_stages, num_microbatches, num_chunks, at_most=1)
    schedule = []
    for stage in range(num_stages):
        forwards = [Action(FORWARD, i) for i in range(num_microbatches)]
        inputs = [Action(BACKWARD_INPUT, i) for i in range(num_microbatches)]
        actions = []
        for action in _alternate(forwards, inputs, num_stages - stage - 1):
            actions.append(action)
            if action.kind is BACKWARD_INPUT and action.microbatch >= stage:
                actions.append(Action(BACKWARD_WEIGHT, action.microbatch - stage))
        late = range(max(num_microbatches - stage, 0), num_microbatches)
        schedule.append(actions + [Action(BACKWARD_WEIGHT, i) for i in late])
    return schedule


# name -> function(num_stages, num_microbatches, num_chunks)
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved_1f1b,
    "zero-bubble": zero_bubble,
}


def _check_sizes(num_stages: int, num_microbatches: int, num_chunks: int, at_most: float = math.inf) -> None:
    if min(num_stages, num_microbatches, num_chunks) < 1:
        sizes = f"num_stages={num_stages}, num_microbatches={num_microbatches}, num_chunks={num_chunks}"
        raise ValueError(f"{sizes}: each must be at least 1")
    if num_chunks > at_most:
        raise ValueError(f"num_chunks={num_chunks}: only the interleaved schedule runs several chunks a stage")


def _in_groups(num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[list[Action], list[Action]]:
    """All forwards and all backwards: groups of num_stages microbatches, each through every chunk. The last group is
    filled up with microbatches that do not exist, for the caller to leave out."""
    chunks, starts = range(num_chunks), range(0, num_microbatches, num_stages)
    groups = [range(start, start + num_stages) for start in starts]
    forwards = [Action(FORWARD, i, chunk) for group in groups for chunk in chunks for i in group]
    backwards = [Action(BACKWARD, i, chunk) for group in groups for chunk in reversed(chunks) for i in group]
    return forwards, backwards


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """warmup forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    actions = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        actions += [forward, backward]
    return actions + backwards[len(forwards) - warmup :]


# From compute actions to a program: sends, receives, and what must hold


def lower(schedule: Schedule) -> Schedule:
    """The schedule with its sends and receives: a receive right before what uses it, a send right after what made it.

    Sends do not block, so a stage goes on at once. Activations and gradients travel on separate channels, each in
    order. One stage gets none: its chunks hand over in memory.
    """
    num_stages, num_chunks = len(schedule), _num_chunks(schedule)
    lowered = []
    for stage, actions in enumerate(schedule):
        steps = []
        for action in actions:
            before, after = _messages(action, stage, num_stages, num_chunks)
            steps += [*before, action, *after]
        lowered.append(steps)
    return lowered


def validate(program: Schedule, backward: bool = True) -> None:
    """Raise ValueError, naming stage and action, unless the lowered program is complete, in order and free of deadlock.

    Complete: each stage runs forward and backward (whole, or input and weight) of every microbatch and chunk once, with
    exactly the sends and receives that they need. In order: a receive, its use, its product's send; backward after
    forward; weight gradients added in the order of microbatches, so that their sum is the same whatever the schedule.
    Free of deadlock: with receives that block and sends that do not, and messages taken in the order sent.
    backward=False: a program of forwards alone.
    """
    num_stages, num_chunks = len(program), _num_chunks(program)
    num_microbatches = 1 + max((action.microbatch for actions in program for action in actions), default=-1)
    for stage, actions in enumerate(program):
        needed = _needed(actions, stage, num_stages, num_chunks, num_microbatches)
        if not backward:
            needed = {action: earlier for action, earlier in needed.items() if action.kind in _FORWARDS}
        seen = Counter(actions)
        for action in [*needed, *seen]:
            if seen[action] != (action in needed):
                raise ValueError(f"stage {stage}: {action} occurs {seen[action]} times, not {int(action in needed)}")
        place = {action: step for step, action in enumerate(actions)}
        for action, earlier in needed.items():
            for other in earlier:
                if place[other] > place[action]:
                    raise ValueError(f"stage {stage}, step {place[action]}: {action} comes before {other}")
    for _ in _play(program):
        pass


def _num_chunks(schedule: Schedule) -> int:
    return 1 + max((action.chunk for actions in schedule for action in actions), default=0)


def _messages(action: Action, stage: int, num_stages: int, num_chunks: int) -> tuple[list[Action], list[Action]]:
    """What a compute action receives before and sends after."""
    kind, microbatch, chunk = action
    if num_stages == 1 or kind is BACKWARD_WEIGHT:
        return [], []
    virtual, last = chunk * num_stages + stage, num_chunks * num_stages - 1
    from_before, to_after = virtual > 0, virtual < last
    if kind is FORWARD:
        before, after = (RECV_FORWARD, from_before), (SEND_FORWARD, to_after)
    else:
        before, after = (RECV_BACKWARD, to_after), (SEND_BACKWARD, from_before)

    def one_or_none(message: Kind, there: bool) -> list[Action]:
        return [Action(message, microbatch, chunk)] if there else []

    return one_or_none(*before), one_or_none(*after)


def _needed(
    actions: list[Action], stage: int, num_stages: int, num_chunks: int, num_microbatches: int
) -> dict[Action, list[Action]]:
    """Every action that the stage must run, and which of its actions come earlier."""
    split = {action[1:] for action in actions if action.kind in (BACKWARD_INPUT, BACKWARD_WEIGHT)}
    needed: dict[Action, list[Action]] = {}
    for chunk in range(num_chunks):
        added: list[Action] = []  # what adds to this chunk's gradients, so far
        for microbatch in range(num_microbatches):
            forward = Action(FORWARD, microbatch, chunk)
            is_split = (microbatch, chunk) in split
            backward = Action(BACKWARD_INPUT if is_split else BACKWARD, microbatch, chunk)
            needed[forward], needed[backward] = [], [forward]
            adds = Action(BACKWARD_WEIGHT, microbatch, chunk) if is_split else backward
            needed.setdefault(adds, []).extend(([backward] if is_split else []) + added[-1:])
            added.append(adds)
            for action in (forward, backward):
                before, after = _messages(action, stage, num_stages, num_chunks)
                needed[action] += before
                needed.update({message: [] for message in before} | {message: [action] for message in after})
            if num_stages == 1 and chunk > 0:  # chunks hand over in memory
                needed[forward].append(Action(FORWARD, microbatch, chunk - 1))
                whole, halved = (Action(k, microbatch, chunk - 1) for k in (BACKWARD, BACKWARD_INPUT))
                needed[halved if halved[1:] in split else whole].append(backward)
    return needed


def _play(program: Schedule) -> Iterator[tuple[int, Action]]:
    """(stage, action) of the whole program in an order in which it can run: receives block, sends do not.

    Raises ValueError at a receive that no send will answer, or that would take another message than its own.
    """
    num_stages = len(program)
    channels: dict[tuple[int, int, Kind], deque[Action]] = {}  # (from, to, kind of receive) -> messages under way
    step = [0] * num_stages
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(program):
            while step[stage] < len(actions):
                action = actions[step[stage]]
                if action.kind in _RECEIVES:
                    source = peer(action.kind, stage, num_stages)
                    queue = channels.get((source, stage, action.kind))
                    if not queue:
                        break
                    sent = queue.popleft()
                    if sent != action:
                        raise ValueError(
                            f"stage {stage}, step {step[stage]}: {action} would take {sent}, sent before it"
                        )
                elif action.kind in _SENDS:
                    target = peer(action.kind, stage, num_stages)
                    received = _as_received(action, stage, num_stages)
                    channels.setdefault((stage, target, received.kind), deque()).append(received)
                yield stage, action
                step[stage] += 1
                moved = True
    for stage, actions in enumerate(program):
        if step[stage] < len(actions):
            raise ValueError(f"deadlock: stage {stage} waits at step {step[stage]}, {actions[step[stage]]}, for ever")


def _as_received(send: Action, stage: int, num_stages: int) -> Action:
    """The receive that answers a send: the chunk changes where the ring closes."""
    if send.kind is SEND_FORWARD:
        chunk = send.chunk + (stage == num_stages - 1)
    else:
        chunk = send.chunk - (stage == 0)
    return Action(_SENDS[send.kind], send.microbatch, chunk)


# Simulation and drawing


class Span(NamedTuple):
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each stage computes what. peak_activations: the most forwards held at once for their backward, by stage."""

    spans: list[list[Span]]  # [stage], compute actions only
    peak_activations: list[int]

    @property
    def makespan(self) -> float:
        return max(span.end for spans in self.spans for span in spans)

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they wait."""
        busy = sum(span.end - span.start for spans in self.spans for span in spans)
        return 1.0 - busy / (self.makespan * len(self.spans))


def simulate(program: Schedule, forward_cost: float, backward_cost: float, comm_cost: float = 0.0) -> Timeline:
    """Run a lowered program against a clock. Costs are in any one unit: of one microbatch through one chunk (input and
    weight gradient take half of backward_cost each), and of one message, which its sender does not wait for."""
    cost = {FORWARD: forward_cost, BACKWARD: backward_cost}
    cost |= {BACKWARD_INPUT: backward_cost / 2, BACKWARD_WEIGHT: backward_cost / 2}
    num_stages = len(program)
    clock = [0.0] * num_stages
    spans: list[list[Span]] = [[] for _ in program]
    live, peak = [0] * num_stages, [0] * num_stages
    arrival: dict[tuple[int, Action], float] = {}
    for stage, action in _play(program):
        if action.kind in _SENDS:
            target = peer(action.kind, stage, num_stages)
            arrival[target, _as_received(action, stage, num_stages)] = clock[stage] + comm_cost
        elif action.kind in _RECEIVES:
            clock[stage] = max(clock[stage], arrival[stage, action])
        else:
            spans[stage].append(Span(action, clock[stage], clock[stage] + cost[action.kind]))
            clock[stage] = spans[stage][-1].end
            live[stage] += (action.kind is FORWARD) - (action.kind in _ACCUMULATES)
            peak[stage] = max(peak[stage], live[stage])
    return Timeline(spans, peak)


def draw(timeline: Timeline) -> str:
    """The timeline as text: a line a stage, each action from its start to its end, dots where the stage waits."""
    shortest = min(span.end - span.start for spans in timeline.spans for span in spans)
    width = 1 + max(len(str(span.action)) for spans in timeline.spans for span in spans)

    def column(time: float) -> int:
        return round(time / shortest * width)

    lines = []
    for stage, spans in enumerate(timeline.spans):
        line = ["."] * column(timeline.makespan)
        for action, start, end in spans:
            begin, length = column(start), column(end) - column(start)
            line[begin : begin + length] = str(action).ljust(length - 1, "-") + " "
        lines.append(f"stage {stage}  " + "".join(line).rstrip())
    peaks = " ".join(map(str, timeline.peak_activations))
    return "\n".join([*lines, f"bubble {timeline.bubble:.1%}, activations held {peaks}"])
