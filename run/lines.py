"""A connection between two ranks or nodes that carries JSON, a message a line, and never blocks."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

_MOST_BYTES = 2**24  # unsent: beyond it the other side has been deaf for so long that more would only fill memory


class Line:
    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self._incoming, self._outgoing = sock, b"", b""

    def send(self, message: dict[str, Any]) -> None:
        if len(self._outgoing) < _MOST_BYTES:
            self._outgoing += json.dumps(message).encode() + b"\n"
        self.flush(0.0)

    def flush(self, seconds: float) -> None:
        """Send what is left, for so long at most."""
        deadline = time.monotonic() + seconds
        while self._outgoing:
            try:
                self._outgoing = self._outgoing[self.sock.send(self._outgoing) :]
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return
                time.sleep(0.01)
            except OSError:  # the other side's end, which is seen when reading, after what it still had to say
                return

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages that have arrived, and whether the connection still stands."""
        stands = True
        while stands:
            try:
                got = self.sock.recv(2**16)
            except BlockingIOError:
                break
            except OSError:  # reset
                got = b""
            stands = bool(got)
            self._incoming += got
        *whole, self._incoming = self._incoming.split(b"\n")
        try:
            messages = [json.loads(text) for text in whole]
        except ValueError:  # not one of ours
            return [], False
        return [message for message in messages if isinstance(message, dict)], stands

    def wait(self, deadline: float) -> dict[str, Any] | None:
        """The first message; None if the connection ends before, or time does. deadline: of time.monotonic()."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.sock, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                self.flush(0.1)
                selector.select(timeout=min(left, 1.0))
                messages, stands = self.receive()
                if messages or not stands:
                    return messages[0] if messages else None
        return None

    def close(self) -> None:
        self.flush(1.0)
        with contextlib.suppress(OSError):
            self.sock.close()


def listen(port: int = 0) -> socket.socket:
    """A socket on all addresses, IPv6 where there is any. port: 0 takes any free one."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=1024)


def arrivals(door: socket.socket, deadline: float) -> Iterator[tuple[Line, dict[str, Any] | None]]:
    """Who comes to a door that listens, and what they say, until the deadline: a line and its message; None: its end.
    A port is open to all: not everything that is said need be of ours."""
    with selectors.DefaultSelector() as selector:
        selector.register(door, selectors.EVENT_READ)
        while (seconds := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(timeout=seconds):
                if key.fileobj is door:
                    line = Line(door.accept()[0])
                    selector.register(line.sock, selectors.EVENT_READ, line)
                    continue
                messages, stands = key.data.receive()
                for message in messages:
                    yield key.data, message
                if not stands:
                    selector.unregister(key.fileobj)
                    yield key.data, None


def connect(addresses: Sequence[str], port: int, timeout: float) -> Line | None:
    """A line to the first address that answers; None if none does."""
    for address in addresses:
        with contextlib.suppress(OSError):
            return Line(socket.create_connection((address, port), timeout=timeout))
    return None
