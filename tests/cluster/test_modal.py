"""What modal_train.py runs in each container of a cluster, called in both hosts with their IPv6 addresses as Modal's
are, and with a folder of checkpoints that they do not share, as a volume is none that containers share."""

import json

import pytest

from heiretsu.bench.network import ADDRESSES_V6, ROOT
from heiretsu.parallel.checkpoint_folder import complete
from tests.cluster.launching import PYTHON, TINY, ended

pytestmark = pytest.mark.full

CALL = "import modal_train, sys, json; modal_train.train_on_node(**json.loads(sys.argv[1]))"


def test_containers_of_a_cluster_train_and_the_first_has_the_whole_checkpoint(net, row, tmp_path):
    volume, log = tmp_path / "volume", tmp_path / "log.jsonl"
    volume.mkdir()
    net.birch.run("mount", "-t", "tmpfs", "tmpfs", volume)  # its own: alder sees the folder itself

    def train(steps: int) -> str:
        flags = ["--dp", "2", "--tp", "2", "--save_interval", "4", "--checkpoint_dir", str(volume), "--resume", "auto"]
        arguments = [*TINY, *flags, "--max_iters", str(steps), "--log_file", str(log)]
        calls = []
        for node, host in enumerate(net.hosts):
            share = {"node": node, "addresses": [*ADDRESSES_V6.values()], "gpus": 2, "arguments": arguments}
            calls.append(host.start(PYTHON, "-c", CALL, json.dumps({**share, "cwd": str(ROOT)})))
        (status, text), (other_status, other) = ended(calls)
        assert (status, other_status) == (0, 0), text + other
        return text

    try:
        assert "hosts: alder ranks 0-1, birch ranks 2-3; between hosts: dp" in train(4)
        assert [path.name for path in complete(volume)] == ["step_00000004"]
        # The next containers begin with what the first has committed.
        net.birch.run("umount", volume)
        net.birch.run("sh", "-c", f"cp -r {volume} {tmp_path}/committed && mount -t tmpfs tmpfs {volume}")
        net.birch.run("sh", "-c", f"cp -r {tmp_path}/committed/. {volume}")
        assert "4 of 8 steps are done" in train(8)
    finally:
        net.birch.start("umount", volume).wait()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(8))
    row("modal", "dp 2 x tp 2 over IPv6; the first container's folder alone was resumed by both")
