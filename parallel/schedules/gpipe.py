"""GPipe: all forwards, then all backwards (Huang et al. 2018, arXiv:1811.06965)."""

from heiretsu.parallel.schedules.actions import Action, Kind, Schedule
from heiretsu.parallel.schedules.registry import schedule


@schedule("gpipe")
def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Keeps every microbatch's activations."""
    kinds = (Kind.FORWARD, Kind.BACKWARD)
    return [[Action(kind, i, rank) for kind in kinds for i in range(num_microbatches)] for rank in range(num_ranks)]
