"""A connection between two ranks that carries JSON, a message a line, and never blocks."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Sequence
from typing import Any

from heiretsu.run.interfaces import source_address

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
        # An error here is the other side's end, which is seen when reading, after what it still had to say.
        with contextlib.suppress(OSError):
            self._outgoing = self._outgoing[self.sock.send(self._outgoing) :]

    def flush(self, seconds: float) -> None:
        """Send what is left, for so long at most."""
        deadline = time.monotonic() + seconds
        while self._outgoing and time.monotonic() < deadline:
            try:
                self._outgoing = self._outgoing[self.sock.send(self._outgoing) :]
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
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

    def close(self) -> None:
        self.flush(1.0)
        with contextlib.suppress(OSError):
            self.sock.close()


def own_address(towards: str) -> str:
    """This machine's address on the network where `towards`, another machine or this one, is found."""
    return source_address(towards) or socket.gethostname()


def listen() -> socket.socket:
    """A socket on any free port of all addresses, IPv6 where there is any."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)


def connect(addresses: Sequence[str], port: int, timeout: float) -> Line | None:
    """A line to the first address that answers; None if none does."""
    for address in addresses:
        with contextlib.suppress(OSError):
            return Line(socket.create_connection((address, port), timeout=timeout))
    return None
