"""1F1B: one forward, one backward (Narayanan et al. 2019, PipeDream-Flush, arXiv:2006.09503, section 2.2)."""

from heiretsu.parallel.schedules.actions import Action, Kind, Schedule
from heiretsu.parallel.schedules.registry import schedule


@schedule("1f1b")
def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Rank r warms up with min(num_ranks - r - 1, num_microbatches) forwards, and holds the activations of at most
    num_ranks - r microbatches."""
    result = []
    for rank in range(num_ranks):
        forwards = [Action(Kind.FORWARD, i, rank) for i in range(num_microbatches)]
        backwards = [Action(Kind.BACKWARD, i, rank) for i in range(num_microbatches)]
        result.append(alternate(forwards, backwards, warmup=num_ranks - rank - 1))
    return result


def alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """warmup forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    actions = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        actions += [forward, backward]
    return actions + backwards[len(forwards) - warmup :]
