"""Interleaved 1F1B: several stages a rank (Narayanan et al. 2021, arXiv:2104.04473, section 2.2)."""

from collections.abc import Iterable

from heiretsu.parallel.schedules.actions import Action, Kind, Schedule
from heiretsu.parallel.schedules.one_f_one_b import alternate
from heiretsu.parallel.schedules.registry import schedule


@schedule("interleaved", several_stages=True)
def interleaved_1f1b(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    """The bubble shrinks by stages_per_rank, for as many times the messages and some more activations.

    Microbatches pass through a stage in groups of num_ranks. Where they are no multiple of it, the schedule is that of
    the next multiple without the microbatches that are not there: leaving actions out cannot make another wait for
    longer. With one stage a rank this is 1F1B.
    """
    result = []
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * stages_per_rank, num_ranks)
        forwards = in_groups(Kind.FORWARD, stages, num_ranks, num_microbatches)
        backwards = in_groups(Kind.BACKWARD, reversed(stages), num_ranks, num_microbatches)
        warmup = num_ranks - rank - 1
        if stages_per_rank > 1:
            warmup = 2 * warmup + (stages_per_rank - 1) * num_ranks
        actions = alternate(forwards, backwards, warmup)
        result.append([action for action in actions if action.microbatch < num_microbatches])
    return result


def in_groups(kind: Kind, stages: Iterable[int], num_ranks: int, num_microbatches: int) -> list[Action]:
    """Groups of num_ranks microbatches, each through every one of a rank's stages. The last group is filled up with
    microbatches that do not exist, for the caller to leave out."""
    order = list(stages)
    groups = [range(start, start + num_ranks) for start in range(0, num_microbatches, num_ranks)]
    return [Action(kind, i, stage) for group in groups for stage in order for i in group]
