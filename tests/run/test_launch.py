"""Node 0 and the nodes that call in, over loopback: what each of them hears. tests/cluster has hosts and a cable."""

import json
import re
import socket
import threading

import pytest

from heiretsu.run import launch

HERE = socket.gethostname()


def meeting(monkeypatch, *calls: bytes | dict, nnodes: int, wait_s: float = 60.0) -> tuple[str | None, list[dict]]:
    """What node 0 makes of these calls, one after the other, and what each caller hears."""
    monkeypatch.setattr(launch, "_tell_gloo", lambda route_to: None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found: list[str | None] = []
    node_0 = threading.Thread(
        target=lambda: found.append(launch.meet(nnodes, 0, "127.0.0.1", port, wait_s)), daemon=True
    )
    node_0.start()
    callers = []
    for call in calls:
        callers.append(connect(port))
        callers[-1].sendall(call if isinstance(call, bytes) else json.dumps({"problem": None, **call}).encode() + b"\n")
        if isinstance(call, bytes):
            callers.pop().close()
    heard = [json.loads(caller.makefile().readline()) for caller in callers]
    node_0.join(60)
    return found[0], heard


def connect(port: int) -> socket.socket:
    while True:  # node 0 is about to listen
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=60)
        except ConnectionRefusedError:
            pass


ONE, TWO = {"rank": 1, "name": "birch"}, {"rank": 2, "name": "elm"}


def test_all_nodes_meet_and_what_is_none_of_ours_is_passed_over(monkeypatch):
    found, heard = meeting(monkeypatch, b"GET / HTTP/1.1\r\n\r\n", TWO, b'{"rank": 1}\n', ONE, nnodes=3)
    assert found is None
    assert heard == [{"problem": None}] * 2


@pytest.mark.parametrize(
    "calls, problem",
    [
        ([{"rank": 3, "name": "ash"}], "host ash has --node_rank 3: of 3 it is 0 to 2"),
        ([{"rank": -1, "name": "ash"}], "host ash has --node_rank -1: of 3 it is 0 to 2"),
        ([{"rank": 0, "name": "ash"}], f"hosts {HERE} and ash both have --node_rank 0"),
        ([TWO, {"rank": 2, "name": "ash"}], "hosts elm and ash both have --node_rank 2"),
        ([{**TWO, "problem": "host elm: no interface"}], "host elm: no interface"),
    ],
)
def test_what_is_wrong_with_one_is_told_to_all(monkeypatch, calls, problem):
    found, heard = meeting(monkeypatch, *calls, nnodes=3)
    assert found == problem
    assert heard == [{"problem": problem}] * len(calls)


@pytest.mark.parametrize(
    "calls, nnodes, nodes",
    [
        ([], 2, f"node 1 of 2 (node 0 is {HERE})"),
        ([TWO], 4, f"nodes 1, 3 of 4 (node 0 is {HERE}, node 2 is elm)"),
    ],
)
def test_who_does_not_come_is_named_after_the_wait(monkeypatch, calls, nnodes, nodes):
    found, heard = meeting(monkeypatch, *calls, nnodes=nnodes, wait_s=0.5)
    assert re.fullmatch(rf"{re.escape(nodes)} did not call in at 127\.0\.0\.1:\d+ in 0\.5 s", found)
    assert heard == [{"problem": found}] * len(calls)
