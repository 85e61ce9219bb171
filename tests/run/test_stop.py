"""How a run ends before its last step: by which signal, which numbers, with which status, and saved or not."""

import os
import signal

import pytest

from heiretsu.parallel.engine import StepReport
from heiretsu.run.options import parse_args
from heiretsu.run.stop import Ending, Stop
from heiretsu.run.watch import GAVE_UP

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers_as_they_were():
    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stop(*flags, ranks=1):
    return Stop(parse_args(list(flags), world_size=ranks))


def report(skipped=False, notes=(0,)):
    return StepReport({}, 1.0, skipped, not_finite="wte.weight is not finite" if skipped else "", notes=notes)


def handled(stopping):
    return {number for number in NUMBERS if signal.getsignal(number) == stopping._receive}


def test_signals_are_waited_for_where_something_is_to_be_finished():
    assert handled(stop("--checkpoint_dir", "x")) == set(NUMBERS)
    assert handled(stop("--dp", "2", ranks=2)) == set(NUMBERS)


def test_one_process_that_cannot_save_ends_as_ever():
    assert handled(stop()) == {signal.SIGINT}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_ctrl_c_that_the_shell_has_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert handled(stop("--checkpoint_dir", "x")) == {signal.SIGTERM, signal.SIGUSR1}


def test_a_second_ctrl_c_ends_the_process_at_once(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number, signal.getsignal(number))))
    stopping = stop("--checkpoint_dir", "x")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        stopping._receive(number, None)
        assert stopping.note() == number and killed == []
    stopping._receive(signal.SIGINT, None)
    assert killed == [(os.getpid(), signal.SIGINT, signal.SIG_DFL)]


def test_a_late_warning_finds_a_handler_that_lets_it_pass():
    stopping = stop("--checkpoint_dir", "x")
    stopping.close()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    alone = stop()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    alone.close()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize("number, name", list(zip(NUMBERS, ("SIGTERM", "SIGUSR1", "Ctrl-C"), strict=True)))
def test_a_signal_of_any_rank_ends_all_and_saves_where_it_can(number, name):
    assert stop().after(report()) is None
    notes = (0x300, number | 0x500, 0)  # what else a rank tells is above the signal's bits
    saved = Ending(f"stopped by {name}: go on with --resume auto", 0, saves=True)
    assert stop("--checkpoint_dir", "x").after(report(notes=notes)) == saved
    lost = Ending(f"stopped by {name}: nothing is saved without --checkpoint_dir", 128 + number, saves=False)
    assert stop("--dp", "3", ranks=3).after(report(notes=notes)) == lost


@pytest.mark.parametrize("flags, saves", [([], False), (["--checkpoint_dir", "x"], True)])
def test_so_many_skipped_steps_in_a_row_end_it(flags, saves):
    stopping = stop("--max_skips", "3", *flags)
    for skipped in (True, True, False, True, True):
        assert stopping.after(report(skipped)) is None
    why = "3 steps in a row were skipped (--max_skips): the last because wte.weight is not finite"
    assert stopping.after(report(True)) == Ending(why, GAVE_UP, saves)


def test_replicas_that_differ_end_it_and_nothing_of_it_is_saved():
    ending = stop("--checkpoint_dir", "x").after(report(notes=(signal.SIGTERM,)), "wte.weight on rank 1")
    assert ending == Ending("replicas differ: wte.weight on rank 1; nothing is saved of it", GAVE_UP, saves=False)
