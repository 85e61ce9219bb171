"""A connection that carries JSON and never blocks: what arrives, what is left, and how it ends."""

import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from heiretsu.run import lines
from heiretsu.run.lines import Line, arrivals, connect, listen


@pytest.fixture
def pair():
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair()
        yield Line(stack.enter_context(ours)), stack.enter_context(theirs)


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


def test_messages_come_whole_however_they_are_cut(pair):
    line, there = pair
    assert line.receive() == ([], True)
    there.sendall(b'{"a": 1}\n{"b"')
    assert line.receive() == ([{"a": 1}], True)
    there.sendall(b': [2, null]}\n[3]\n{"c": 4}\n')
    assert line.receive() == ([{"b": [2, None]}, {"c": 4}], True)
    there.sendall(b'{"last": true}\nhalf')
    there.close()
    assert line.receive() == ([{"last": True}], False)
    assert line.receive() == ([], False)


def test_what_is_no_json_is_the_end_of_the_line(pair):
    line, there = pair
    there.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert line.receive() == ([], False)


def test_a_deaf_other_side_costs_no_more_memory_than_the_most(monkeypatch):
    def send(data):
        raise BlockingIOError

    line = Line(SimpleNamespace(setblocking=lambda on: None, setsockopt=lambda *a: None, send=send))
    monkeypatch.setattr(lines, "_MOST_BYTES", 10)
    line.send({"a": 1})
    line.send({"b": 2})
    line.send({"c": 3})
    assert line._outgoing == b'{"a": 1}\n{"b": 2}\n'
    monkeypatch.setattr(lines, "_MOST_BYTES", 18)  # what is there
    line.send({"d": 4})
    assert line._outgoing == b'{"a": 1}\n{"b": 2}\n'


def test_a_long_message_arrives_whole(pair):
    line, there = pair
    long, heard, other = {"x": "y" * 2**20}, [], Line(there)
    reader = threading.Thread(target=lambda: heard.append(other.wait(soon())), daemon=True)
    reader.start()
    line.send(long)
    line.flush(30.0)
    reader.join(30)
    assert heard == [long] and line._outgoing == b""


def test_most_bytes_are_sixteen_mebibytes():
    assert lines._MOST_BYTES == 16 * 2**20


def test_flushing_ends_with_its_time_and_with_the_other_side(monkeypatch):
    clock = SimpleNamespace(now=0.0, slept=[])
    fake = SimpleNamespace(
        monotonic=lambda: clock.now, sleep=lambda s: (clock.slept.append(s), setattr(clock, "now", clock.now + s))
    )
    monkeypatch.setattr(lines, "time", fake)
    answers = []

    def send(data):
        answer = answers.pop(0) if answers else BlockingIOError()
        if isinstance(answer, Exception):
            raise answer
        return answer

    deaf = SimpleNamespace(setblocking=lambda on: None, setsockopt=lambda *a: None, send=send, close=lambda: None)
    line = Line(deaf)
    line.send({"a": 1})  # tried once
    assert clock.slept == [] and line._outgoing == b'{"a": 1}\n'
    line.flush(0.025)
    assert clock.slept == [0.01] * 3 and line._outgoing == b'{"a": 1}\n'
    answers += [4, BlockingIOError(), 5]
    line.flush(1.0)
    assert line._outgoing == b"" and clock.slept == [0.01] * 4
    answers += [ConnectionResetError()]
    line.send({"b": 2})
    assert clock.slept == [0.01] * 4 and line._outgoing == b'{"b": 2}\n'
    line.close()
    assert sum(clock.slept[4:]) == pytest.approx(1.0, abs=0.011)


def test_waiting_gives_the_first_message_or_none_at_the_end_of_the_line_or_of_time(pair):
    line, there = pair
    assert line.wait(soon(0.05)) is None and line.wait(time.monotonic() - 1) is None
    there.sendall(b'{"first": 1}\n{"second": 2}\n')
    assert line.wait(soon()) == {"first": 1}
    late = threading.Timer(0.05, lambda: there.sendall(b'{"late": 1}\n'))
    late.start()
    assert line.wait(soon()) == {"late": 1}
    late.join()
    there.close()
    began = time.monotonic()
    assert line.wait(soon()) is None and time.monotonic() - began < 20


def test_a_line_neither_waits_for_more_to_send_nor_blocks():
    door = listen()
    with door, connect(["127.0.0.1"], door.getsockname()[1], 30.0).sock as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) and not sock.getblocking()


def test_the_first_address_that_answers_is_taken():
    with listen() as door:
        port = door.getsockname()[1]
        line = connect(["no.such.host.invalid", "127.0.0.1"], port, 30.0)
        assert line.sock.getpeername()[1] == port
        line.close()
        assert line.sock.fileno() == -1
    assert connect(["127.0.0.1"], port, 30.0) is None and connect([], port, 30.0) is None


def test_a_port_that_is_asked_for_is_taken_on_all_addresses_and_once():
    with listen() as free:
        port = free.getsockname()[1]
        assert free.getsockname()[0] in ("::", "0.0.0.0")
        with pytest.raises(OSError, match="[Aa]ddress already in use"):
            listen(port)
    with listen(port) as door:
        assert door.getsockname()[1] == port


def test_without_ipv6_there_is_ipv4(monkeypatch):
    monkeypatch.setattr(lines.socket, "has_dualstack_ipv6", lambda: False)
    with listen() as door:
        assert door.family == socket.AF_INET
    monkeypatch.undo()
    real = socket.create_server

    def no_ipv6(address, **how):
        if how.get("family") == socket.AF_INET6:
            raise OSError("no IPv6")
        return real(address, **how)

    monkeypatch.setattr(lines.socket, "has_dualstack_ipv6", lambda: True)
    monkeypatch.setattr(lines.socket, "create_server", no_ipv6)
    with listen() as door:
        assert door.family == socket.AF_INET


def test_a_door_has_room_for_a_thousand_that_come_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(lines.socket, "create_server", lambda address, **how: asked.append((address, how)))
    for both in (True, False):
        monkeypatch.setattr(lines.socket, "has_dualstack_ipv6", lambda both=both: both)
        listen(7)
    dual = {"family": socket.AF_INET6, "backlog": 1024, "dualstack_ipv6": True}
    assert asked == [(("", 7), dual), (("", 7), {"backlog": 1024})]


def test_who_comes_to_a_door_is_heard_each_on_a_line_of_their_own_and_so_is_their_end():
    with listen() as door:
        port = door.getsockname()[1]
        coming = arrivals(door, soon())
        with socket.create_connection(("127.0.0.1", port)) as one, socket.create_connection(("127.0.0.1", port)) as two:
            one.sendall(b'{"one": 1}\n{"one": 2}\n')
            (first, said), (again, more) = next(coming), next(coming)
            assert (said, more) == ({"one": 1}, {"one": 2}) and first is again
            two.sendall(b'{"two": 1}\n')
            second, said = next(coming)
            assert said == {"two": 1} and second is not first
            one.close()
            assert next(coming) == (first, None)
            second.send({"heard": True})
            assert two.recv(99) == b'{"heard": true}\n'
        assert next(coming) == (second, None)
        assert list(arrivals(door, soon(0.05))) == [] == list(arrivals(door, time.monotonic()))
