"""Where a process is, and whether it has moved: what other ranks are told of it."""

from heiretsu.parallel.activity import Activity


def test_every_entry_and_every_exit_is_a_move():
    """Two equal counts mean that nothing has moved in between, which is how a hang is seen."""
    activity, counts = Activity(), []
    for act in (
        lambda: activity.enter("step 1", waits=False),
        lambda: activity.enter("all-reduce dp", waits=True),
        lambda: activity.leave(None),
        lambda: activity.leave(None),
    ):
        before = activity.moves
        act()
        counts.append(activity.moves - before)
    assert counts == [1, 1, 1, 1]


def test_where_it_is_in_words_innermost_first_and_what_it_left():
    activity = Activity()
    assert activity.last_place() == "the start"
    activity.enter("step 1", waits=False)
    activity.enter("all-reduce dp", waits=True)
    assert activity.where() == activity.last_place() == "all-reduce dp / step 1"
    assert activity.waiting_s() > 0
    activity.leave(None)
    assert activity.waiting_s() == 0 and activity.waited_s > 0
    activity.leave(None)
    assert (activity.where(), activity.last_place()) == ("", "what follows step 1")


def test_an_exception_is_placed_where_it_was_raised():
    activity, error = Activity(), ValueError()
    activity.enter("step 1", waits=False)
    activity.enter("all-reduce dp", waits=True)
    activity.leave(error)
    activity.leave(error)
    assert activity.last_place() == "all-reduce dp / step 1" and activity.failed_waiting
