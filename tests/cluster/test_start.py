"""What keeps hosts apart when a run starts: one line, that names it, on both, within the time that was allowed."""

import re
import time

import pytest

from heiretsu.bench.network import ADDRESSES
from tests.cluster.launching import PYTHON, TINY, ended, launch

pytestmark = pytest.mark.full

TRAIN = ["train.py", *TINY, "--dp", "2", "--max_iters", "3"]
LOOPBACK = {"alder": {"alder": "127.0.1.1", "birch": ADDRESSES["birch"]}}
LOOPBACK["birch"] = {"birch": "127.0.1.1", "alder": ADDRESSES["alder"]}


def test_hosts_whose_own_names_are_loopback_find_their_interface(net, row):
    """As Debian's installer leaves them, and with which gloo's ranks would knock at their own doors."""
    for host in net.hosts:
        host.names(LOOPBACK[host.name])
    (status, text), (other_status, other) = ended(launch(net, *TRAIN))
    assert (status, other_status) == (0, 0), text + other
    assert "host alder: gloo uses wire0" in text and "host birch: gloo uses wire0" in other
    assert "step 3/3: loss" in text
    row("names", "interface found, trained")


def test_torchrun_itself_finds_it_too(net):
    for host in net.hosts:
        host.names(LOOPBACK[host.name])
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--master_addr=alder", "--nproc_per_node=1"]
    processes = [host.start(PYTHON, *torchrun, f"--node_rank={i}", *TRAIN) for i, host in enumerate(net.hosts)]
    (status, text), (other_status, other) = ended(processes)
    assert (status, other_status) == (0, 0), text + other
    assert "step 3/3: loss" in text


MISSING = "node 1 of 2 (node 0 is alder) did not call in at alder:29500 in 8 s"
NOT_REACHED = "host birch: node 0 not reached at alder:29500 in 8 s"
CASES = {
    "cable": ({}, {}, MISSING, NOT_REACHED + " (no answer"),
    "interface": (
        {},
        {"GLOO_SOCKET_IFNAME": "eth7"},
        *["GLOO_SOCKET_IFNAME=eth7 is no interface that leads to other hosts: lo 127.0.0.1 ::1, wire0 198.18.77."] * 2,
    ),
    "loopback": (
        {"birch": ["--master_addr=localhost"]},
        {},
        MISSING,
        "host birch: --master_addr localhost resolves to 127.0.0.1, which is birch itself",
    ),
    "same rank": (
        {"birch": ["--node_rank=0"]},
        {},
        MISSING,
        "host birch has --node_rank 0, but --master_addr alder (198.18.77.1) is not it",
    ),
    "rank": (
        {"birch": ["--node_rank=2"]},
        {},
        *["host birch has --node_rank 2: of 2 it is 0 to 1"] * 2,
    ),
    "unknown name": (
        {"birch": ["--master_addr=elder"]},
        {},
        MISSING,
        "host birch: node 0 not reached at elder:29500 in 8 s",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_keeps_hosts_apart_is_one_line_on_each(net, case):
    flags, environment, here, there = CASES[case]
    if case == "cable":
        net.unplug()
    began = time.monotonic()
    processes = launch(net, *TRAIN, wait_s=8, environment=environment, flags=flags)
    for (status, text), expected in zip(ended(processes), (here, there), strict=True):
        lines = [line for line in text.splitlines() if "gloo uses" not in line]
        assert status == 2 and len(lines) == 1, text
        assert lines[0].startswith("heiretsu.run.launch: error: ") and expected in lines[0]
    assert time.monotonic() - began < 120  # 8 s, and the import of torch on a machine that has other work


def test_a_port_that_is_taken_is_one_line_on_each(net, row):
    listen = (
        "import socket, time; s = socket.create_server(('', 29500)); print('listening', flush=True); time.sleep(99)"
    )
    net.alder.start(PYTHON, "-c", listen).wait_for("listening")
    (status, text), (other_status, other) = ended(launch(net, *TRAIN, wait_s=8))
    assert (status, other_status) == (2, 2)
    assert text == "heiretsu.run.launch: error: host alder: port 29500 is taken: choose another with --master_port\n"
    does_not_answer = r".* host birch: node 0 not reached at alder:29500 in \d+ s \(what listens there does not .*\)\n"
    assert re.fullmatch(does_not_answer, other), other
    row("meeting", "one line on each host, that names it, 8 s after the start as asked")
