"""The watch's own books and words, on a clock of the test's; what it does to a run is in tests/faults."""

import socket
import sys
import time
from types import SimpleNamespace

import pytest

from heiretsu.parallel.activity import Activity
from heiretsu.run import watch as watching
from heiretsu.run.lines import Line
from heiretsu.run.roll_call import Assembly
from heiretsu.run.watch import Peer, Watch, watched

HOSTS = ["alder", "birch", "elm"]
BEAT = {"doing": "step 3", "waits": False, "moves": 7}


class Left(Exception):
    """What ending the process is, here."""


class Streams:
    """As sys has them: errors go where the test looks for them."""

    def __init__(self, stdout):
        self.stdout = stdout

    @property
    def stderr(self):
        return sys.stderr


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping moves; the process neither ends nor watches with a thread."""
    clock = SimpleNamespace(now=100.0, slept=[], flushed=0, threads=[])

    def sleep(seconds):
        clock.slept.append(seconds)
        clock.now += seconds

    def leave(status):
        raise Left(status)

    fake = SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep)
    monkeypatch.setattr(watching, "time", fake)
    monkeypatch.setattr("heiretsu.parallel.activity.time", fake)
    monkeypatch.setattr(watching, "ACTIVITY", Activity())
    monkeypatch.setattr(watching.os, "_exit", leave)
    thread = SimpleNamespace(start=lambda: None, join=lambda seconds: clock.slept.append(f"join {seconds}"))
    monkeypatch.setattr(watching.threading, "Thread", lambda **how: clock.threads.append(how) or thread)
    stdout = SimpleNamespace(flush=lambda: setattr(clock, "flushed", clock.flushed + 1))
    monkeypatch.setattr(watching, "sys", Streams(stdout))
    return clock


def a_watch(rank: int, timeout: float = 60.0) -> tuple[Watch, dict[int, Line]]:
    """The watch of a rank of three, and the other ends of its lines, by rank."""
    pairs = {other: socket.socketpair() for other in ([1, 2] if rank == 0 else [0])}
    lines = {other: Line(ours) for other, (ours, _) in pairs.items()}
    made = Watch(Assembly(rank, HOSTS, lines, "token", ""), timeout, f"rank {rank} (dp={rank})")
    return made, {other: Line(theirs) for other, (_, theirs) in pairs.items()}


def hear(watch: Watch, there: dict[int, Line], rank: int, message: dict | None) -> None:
    """Let a rank say something, or end its line, and the watch hear it."""
    there[rank].send(message) if message else there[rank].close()
    watch._hear(next(peer for peer in watch.peers if peer.rank == rank))


def told(line: Line) -> list[dict]:
    return line.receive()[0]


def test_a_rank_that_has_left_is_not_listened_to_any_more(clock):
    """Its line stays readable for ever: the thread would do nothing but look at it."""
    watch, there = a_watch(0)
    assert clock.threads[0]["daemon"] and clock.threads[0]["target"] == watch._run
    hear(watch, there, 1, {"bye": True})
    there[1].close()
    assert [peer.rank for peer in watch.peers] == [2] and watch._selector.select(timeout=0) == []
    watch._beat()
    assert told(there[2]) == [{"doing": "the start", "waits": False, "moves": 0}]


def test_a_goodbye_and_the_end_of_the_line_in_one_go_are_no_loss(clock):
    watch, there = a_watch(0)
    there[1].send(BEAT)
    there[1].send({"bye": True})
    there[1].close()
    watch._hear(watch.peers[0])
    assert [peer.rank for peer in watch.peers] == [2] and told(there[2]) == []


def test_only_a_beat_that_moved_makes_a_rank_younger():
    peer = Peer(1, "birch", None, since=0.0, heard=0.0)
    for moves in (0, 1):
        peer = Peer(1, "birch", None, since=0.0, heard=0.0)
        peer.hear({"moves": moves, "doing": "the start", "waits": False})
        assert 0 < peer.since == peer.heard
    peer = Peer(1, "birch", None, since=0.0, heard=0.0)
    peer.hear({"moves": 4, "doing": "step 1", "waits": False})
    first = peer.since
    assert first > 0
    peer.hear({"moves": 4, "doing": "step 1", "waits": True})
    assert peer.since == first and peer.heard >= first and peer.waits
    peer.hear({"moves": 5, "doing": "step 2", "waits": False})
    assert peer.since >= first and peer.doing == "step 2"


def test_a_beat_says_what_a_rank_does_and_whether_it_waits(clock):
    watch, there = a_watch(1)
    watching.ACTIVITY.enter("step 4", waits=False)
    watch._beat()
    watching.ACTIVITY.enter("all-reduce tp", waits=True)
    watching.ACTIVITY.enter("copy", waits=False)
    watch._beat()
    assert told(there[0]) == [
        {"doing": "step 4", "waits": False, "moves": 1},
        {"doing": "copy / all-reduce tp / step 4", "waits": True, "moves": 3},
    ]


def test_a_line_that_ends_without_a_goodbye_is_a_lost_rank_and_rank_0_tells_the_others(clock, capsys):
    watch, there = a_watch(0)
    watching.ACTIVITY.enter("step 4", waits=False)
    with pytest.raises(Left, match="4"):
        hear(watch, there, 1, None)
    assert capsys.readouterr().err == "rank 0 (dp=0) on alder: lost rank 1 on birch, while in step 4\n"
    assert told(there[2]) == [{"over": "lost rank 1 on birch", "grace": 0.0}] and clock.slept == []
    assert clock.flushed == 1
    watch, there = a_watch(2)
    with pytest.raises(Left, match="4"):
        hear(watch, there, 0, None)
    assert capsys.readouterr().err == "rank 2 (dp=2) on elm: lost rank 0 on alder, while in step 4\n"


def test_what_a_rank_failed_with_is_told_by_all_after_a_grace_for_the_main_thread(clock, capsys):
    watch, there = a_watch(0)
    watching.ACTIVITY.enter("receive", waits=True)
    with pytest.raises(Left, match="4"):
        hear(watch, there, 2, {"failed": "raised KeyError: 'x'"})
    line = "rank 0 (dp=0) on alder: rank 2 on elm raised KeyError: 'x', while in receive for 5 s\n"
    assert capsys.readouterr().err == line and sum(clock.slept) == pytest.approx(5.0, abs=0.06)
    assert told(there[1]) == [{"over": "rank 2 on elm raised KeyError: 'x'", "grace": 5.0}]
    assert [peer.rank for peer in watch.peers] == [1]


@pytest.mark.parametrize("waited, words", [(2.0, ""), (2.5, " for 2 s"), (61.7, " for 62 s")])
def test_a_verdict_of_rank_0_ends_a_rank_which_says_for_how_long_it_has_waited(clock, capsys, waited, words):
    watch, there = a_watch(1)
    watching.ACTIVITY.enter("receive", waits=True)
    clock.now += waited
    with pytest.raises(Left, match="4"):
        hear(watch, there, 0, {"over": "lost rank 2 on elm", "grace": 0.0})
    said = f"rank 1 (dp=1) on birch: lost rank 2 on elm, while in receive{words}\n"
    assert capsys.readouterr().err == said and told(there[0]) == []


def test_a_main_thread_that_ends_by_itself_within_the_grace_is_let_go(clock, capsys):
    watch, there = a_watch(1)
    sleep = watching.time.sleep

    def sleep_and_end(seconds):
        sleep(seconds)
        if clock.now > 101:
            watch._ending = {"bye": True}

    watching.time.sleep = sleep_and_end
    hear(watch, there, 0, {"over": "rank 2 on elm raised it", "grace": 5.0})
    assert capsys.readouterr().err == "" and 101 < clock.now < 101.2


def test_a_rank_that_waits_for_too_long_asks_rank_0_once_and_ends_without_its_verdict(clock, capsys):
    watch, there = a_watch(1, timeout=60.0)
    watching.ACTIVITY.enter("receive", waits=True)
    clock.now += 59.9
    watch._look_at_the_clock(clock.now)
    assert told(there[0]) == []
    clock.now += 0.1
    watch._look_at_the_clock(clock.now)
    watch.peers[0].hear(BEAT)
    clock.now += 5.0
    watch._look_at_the_clock(clock.now)
    assert told(there[0]) == [{"stuck": True}]
    clock.now += 0.25
    watch.peers[0].heard = clock.now
    with pytest.raises(Left, match="4"):
        watch._look_at_the_clock(clock.now)
    said = "all ranks wait: rank 0 in step 3; rank 1 in receive, while in receive for 65 s\n"
    assert capsys.readouterr().err == f"rank 1 (dp=1) on birch: {said}"


def test_a_rank_whose_rank_0_is_silent_does_not_wait_for_its_verdict(clock, capsys):
    watch, there = a_watch(1, timeout=60.0)
    watching.ACTIVITY.enter("receive", waits=True)
    clock.now += 60
    watch._look_at_the_clock(clock.now)
    clock.now += 0.25
    with pytest.raises(Left):
        watch._look_at_the_clock(clock.now)
    said = "rank 0 on alder has not been heard of for 60 s, last heard in the start, while in receive for 60 s\n"
    assert capsys.readouterr().err == f"rank 1 (dp=1) on birch: {said}"


@pytest.mark.parametrize("rank, other", [(0, 2), (1, 0)])
def test_a_silent_rank_is_lost_whatever_this_one_does(clock, capsys, rank, other):
    """A cable pulled while both wait for the end of a save, which no collective of the training is."""
    watch, there = a_watch(rank, timeout=60.0)
    clock.now += 30
    for peer in watch.peers:
        peer.hear(BEAT)
    clock.now += 65
    for peer in watch.peers:
        if peer.rank != other:
            peer.hear(BEAT)
    watch._look_at_the_clock(clock.now)
    assert all(told(line) == [] for line in there.values())
    clock.now += 0.25
    with pytest.raises(Left, match="4"):
        watch._look_at_the_clock(clock.now)
    why = f"rank {other} on {HOSTS[other]} has not been heard of for 65 s, last heard in step 3"
    assert capsys.readouterr().err == f"{watch.name}: {why}, while in the start\n"
    if rank == 0:
        assert told(there[1]) == [{"over": why, "grace": 0.0}]


def test_rank_0_judges_at_once_where_it_waits_for_too_long_itself_or_is_asked(clock, capsys):
    why = "rank 2 on elm has been in backward for 60 s"
    for asks in (False, True):
        watch, there = a_watch(0, timeout=60.0)
        watching.ACTIVITY = Activity()
        watching.ACTIVITY.enter("receive", waits=True)
        watch.peers[1].hear({"doing": "backward", "waits": False, "moves": 3})
        clock.now += 60
        watch.peers[0].hear({"doing": "receive", "waits": True, "moves": 3})
        watch.peers[1].heard = clock.now
        with pytest.raises(Left, match="4"):
            hear(watch, there, 1, {"stuck": True}) if asks else watch._look_at_the_clock(clock.now)
        assert capsys.readouterr().err == f"rank 0 (dp=0) on alder: {why}, while in receive for 60 s\n"
        assert told(there[2]) == [{"over": why, "grace": 0.0}]


def test_only_rank_0_is_asked_who_is_stuck(clock):
    watch, there = a_watch(1)
    hear(watch, there, 0, {"stuck": True})
    assert [peer.rank for peer in watch.peers] == [0]


def test_who_is_stuck_is_who_is_silent_else_who_works_else_all_with_what_they_wait_in(clock):
    watch, _ = a_watch(0, timeout=60.0)
    one, two = watch.peers
    clock.now += 100
    assert watch._who_is_stuck() == (
        "rank 1 on birch has not been heard of for 100 s, last heard in the start; "
        "rank 2 on elm has not been heard of for 100 s, last heard in the start"
    )
    one.heard, two.heard = clock.now - 5, clock.now - 5.5
    assert watch._who_is_stuck() == "rank 2 on elm has not been heard of for 6 s, last heard in the start"
    two.heard, two.since, two.doing = clock.now - 5, clock.now - 30, "step 9"
    assert watch._who_is_stuck() == "rank 1 on birch has been in the start for 100 s"
    two.since -= 1
    assert watch._who_is_stuck() == (
        "rank 1 on birch has been in the start for 100 s; rank 2 on elm has been in step 9 for 31 s"
    )
    one.waits = two.waits = True
    one.doing = "receive"
    watching.ACTIVITY.enter("receive", waits=True)
    assert watch._who_is_stuck() == "all ranks wait: rank 0, 1 in receive; rank 2 in step 9"


def test_the_thread_beats_every_second_looks_four_times_as_often_and_says_goodbye(clock, monkeypatch):
    watch, there = a_watch(0)
    looked, beats, clocks = [], [], []

    class Selector:
        def select(self, timeout):
            looked.append(clock.now)
            clock.now += timeout
            if clock.now >= 103:
                watch._ending = {"bye": True}
            return [(SimpleNamespace(fileobj=watch._wake_out), 1)]

    monkeypatch.setattr(watch, "_selector", Selector())
    monkeypatch.setattr(watch, "_beat", lambda: beats.append(clock.now))
    monkeypatch.setattr(watch, "_look_at_the_clock", clocks.append)
    watch._run()
    assert beats == [100.0, 101.0, 102.0] and looked == clocks == [100 + i / 4 for i in range(12)]
    for line in there.values():
        assert line.receive() == ([{"bye": True}], False)


@pytest.mark.parametrize(("stopped_s", "heard"), [(5.0, 100.0), (5.25, 110.5)])
def test_a_process_that_was_stopped_does_not_take_the_others_for_silent(clock, monkeypatch, stopped_s, heard):
    """A job that is suspended for an hour, and goes on: all ranks were silent for so long, and none is lost."""
    watch, _ = a_watch(0)

    class Selector:
        def select(self, timeout):
            clock.now += stopped_s
            watch._ending = {"bye": True} if clock.now > 100 + 2 * stopped_s else None
            return []

    monkeypatch.setattr(watch, "_selector", Selector())
    seen = []
    monkeypatch.setattr(watch, "_look_at_the_clock", lambda now: seen.append([peer.heard for peer in watch.peers]))
    watch._run()
    assert len(seen) == 3 and seen[0] == [100.0, 100.0] and seen[2] == [heard, heard]


def test_a_rank_that_fails_prints_where_and_why_tells_the_others_and_ends_with_1(clock, capsys):
    for waiting, slept in ((False, ["join 5.0"]), (True, [10.0, "join 5.0"])):
        watch, _ = a_watch(0)
        watching.ACTIVITY = activity = Activity()
        error = ValueError("x" * 600)
        activity.enter("step 5", waits=waiting)
        activity.leave(error)
        clock.slept.clear()
        with pytest.raises(Left, match="1"):
            watch.fail(error)
        assert watch._ending == {"failed": f"raised ValueError: {'x' * 500}"} and clock.slept == slept
        assert watch._wake_out.recv(9) == b"." and clock.flushed == 1 + waiting
        said = capsys.readouterr().err.splitlines()
        assert said == ["rank 0 (dp=0) on alder: failed in step 5", f"ValueError: {'x' * 600}"]


def test_a_goodbye_wakes_the_thread_and_waits_for_it(clock):
    watch, _ = a_watch(0)
    watch.close()
    assert watch._ending == {"bye": True} and clock.slept == ["join 5.0"]
    assert [key.fileobj for key, _ in watch._selector.select(timeout=0)] == [watch._wake_out]


def test_statuses_tell_how_a_run_ended():
    assert (watching.FAILED, watching.GAVE_UP, watching.LOST) == (1, 3, 4)


@pytest.mark.parametrize(
    "raised, ending",
    [
        (None, {"bye": True}),
        (SystemExit(), {"bye": True}),
        (SystemExit(0), {"bye": True}),
        (SystemExit(3), {"failed": "ended with status 3"}),
        (KeyboardInterrupt("now"), {"failed": "raised KeyboardInterrupt: now"}),
    ],
)
def test_how_a_block_ends_is_what_the_others_hear(clock, monkeypatch, raised, ending):
    ends = []
    monkeypatch.setattr(Watch, "close", lambda watch, failed="": ends.append(failed))
    expected = Left if isinstance(raised, KeyboardInterrupt) else SystemExit
    try:
        with watched(Assembly(0, HOSTS, {}, "token", ""), 60.0, "rank 0"):
            if raised is not None:
                raise raised
    except expected:
        assert raised is not None
    assert ends == [ending.get("failed", "")]


def test_two_ranks_watch_each_other_until_one_says_goodbye():
    """With their threads, on this machine's own clock."""
    one, two = socket.socketpair()
    zero = Watch(Assembly(0, HOSTS[:2], {1: Line(one)}, "token", ""), 60.0, "rank 0")
    other = Watch(Assembly(1, HOSTS[:2], {0: Line(two)}, "token", ""), 60.0, "rank 1")
    deadline = time.monotonic() + 30
    while None in (zero.peers[0].moves, other.peers[0].moves) and time.monotonic() < deadline:
        time.sleep(0.01)
    other.close()
    while zero.peers and time.monotonic() < deadline:
        time.sleep(0.01)
    assert zero.peers == [] and not other._thread.is_alive()
    zero.close()
    assert not zero._thread.is_alive()
