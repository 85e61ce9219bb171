"""The cable between two hosts pulled in the middle of a run: both sides end, and say whom they have lost."""

import re
import time

import pytest

from heiretsu.data.shards import write_shard
from heiretsu.parallel.checkpoint_folder import complete
from heiretsu.parallel.checkpoint_seal import verify
from heiretsu.parallel.mesh import abstract_mesh
from tests.cluster.launching import TINY, ended, launch

pytestmark = pytest.mark.full

TIMEOUT_S = 15
# On a machine that does other things too: the time to notice, and the launcher's own end.
ENDS_WITHIN_S = 120
TWO = ["train.py", *TINY, "--dp", "2", "--max_iters", "1000000", "--timeout", str(TIMEOUT_S)]
TRAIN = [*TWO, "--tp", "2"]


LOST = (r"rank \d.* on birch\b", r"rank \d.* on alder\b")


def both_sides_end(processes, began: float, named: tuple[str, str] = LOST) -> list[str]:
    """In one line each, whom each side has lost: `named` is what must be in it."""
    results = ended(processes)
    assert time.monotonic() - began < ENDS_WITHIN_S
    lines = []
    for (status, text), pattern in zip(results, named, strict=True):
        assert status != 0, text
        found = [line for line in text.splitlines() if re.search(pattern, line)]
        assert found, text
        lines.append(found[-1])
    return lines


def test_while_training(net, row):
    processes = launch(net, *TRAIN, ranks_per_host=2)
    processes[0].wait_for("step       1/1000000")
    net.unplug()
    words = both_sides_end(processes, time.monotonic())
    row("cable training", f"--timeout {TIMEOUT_S}: both sides ended, e.g. `{words[1]}`")


def test_while_saving(net, row, tmp_path):
    folder = tmp_path / "run"
    processes = launch(net, *TWO, "--n_embed", "256", "--save_interval", "1", "--checkpoint_dir", str(folder))
    deadline = time.monotonic() + 300
    while len(complete(folder)) < 1 or not list(folder.glob(".step_*")):
        assert time.monotonic() < deadline, processes[0].text()
    net.unplug()
    both_sides_end(processes, time.monotonic())
    assert complete(folder)
    for path in complete(folder):
        verify(path, abstract_mesh())
    row("cable saving", "both sides ended; the checkpoints before are whole")


SLOW_DISK = """
import os, time
fsync = os.fsync
os.fsync = lambda file: time.sleep(2) or fsync(file)
"""


def test_while_all_wait_for_a_save(net, row, tmp_path):
    """No rank is in a collective of the training, and those of a save have hours."""
    folder = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    slow = {"PYTHONPATH": str(tmp_path)}
    processes = launch(net, *TWO, "--save_interval", "1", "--checkpoint_dir", str(folder), environment=slow)
    processes[0].wait_for("saved ")
    time.sleep(1)
    net.unplug()
    words = both_sides_end(processes, time.monotonic())
    assert "has not been heard of" in words[0] and "average gradients" not in words[0]
    row("cable waiting for a save", f"both sides ended, e.g. `{words[0]}`")


def test_while_starting(net, row):
    processes = launch(net, *TRAIN, ranks_per_host=2, environment={"LOGLEVEL": "INFO"})
    processes[1].wait_for("Starting worker group")  # torchrun's word: the hosts have met, the ranks have not
    net.unplug()
    absent = r"error: rank 2, 3 did not come within"
    unfound = r"error: rank \d on birch did not find (the store|rank 0 by the store) at alder:29500 within"
    words = both_sides_end(processes, time.monotonic(), (absent, unfound))
    row("cable starting", f"both sides ended, e.g. `{words[0]}`")


def test_hosts_with_other_data_do_not_start(net, row, tmp_path):
    """Each node may have a folder of its own; they must hold the same."""
    import numpy as np

    flags = []
    for number, host in enumerate(net.hosts):
        folder = tmp_path / host.name
        folder.mkdir()
        for split in ("train_000000", "val_000000"):
            write_shard(folder / f"{split}.bin", np.random.default_rng(number).integers(50257, size=2000))
        host.run("mkdir", "-p", "/run/data")
        host.run("mount", "--bind", folder, "/run/data")
        flags = ["--data_dir", "/run/data"]
    try:
        results = ended(launch(net, *TRAIN, *flags, ranks_per_host=2))
    finally:
        for host in net.hosts:
            host.start("umount", "/run/data").wait()
    for status, text in results:
        assert status != 0
        (line,) = [line for line in text.splitlines() if line.startswith("train.py: error: ")]
        assert "rank" in line and "data" in line, line
    row("data", f"`{line}`")
