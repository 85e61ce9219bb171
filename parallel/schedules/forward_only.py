"""Evaluation: the forwards of every stage. It trains nothing, and so has no name for `--schedule`."""

from heiretsu.parallel.schedules.actions import Kind, Schedule
from heiretsu.parallel.schedules.interleaved import in_groups
from heiretsu.parallel.schedules.registry import check_sizes


def forward_only(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Schedule:
    check_sizes(num_ranks, num_microbatches, stages_per_rank)
    result = []
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * stages_per_rank, num_ranks)
        actions = in_groups(Kind.FORWARD, stages, num_ranks, num_microbatches)
        result.append([action for action in actions if action.microbatch < num_microbatches])
    return result
