"""ZB-H1: 1F1B with backward split in two (Qi et al. 2023, arXiv:2401.10241, section 2.1)."""

from heiretsu.parallel.schedules.actions import Action, Kind, Schedule
from heiretsu.parallel.schedules.one_f_one_b import alternate
from heiretsu.parallel.schedules.registry import schedule


@schedule("zero-bubble")
def zero_bubble(num_ranks: int, num_microbatches: int) -> Schedule:
    """The gradient of the input goes out at once; that of the weights waits for a gap. Rank r keeps r of them back, so
    that no rank holds more than num_ranks activations, which is what 1F1B needs on rank 0."""
    result = []
    for rank in range(num_ranks):
        forwards = [Action(Kind.FORWARD, i, rank) for i in range(num_microbatches)]
        inputs = [Action(Kind.BACKWARD_INPUT, i, rank) for i in range(num_microbatches)]
        actions = []
        for action in alternate(forwards, inputs, warmup=num_ranks - rank - 1):
            actions.append(action)
            if action.kind is Kind.BACKWARD_INPUT and action.microbatch >= rank:
                actions.append(Action(Kind.BACKWARD_WEIGHT, action.microbatch - rank, rank))
        late = range(max(num_microbatches - rank, 0), num_microbatches)
        result.append(actions + [Action(Kind.BACKWARD_WEIGHT, i, rank) for i in late])
    return result
