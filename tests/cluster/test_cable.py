"""The cable between two hosts pulled in the middle of a run: both sides end, and say whom they have lost."""

import re
import time

import pytest

from heiretsu.data.shards import write_shard
from heiretsu.parallel import checkpoint
from tests.cluster.launching import TINY, ended, launch

pytestmark = pytest.mark.full

TIMEOUT_S = 10
# On a machine that does other things too: the time to notice, and the launcher's own end.
ENDS_WITHIN_S = 120
TRAIN = ["train.py", *TINY, "--dp", "2", "--tp", "2", "--max_iters", "1000000", "--timeout", str(TIMEOUT_S)]


def both_sides_end(processes, began: float) -> list[str]:
    """The last words of each side's ranks. Each side must name a rank of the other, and its host."""
    results = ended(processes)
    assert time.monotonic() - began < ENDS_WITHIN_S
    lines = []
    for (status, text), other in zip(results, ("birch", "alder"), strict=True):
        assert status != 0, text
        named = [
            line for line in text.splitlines() if re.search(rf"rank \d.* {other}\b", line) and "hosts:" not in line
        ]
        assert named, text
        lines.append(named[-1])
    return lines


def test_while_training(net, row):
    processes = launch(net, *TRAIN, ranks_per_host=2)
    processes[0].wait_for("step       2/1000000")
    net.unplug()
    words = both_sides_end(processes, time.monotonic())
    row("cable training", f"--timeout {TIMEOUT_S}: both sides ended, e.g. `{words[1]}`")


def test_while_saving(net, row, tmp_path):
    folder = tmp_path / "run"
    processes = launch(
        net, *TRAIN, "--n_embed", "256", "--save_interval", "1", "--checkpoint_dir", str(folder), ranks_per_host=2
    )
    deadline = time.monotonic() + 300
    while len(checkpoint.complete(folder)) < 1 or not list(folder.glob(".step_*")):
        assert time.monotonic() < deadline, processes[0].text()
    net.unplug()
    both_sides_end(processes, time.monotonic())
    whole = checkpoint.complete(folder)
    assert whole and all(checkpoint.read_run(path)["step"] for path in whole)
    row("cable saving", "both sides ended; the checkpoints before are whole")


def test_while_starting(net, row):
    processes = launch(net, *TRAIN, ranks_per_host=2, environment={"LOGLEVEL": "INFO"})
    processes[1].wait_for("Starting worker group")  # torchrun's word: the hosts have met, the ranks have not
    net.unplug()
    words = both_sides_end(processes, time.monotonic())
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
