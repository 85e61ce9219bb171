"""Killed ranks, started again: by this program many times over, by torchrun once."""

import re
import signal

import pytest

from tests.faults import kills
from tests.faults.launch import PATIENCE_S, TINY, last_line, run_to_the_end, torchrun


@pytest.mark.full
@pytest.mark.parametrize("model", kills.MODELS)
def test_kills_at_random_moments_change_nothing(record_property, model):
    record_property("fault", f"5 SIGKILLs at random moments, a save after every step, dp 2 x pp 2, {model}")
    said, wrong = kills.compare(model, steps=14, count=5, seed=1)
    record_property("outcome", f"{len(said)} restarts, final parameters bitwise those of an undisturbed run")
    assert len(said) == 5 and wrong == []


@pytest.mark.full
def test_torchrun_starts_a_killed_run_again_from_its_newest_checkpoint(tmp_path, record_property):
    """The restart once failed, on the addresses of dead ranks in the store that torchrun keeps."""
    record_property("fault", "SIGKILL of rank 1 under torchrun --standalone --max-restarts=1")
    flags = [*TINY, "--dp", "2", "--max_iters", "14", "--save_interval", "2", "--resume", "auto"]
    process = torchrun([*flags, "--checkpoint_dir", str(tmp_path / "saved")], 2, restarts=1, fault="kill:1:11")
    text, _ = process.communicate(timeout=PATIENCE_S)
    record_property("outcome", last_line(text, "resumed").partition(": ")[2] + "; ended bitwise as if undisturbed")
    assert process.returncode == 0, text
    assert "lost rank 1" in text and re.search(r"resumed \S+step_000000\d\d: ([2-9]|10) of 14 steps are done", text), (
        text
    )
    straight = [*flags, "--checkpoint_dir", str(tmp_path / "straight" / "saved")]
    assert run_to_the_end(straight, 2, tmp_path)[0] == [0, 0]
    assert kills.differing(kills.parameters(tmp_path), kills.parameters(tmp_path / "straight")) == []


@pytest.mark.full
def test_sigterm_to_torchrun_saves_and_ends(tmp_path, record_property):
    record_property("fault", "SIGTERM to torchrun itself, two ranks")
    log = tmp_path / "log.jsonl"
    flags = [*TINY, "--dp", "2", "--max_iters", "100000", "--checkpoint_dir", str(tmp_path / "saved")]
    process = torchrun([*flags, "--log_file", str(log)], 2)
    while kills.steps_done(tmp_path) < 2 and process.poll() is None:
        pass
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=PATIENCE_S)
    record_property("outcome", last_line(text, "stopped by"))
    assert "stopped by SIGTERM: go on with --resume auto" in text, text
    assert [path.name for path in (tmp_path / "saved").glob("step_*")] == [f"step_{kills.steps_done(tmp_path):08d}"]
