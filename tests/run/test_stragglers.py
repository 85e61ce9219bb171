"""Which rank is called slow: beside the ranks of its own stage, after ten steps, once."""

import pytest

from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run.stragglers import Stragglers


def test_a_rank_is_compared_with_those_of_its_own_stage():
    """Ranks 0 and 2 hold the first stage, 1 and 3 the last, which is five times as much work."""
    watched = Stragglers(abstract_mesh(dp=2, pp=2))
    assert watched.update([1.0, 5.0, 1.0, 5.0]) == {"slowest_rank": 0, "slowest_over_median": 1.0}
    assert watched.update([1.0, 5.0, 1.5, 5.0]) == {"slowest_rank": 2, "slowest_over_median": 1.5}
    assert watched.update([1.0, 12.3456, 1.5, 5.0]) == {"slowest_rank": 1, "slowest_over_median": 2.469}


def test_a_stage_of_one_rank_is_compared_with_all():
    assert Stragglers(abstract_mesh(pp=3)).update([1.0, 2.0, 6.0]) == {"slowest_rank": 2, "slowest_over_median": 3.0}
    assert Stragglers(abstract_mesh()).update([0.0]) == {"slowest_rank": 0, "slowest_over_median": 0.0}
    assert Stragglers(abstract_mesh(dp=3)).update([0.0, 0.0, 3.0]) == {"slowest_rank": 2, "slowest_over_median": 3.0}


@pytest.mark.parametrize("seconds, told", [(2.0, True), (1.999, False)])
def test_ten_steps_at_twice_the_median_are_told_once(seconds, told):
    watched = Stragglers(abstract_mesh(dp=3))
    said = []
    for _ in range(25):
        watched.update([1.0, seconds, 1.0])
        said.append(watched.line)
    expected = (
        "slow: for 10 steps rank 1 (dp=1, ep=0, pp=0, tp=0) has taken over 2 times the median of its stage for its "
        "own part, 2000 ms in this one"
    )
    assert said == [""] * 9 + [expected if told else ""] + [""] * 15


def test_the_count_begins_again_with_a_good_step_or_another_rank():
    watched = Stragglers(abstract_mesh(dp=3))
    slow, other, good = [1.0, 3.0, 1.0], [1.0, 1.0, 3.0], [1.0, 1.0, 1.0]
    said = []
    for times in [*[slow] * 9, good, *[slow] * 9, other, *[slow] * 9, slow]:
        watched.update(times)
        said.append(bool(watched.line))
    assert said == [False] * 29 + [True]
