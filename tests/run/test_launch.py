"""Node 0 and the nodes that call in, over loopback: what each of them hears. tests/cluster has hosts and a cable."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from heiretsu.run import launch
from heiretsu.run.lines import listen

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
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # node 0 is about to listen
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=60)
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise TimeoutError("node 0 does not listen")


ONE, TWO = {"rank": 1, "name": "birch"}, {"rank": 2, "name": "elm"}


def test_all_nodes_meet_and_what_is_none_of_ours_is_passed_over(monkeypatch):
    found, heard = meeting(
        monkeypatch, b"GET / HTTP/1.1\r\n\r\n", TWO, b'{"rank": 1}\n', b'{"rank": "1", "name": "ash"}\n', ONE, nnodes=3
    )
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
    found, heard = meeting(monkeypatch, *calls, nnodes=nnodes, wait_s=2.5)
    assert re.fullmatch(rf"{re.escape(nodes)} did not call in at 127\.0\.0\.1:\d+ in 2\.5 s", found)
    assert heard == [{"problem": found}] * len(calls)


@pytest.fixture
def machine(monkeypatch):
    """A host called here, of whose names and interfaces the test says what they are."""
    told = SimpleNamespace(names={"alder": ["192.0.2.7"], "localhost": ["127.0.0.1"]}, own=["192.0.2.7"], told=[])
    monkeypatch.setattr(launch.socket, "gethostname", lambda: "here")
    monkeypatch.setattr(launch, "addresses_of", lambda name: told.names.get(name, []))
    monkeypatch.setattr(launch, "interfaces", lambda: {"lo": ["127.0.0.1"], "eth0": told.own})
    monkeypatch.setattr(launch, "_tell_gloo", told.told.append)
    return told


def test_node_0_must_run_at_the_address_that_all_are_given(machine, monkeypatch):
    with pytest.raises(ValueError) as unknown:
        launch.meet(2, 0, "elm", 29500, 1.0)
    assert str(unknown.value) == "host here: --master_addr elm resolves to nothing here"
    machine.own = ["192.0.2.8"]
    with pytest.raises(ValueError) as another:
        launch.meet(2, 0, "alder", 29500, 1.0)
    assert str(another.value) == (
        "host here has --node_rank 0, but --master_addr alder (192.0.2.7) is not it: node 0 must run there"
    )
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError) as refusal:
            launch.meet(2, 0, "localhost", port, 1.0)
    assert str(refusal.value) == f"host here: port {port} is taken: choose another with --master_port"

    def not_allowed(port):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(launch, "listen", not_allowed)
    with pytest.raises(PermissionError):
        launch.meet(2, 0, "localhost", 80, 1.0)


def test_gloo_is_told_the_way_to_the_first_node_that_came_and_what_it_cannot_be_told_ends_all(machine, monkeypatch):
    def refuse(route_to):
        machine.told.append(route_to)
        raise ValueError("no way out")

    for tell, problem in ((machine.told.append, None), (refuse, "no way out")):
        monkeypatch.setattr(launch, "_tell_gloo", tell)
        with listen() as free:
            port = free.getsockname()[1]
        found = []
        node_0 = threading.Thread(target=lambda p=port, f=found: f.append(launch.meet(2, 0, "localhost", p, 60.0)))
        node_0.start()
        with connect(port) as caller:
            caller.sendall(b'{"rank": 1, "name": "birch"}\n')
            assert json.loads(caller.makefile().readline()) == {"problem": problem}
        node_0.join(60)
        assert found == [problem]
    assert machine.told == ["127.0.0.1"] * 2


def called(machine, answer: bytes | None, wait_s: float = 60.0, address: str = "localhost"):
    """What node 2 hears of whoever listens, and what that was told. answer: None says nothing, and goes."""
    machine.names["localhost"] = ["192.0.2.9"]  # as if it were another machine
    with listen() as door:
        said = []

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection = door.accept()[0]
                    said.append(connection.makefile().readline())
                    connection.sendall(answer or b"")
                    connection.close()

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        try:
            heard = launch.meet(3, 2, address, door.getsockname()[1], wait_s)
        except ValueError as error:
            heard = error
        return heard, [json.loads(line) for line in said], door.getsockname()[1]


@pytest.mark.parametrize("problem", [None, "hosts ash and elm both have --node_rank 2"])
def test_a_node_calls_in_with_its_name_and_hears_how_it_went(machine, problem):
    heard, said, _ = called(machine, json.dumps({"problem": problem}).encode() + b"\n")
    assert heard == problem and said == [{"rank": 2, "name": "here", "problem": None}]
    assert machine.told == ["localhost"]  # the way to node 0


def test_a_node_that_cannot_take_part_says_so_to_node_0(machine, monkeypatch):
    def refuse(route_to):
        raise ValueError("host here: no way out")

    monkeypatch.setattr(launch, "_tell_gloo", refuse)
    heard, said, _ = called(machine, b'{"problem": "host here: no way out"}\n')
    assert heard == said[0]["problem"] == "host here: no way out"


@pytest.mark.parametrize("answer", [None, b'{"other": 1}\n', b"HTTP/1.1 400 Bad Request\r\n"])
def test_what_is_not_node_0_is_asked_again_until_time_is_up(machine, answer):
    heard, said, port = called(machine, answer, wait_s=1.2)
    why = "what listens there does not answer as node 0 does"
    assert re.fullmatch(rf"host here: node 0 not reached at localhost:{port} in \d s \({why}\)", str(heard))
    assert 2 <= len(said) <= 8


@pytest.mark.parametrize(
    "error, why",
    [
        (TimeoutError("timed out"), "no answer: is it down, or the cable, or a firewall between?"),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (OSError("odd"), "odd"),
    ],
)
def test_a_node_0_that_cannot_be_reached_is_named_with_the_reason(machine, monkeypatch, error, why):
    clock, asked = SimpleNamespace(now=50.0), []

    def create_connection(place, timeout):
        asked.append((place, round(timeout, 6)))
        raise error

    monkeypatch.setattr(launch.socket, "create_connection", create_connection)
    monkeypatch.setattr(
        launch,
        "time",
        SimpleNamespace(monotonic=lambda: clock.now, sleep=lambda s: setattr(clock, "now", clock.now + s)),
    )
    with pytest.raises(ValueError) as missed:
        launch.meet(2, 1, "alder", 29500, 0.5)
    assert str(missed.value) == f"host here: node 0 not reached at alder:29500 in 0 s ({why})"
    place = ("alder", 29500)
    assert asked == [(place, 0.5), (place, 0.3), (place, 0.1)] and clock.now == pytest.approx(50.5)
    with pytest.raises(ValueError) as missed:
        launch.meet(2, 1, "alder", 29500, 0.0)
    assert str(missed.value).endswith("alder:29500 in 0 s (the name alder resolves to nothing)")


def test_an_answer_is_waited_for_twice_as_long_as_there_is_time(machine, monkeypatch):
    """Node 0 waits as long as this one, and may have begun as much later."""
    waited = []

    class Deaf(SimpleNamespace):
        def send(self, message):
            clock.now += 1.0

        def wait(self, deadline):
            waited.append(deadline)
            return {"problem": None}

        def close(self):
            waited.append("closed")

    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(launch.socket, "create_connection", lambda place, timeout: None)
    monkeypatch.setattr(launch, "Line", lambda sock: Deaf())
    assert launch.meet(2, 1, "alder", 29500, 10.0) is None
    assert waited == [71.0, "closed"]


def test_an_address_of_node_0_that_is_this_machine_itself_is_refused_elsewhere(machine):
    machine.names["alder"] = ["127.0.1.1", "192.0.2.7"]
    with pytest.raises(ValueError) as refusal:
        launch.meet(2, 1, "alder", 29500, 1.0)
    assert str(refusal.value) == (
        "host here: --master_addr alder resolves to 127.0.1.1, which is here itself, not node 0: give an address by "
        "which node 0 is reached from here, or mend /etc/hosts"
    )


def test_gloo_is_told_in_the_environment_and_in_a_line(monkeypatch, capsys):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    asked, answers = [], [None, "ib0"]

    def find_interface(environment, route_to):
        asked.append((environment is os.environ, route_to))
        return answers.pop(0)

    monkeypatch.setattr(launch, "find_interface", find_interface)
    monkeypatch.setattr(launch.socket, "gethostname", lambda: "here")
    launch._tell_gloo("alder")
    assert "GLOO_SOCKET_IFNAME" not in os.environ and capsys.readouterr().out == ""
    launch._tell_gloo("alder")
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "ib0" and asked == [(True, "alder")] * 2
    assert capsys.readouterr().out == "heiretsu.run.launch: host here: gloo uses ib0\n"


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun's own `run` and this file's `meet`, which do what the test says: return it, or raise it."""
    did = SimpleNamespace(met=[], ran=[], meet=None, run=None)

    def do(kept, outcome, *what):
        kept.append(what)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(launch, "meet", lambda *where: do(did.met, did.meet, *where))
    monkeypatch.setattr("torch.distributed.run.run", lambda args: do(did.ran, did.run, args))
    return did


def test_several_nodes_meet_before_torchrun_starts_and_one_has_nobody_to_meet(torchrun):
    launch.main("--nnodes=2 --node_rank=1 --master_addr=alder-X --nproc_per_node=8 train.py --dp 16".split())
    launch.main("--nnodes=1:3 --node_rank=0 --master_addr=[::1] --master_port=7 --wait_s 2.5 train.py".split())
    launch.main("--nnodes=1 --nproc_per_node=8 train.py --wait_s_of_mine".split())
    assert torchrun.met == [(2, 1, "alder-X", 29500, 300.0), (3, 0, "::1", 7, 2.5)]
    assert [args.training_script for (args,) in torchrun.ran] == ["train.py"] * 3
    assert torchrun.ran[0][0].training_script_args == ["--dp", "16"]


@pytest.mark.parametrize("outcome", ["host elm: no way out", ValueError("host elm: no way out")])
def test_a_meeting_that_fails_is_one_line_and_status_2(torchrun, capsys, outcome):
    torchrun.meet = outcome
    with pytest.raises(SystemExit) as stop:
        launch.main("--nnodes=2 --node_rank=1 --master_addr=alder train.py".split())
    assert stop.value.code == 2 and torchrun.ran == []
    assert capsys.readouterr().err == "heiretsu.run.launch: error: host elm: no way out\n"


def test_how_torchrun_ends_is_said_and_is_the_status(torchrun, capsys):
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    class Failed(ChildFailedError):
        def __init__(self):
            pass

        def __str__(self):
            return "rank 3 failed"

    for ended, status in ((SignalException("", signal.SIGTERM), 128 + 15), (Failed(), 1)):
        torchrun.run = ended
        with pytest.raises(SystemExit) as stop:
            launch.main("--nnodes=2 --node_rank=1 --master_addr=alder train.py".split())
        assert stop.value.code == status
    said = capsys.readouterr()
    assert said.out == "heiretsu.run.launch: node 1 was ended by SIGTERM\n" and said.err == "rank 3 failed\n"


def test_a_flag_is_not_shortened_and_a_wrong_wait_is_refused(torchrun, capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(["--wait_s", "long", "train.py"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "python -m heiretsu.run.launch: error: argument --wait_s: invalid float" in said
    with pytest.raises(SystemExit):
        launch.main(["--wait", "3", "train.py"])
    with pytest.raises(SystemExit):
        launch.main(["--help"])  # torchrun's
    assert "--nnodes" in capsys.readouterr().out
