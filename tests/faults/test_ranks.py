"""A rank is lost, hangs, fails or is slow: what the others say and do. Real processes and signals."""

import re
import signal
import time

import pytest

from tests.faults.launch import TINY, last_line, records, run_to_the_end, started

MESHES = {
    "dp 2": ["--dp", "2"],
    "tp 2": ["--tp", "2"],
    "pp 2": ["--pp", "2", "--grad_accum_steps", "2"],
    "ep 2": ["--ep", "2", "--num_experts", "4", "--moe_freq", "1"],
}


def others_name(run_said: str, survivors, lost: int) -> bool:
    return all(re.search(rf"^rank {r} \(.*lost rank {lost} on .*while in .*step 3", run_said, re.M) for r in survivors)


@pytest.mark.parametrize(
    "mesh, victim",
    [
        ("dp 2", 1),
        *(pytest.param(mesh, v, marks=pytest.mark.full) for mesh, v in (("tp 2", 1), ("pp 2", 0), ("ep 2", 1))),
    ],
)
def test_a_killed_rank_is_named_by_the_other_with_its_action(tmp_path, record_property, mesh, victim):
    record_property("fault", f"SIGKILL of rank {victim} in step 3, {mesh}")
    began = time.monotonic()
    statuses, said = run_to_the_end([*TINY, *MESHES[mesh]], 2, tmp_path, f"kill:{victim}:3")
    record_property("outcome", last_line(said, "lost rank"))
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == 4, said
    assert others_name(said, [1 - victim], victim), said
    assert "Traceback" not in said and time.monotonic() - began < 120  # some seconds on an idle machine


@pytest.mark.full
def test_all_others_of_four_ranks_name_the_killed_one(tmp_path, record_property):
    record_property("fault", "SIGKILL of rank 3 in step 3, dp 2 x pp 2: three others")
    flags = [*TINY, "--dp", "2", "--pp", "2", "--grad_accum_steps", "2"]
    statuses, said = run_to_the_end(flags, 4, tmp_path, "kill:3:3")
    record_property("outcome", f"statuses {statuses}; {last_line(said, 'lost rank')}")
    assert statuses == [4, 4, 4, -signal.SIGKILL] and others_name(said, [0, 1, 2], 3), said


HANGS = {
    "freeze:1:3": (r"rank 1 on \S+ has not been heard of for \d+ s", "SIGSTOP of rank 1", 1),
    "freeze:0:3": (r"rank 0 on \S+ has not been heard of for \d+ s", "SIGSTOP of rank 0", 0),
    "spin:1:3": (
        r"rank 1 on \S+ has been in forward of microbatch 0 in stage 0 / step 3 for \d+ s",
        "an endless loop",
        None,
    ),
    "lone-receive:1:3": (
        r"all ranks wait: rank 0 in all-reduce replica / average gradients / step 3; "
        r"rank 1 in receive that nobody sends / forward of microbatch 0 in stage 0 / step 3",
        "rank 1 waits for a message that nobody sends",
        None,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("fault", HANGS)
def test_a_hang_ends_within_the_timeout_and_the_stuck_rank_is_named(tmp_path, record_property, fault):
    pattern, words, frozen = HANGS[fault]
    record_property("fault", f"a hang: {words}, --timeout 8")
    with started(
        [*TINY, "--dp", "2", "--timeout", "8", "--log_file", str(tmp_path / "log")], 2, tmp_path, fault
    ) as run:
        run.until(lambda: len(records(tmp_path / "log")) >= 2)
        began = time.monotonic()
        awake = [rank for rank in (0, 1) if rank != frozen]
        run.until(lambda: not any(run.processes[rank].is_alive() for rank in awake) or time.monotonic() > began + 60)
        seconds = time.monotonic() - began
        statuses = [run.processes[rank].exitcode for rank in awake]
        said = run.said()
    record_property("outcome", last_line(said, "rank"))
    assert statuses == [4] * len(awake) and all(re.search(pattern, run.rank_said(rank)) for rank in awake), said
    assert 8 <= seconds + 1 < 8 + 40, seconds


@pytest.mark.parametrize("fault", ["raise:1:3", pytest.param("wait-in-destroy:1:3", marks=pytest.mark.full)])
def test_an_exception_is_shown_at_once_and_ends_the_others(tmp_path, record_property, fault):
    slow = " whose groups would not be destroyed" if "destroy" in fault else ""
    record_property("fault", f"an exception on rank 1{slow}")
    statuses, said = run_to_the_end([*TINY, "--dp", "2"], 2, tmp_path, fault)
    record_property("outcome", last_line(said, "rank 0 ("))
    assert statuses == [4, 1] and said.count("Traceback") == 1, said
    assert 'RuntimeError("planted' in said and "rank 1 on " in said
    assert re.search(r"^rank 1 \(.*failed in forward of microbatch 0 in stage 0 / step 3", said, re.M)
    assert re.search(r"^rank 0 \(.*rank 1 on \S+ raised RuntimeError: planted: a row of bad data", said, re.M)


@pytest.mark.full
def test_a_rank_that_never_comes_is_named(tmp_path, record_property):
    record_property("fault", "rank 1 does not start, --timeout 5")
    statuses, said = run_to_the_end([*TINY, "--dp", "2", "--timeout", "5"], 2, tmp_path, "late:1:0:12")
    record_property("outcome", last_line(said, "did not come"))
    assert statuses[0] == 2 and "rank 1 did not come within 5 s (--timeout)" in said, said


@pytest.mark.full
def test_a_slow_rank_is_in_the_log_and_named(tmp_path, record_property):
    record_property("fault", "rank 1 takes 0.5 s longer for each forward, dp 2")
    log = tmp_path / "log.jsonl"
    statuses, said = run_to_the_end(
        [*TINY, "--dp", "2", "--max_iters", "14", "--log_file", str(log)], 2, tmp_path, "slow:1:1"
    )
    record_property("outcome", last_line(said, "slow:"))
    assert statuses == [0, 0] and said.count("slow: for 10 steps rank 1 (dp=1, ep=0, pp=0, tp=0)") == 1, said
    slow = [record for record in records(log)[2:] if record["slowest_rank"] == 1]
    assert len(slow) >= 10 and all(record["slowest_over_median"] > 1.5 for record in slow), records(log)


SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "Ctrl-C"}


QUICK = signal.SIGUSR1


@pytest.mark.parametrize("number", [QUICK, *(pytest.param(n, marks=pytest.mark.full) for n in SIGNALS if n != QUICK)])
def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path, record_property, number):
    record_property("fault", f"{SIGNALS[number]} to rank 1 of 2, with a folder to save to")
    folder, log = tmp_path / "saved", tmp_path / "log"
    flags = [*TINY, "--dp", "2", "--max_iters", "100000", "--checkpoint_dir", str(folder), "--log_file", str(log)]
    with started(flags, 2, tmp_path) as run:
        run.until(lambda: len(records(log)) >= 2)
        run.kill(number, [1])
        statuses, said = run.end()
    record_property("outcome", last_line(said, "stopped by"))
    steps = len(records(log))
    assert statuses == [0, 0] and f"stopped by {SIGNALS[number]}: go on with --resume auto" in said, said
    assert [path.name for path in folder.glob("step_*")] == [f"step_{steps:08d}"]


@pytest.mark.full
def test_a_second_ctrl_c_ends_at_once(tmp_path, record_property):
    record_property("fault", "Ctrl-C twice, while a step takes a minute")
    flags = [
        *TINY,
        "--max_iters",
        "9",
        "--checkpoint_dir",
        str(tmp_path / "saved"),
        "--log_file",
        str(tmp_path / "log"),
    ]
    with started(flags, 1, tmp_path, "spin:0:3") as run:
        run.until(lambda: len(records(tmp_path / "log")) >= 2)
        time.sleep(0.5)
        run.kill(signal.SIGINT)
        time.sleep(1)
        assert run.processes[0].is_alive()
        run.kill(signal.SIGINT)
        statuses, said = run.end(30)
    record_property("outcome", f"status {statuses[0]}")
    assert statuses == [-signal.SIGINT], said


@pytest.mark.full
@pytest.mark.parametrize("ranks, number, status", [(1, signal.SIGINT, 130), (2, signal.SIGTERM, 143)])
def test_a_signal_without_a_folder_ends_after_the_step(tmp_path, record_property, ranks, number, status):
    record_property("fault", f"{SIGNALS[number]} to {ranks} process{'es' * (ranks > 1)}, no folder to save to")
    flags = [*TINY, "--dp", str(ranks), "--max_iters", "100000", "--log_file", str(tmp_path / "log")]
    with started(flags, ranks, tmp_path) as run:
        run.until(lambda: len(records(tmp_path / "log")) >= 2)
        run.kill(number, [ranks - 1])
        statuses, said = run.end()
    record_property("outcome", last_line(said, "stopped by"))
    assert statuses == [status] * ranks and "nothing is saved without --checkpoint_dir" in said, said
    assert "Traceback" not in said
