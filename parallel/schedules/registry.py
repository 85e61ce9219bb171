"""What a file of this folder says of its schedule: a name, and whether it deals several stages to a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from heiretsu.parallel.schedules.actions import Kind, Schedule

SCHEDULES: dict[str, PipelineSchedule] = {}  # filled while the folder is imported, once; read only after that


@dataclass(frozen=True)
class PipelineSchedule:
    """A pure function of sizes to compute actions, with the name that `--schedule` gives it."""

    name: str
    build: Callable[..., Schedule]
    several_stages: bool

    def __call__(self, num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Schedule:
        """For each rank, what it computes, in order. ValueError for sizes that there is no schedule of."""
        check_sizes(num_ranks, num_microbatches, stages_per_rank)
        if self.several_stages:
            return self.build(num_ranks, num_microbatches, stages_per_rank)
        if stages_per_rank > 1:
            raise ValueError(f"stages_per_rank={stages_per_rank}: the schedule {self.name} runs one stage a rank")
        return self.build(num_ranks, num_microbatches)

    @property
    def splits_backward(self) -> bool:
        """Whether the gradients of input and weights are two actions: the executor does not run these yet."""
        return any(action.kind is Kind.BACKWARD_INPUT for actions in self(2, 2) for action in actions)

    @property
    def keeps_all(self) -> bool:
        """Whether a rank runs all its forwards first, and so holds the activations of every microbatch."""
        return all(action.kind is Kind.FORWARD for actions in self(2, 9) for action in actions[:9])


def schedule(name: str, several_stages: bool = False) -> Callable[[Callable[..., Schedule]], PipelineSchedule]:
    """Give `name` to a function (num_ranks, num_microbatches), or (..., stages_per_rank) where it deals out several."""

    def register(build: Callable[..., Schedule]) -> PipelineSchedule:
        assert name not in SCHEDULES, f"two schedules are called {name}"
        SCHEDULES[name] = PipelineSchedule(name, build, several_stages)
        return SCHEDULES[name]

    return register


def check_sizes(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    if min(num_ranks, num_microbatches, stages_per_rank) < 1:
        sizes = f"num_ranks={num_ranks}, num_microbatches={num_microbatches}, stages_per_rank={stages_per_rank}"
        raise ValueError(f"{sizes}: each must be at least 1")
