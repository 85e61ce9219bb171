"""Where a process is, and whether it has moved: what other ranks are told of it."""

import time

from heiretsu.parallel.activity import Activity, Place


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


def test_seconds_are_those_of_the_outermost_region_that_waits(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    activity = Activity()
    assert activity.waited_s == 0.0 and activity.moves == 0 and not activity.failed_waiting

    def after(seconds, act, *arguments):
        now[0] += seconds
        act(*arguments)

    after(0, activity.enter, "step 1", False)
    after(1, activity.enter, "receive", True)
    after(2, activity.enter, "part of it", False)
    after(4, activity.enter, "all-reduce dp", True)
    assert activity.waiting_s() == 6.0 and activity.places[0] == Place("step 1", False, 100.0)
    after(8, activity.leave, None)
    after(16, activity.leave, None)
    assert activity.waited_s == 0.0 and activity.waiting_s() == 30.0
    after(32, activity.leave, None)
    assert activity.waited_s == 62.0 and activity.waiting_s() == 0.0
    after(64, activity.leave, None)
    assert activity.waited_s == 62.0 and activity.moves == 8


def test_a_second_exception_is_placed_anew_and_outside_of_waiting_it_is_not_of_waiting():
    activity, errors = Activity(), [ValueError(), ValueError()]
    for name, waits, error in (("receive", True, errors[0]), ("forward", False, errors[1])):
        activity.enter("step 1", waits=False)
        activity.enter(name, waits=waits)
        activity.leave(error)
        activity.leave(error)
        assert activity.last_place() == f"{name} / step 1" and activity.failed_waiting == waits
