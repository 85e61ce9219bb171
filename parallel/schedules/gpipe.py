"""GPipe: all forwards, then all backwards (Huang et al. 2018, arXiv:1811.06965)."""

from heiretsu.parallel.schedules.actions import BACKWARD, FORWARD, Action, Schedule
from heiretsu.parallel.schedules.registry import schedule


@schedule("gpipe")
def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Keeps every microbatch's activations."""
    microbatches = range(num_microbatches)
    return [[Action(kind, i, rank) for kind in (FORWARD, BACKWARD) for i in microbatches] for rank in range(num_ranks)]
