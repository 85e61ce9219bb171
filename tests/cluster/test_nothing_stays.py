"""What these hosts leave behind: nothing, however they end."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from heiretsu.bench import network as networks
from heiretsu.bench.network import ROOT, network
from tests.cluster.launching import PYTHON
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.full


def traces(folder: Path) -> dict[str, list[str]]:
    """What there is of hosts on this machine: interfaces, addresses, mounts, cgroups, files, processes."""
    found = {
        "interfaces and addresses": subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True).stdout.split(),
        "mounts": Path("/proc/mounts").read_text().splitlines(),
        "cgroups": [str(path) for path, _, _ in os.walk("/sys/fs/cgroup")],
        "names of namespaces": [path.name for path in Path("/run/netns").glob("*")],
        "files": [path.name for path in folder.iterdir()],
        "processes": [],
    }
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and process.name != str(os.getpid()):
            found["processes"].append(words.decode(errors="replace"))
    return found


def comes_to(before: dict, folder: Path) -> bool:
    """Whether there is soon no more than there was. A process that was ended may be listed a moment longer."""
    deadline = time.monotonic() + 60
    while traces(folder) != before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files of this process and of what it starts go."""
    if lacking := networks.lacking():
        pytest.skip(lacking)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_two_hosts_with_a_slurm_leave_nothing(folder):
    before = traces(folder)
    with pytest.raises(KeyError), network() as net:
        Slurm(net)
        assert traces(folder) != before
        raise KeyError
    assert comes_to(before, folder)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_bench_that_is_ended_leaves_nothing(folder, how):
    before = traces(folder)
    bench = subprocess.Popen([PYTHON, "bench/parallel.py"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(folder.glob("heiretsu-hosts-*/birch/output.*")):
        assert bench.poll() is None
        time.sleep(0.1)
    bench.send_signal(how)
    assert bench.wait(60) != 0
    if how == signal.SIGKILL:  # nobody is left to remove the folder; all that the kernel holds goes
        (left,) = folder.glob("heiretsu-hosts-*")
        subprocess.run(["rm", "-r", left], check=True)
    assert comes_to(before, folder)
