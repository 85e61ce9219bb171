"""The watch: each rank knows what the others are doing, so that a lost or stuck rank is named and no rank waits for it.

Every rank has kept its connection to rank 0 from the roll call, and has one thread that tends it. That thread works
while the main one is blocked in a collective, and needs neither the store nor the collectives' own connections, which
may be what failed.

    beats       each rank says every second what it is doing; rank 0 answers with what it is doing itself
    lost        the connection ends without a goodbye: the system closes it in the moment in which a process dies
    stuck       a rank has waited for the others for --timeout: rank 0 says whom for, by what was last heard of each
    silent      no beat for longer than --timeout, whatever this rank is doing: a machine or the cable to it is gone

A rank that ends for one of these prints one line and leaves at once with status LOST, whatever its main thread is in.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from heiretsu.parallel.activity import ACTIVITY
from heiretsu.run.lines import Line
from heiretsu.run.roll_call import Assembly

FAILED, GAVE_UP, LOST = 1, 3, 4  # exit statuses, beside 2 for what is refused; GAVE_UP: on its numbers
BEAT_S = 1.0
SILENT_S = 5.0  # without a beat for so long, a rank does not run, or cannot be reached
GRACE_S = 5.0  # for a verdict of rank 0, or for the main thread to end by itself


@dataclass
class Peer:
    """What this rank knows of another; those that it has no line to, it knows nothing of."""

    rank: int
    host: str
    line: Line | None  # None: this rank itself
    since: float  # time.monotonic() when it was last seen to move
    heard: float
    doing: str = "the start"
    waits: bool = False
    moves: int | None = None

    def hear(self, beat: dict[str, Any]) -> None:
        self.heard = now = time.monotonic()
        if beat["moves"] != self.moves:
            self.since = now
        self.moves, self.doing, self.waits = beat["moves"], beat["doing"], beat["waits"]


class Watch:
    """This rank's part. timeout: seconds that a rank may wait for the others. name: this rank in words."""

    def __init__(self, assembly: Assembly, timeout: float, name: str):
        self.rank, self.timeout, self.host = assembly.rank, timeout, assembly.hosts[assembly.rank]
        self.name = f"{name} on {self.host}"
        now = time.monotonic()
        self.peers = [Peer(r, assembly.hosts[r], line, since=now, heard=now) for r, line in assembly.lines.items()]
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        self._ending: dict[str, Any] | None = None
        self._verdict_due: float | None = None  # once this rank has waited for too long
        self._once = threading.Lock()
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        for peer in self.peers:
            self._selector.register(peer.line.sock, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    # The watching thread

    def _run(self) -> None:
        next_beat = before = time.monotonic()
        while self._ending is None:
            now = time.monotonic()
            if now - before > SILENT_S:  # this process was stopped, as when its job is suspended: it heard nobody
                for peer in self.peers:
                    peer.heard = now
            before = now
            if now >= next_beat:
                self._beat()
                next_beat = now + BEAT_S
            self._look_at_the_clock(now)
            for key, _ in self._selector.select(timeout=BEAT_S / 4):
                if key.fileobj is not self._wake_out:
                    self._hear(key.data)
        self._tell(self._ending)
        for peer in self.peers:
            peer.line.close()

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self.peers:
            peer.line.send(message)

    def _beat(self) -> None:
        waits = any(place.waits for place in list(ACTIVITY.places))
        self._tell({"doing": ACTIVITY.last_place(), "waits": waits, "moves": ACTIVITY.moves})

    def _hear(self, peer: Peer) -> None:
        messages, open_ = peer.line.receive()
        for message in messages:
            if "doing" in message:
                peer.hear(message)
            elif "bye" in message:
                self._forget(peer)
            elif "failed" in message:
                self._forget(peer)
                self._over(f"{_named(peer)} {message['failed']}", GRACE_S)
            elif "stuck" in message and self.rank == 0:
                self._over(self._who_is_stuck(), 0.0)
            elif "over" in message:
                self._end(message["over"], message["grace"])
        if not open_ and peer in self.peers:
            self._over(f"lost {_named(peer)}", 0.0)

    def _forget(self, peer: Peer) -> None:
        self.peers.remove(peer)
        self._selector.unregister(peer.line.sock)

    def _over(self, why: str, grace: float) -> None:
        """Rank 0 tells all; any rank that sees it by itself ends."""
        if self.rank == 0:
            self._tell({"over": why, "grace": grace})
        self._end(why, grace)

    def _end(self, why: str, grace: float) -> None:
        """Print the line and leave. grace: seconds for the main thread to end by itself first."""
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if self._ending is not None:
                return
        waited = ACTIVITY.waiting_s()
        place = f"while in {ACTIVITY.last_place()}" + (f" for {waited:.0f} s" if waited > 2 else "")
        self._leave(f"{self.name}: {why}, {place}", LOST)

    def _leave(self, line: str, status: int) -> NoReturn:
        with self._once:  # one line, and no other thread beyond it
            print(line, file=sys.stderr)
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(status)

    def _look_at_the_clock(self, now: float) -> None:
        """Has this rank waited for too long? Rank 0 judges; where it does not answer, that is the verdict. And is
        somebody silent, while this rank waits for nobody? It may, for instance, be about to end a save."""
        if any(now - peer.heard > self.timeout + SILENT_S for peer in self.peers):
            self._over(self._who_is_stuck(), 0.0)
        if self._verdict_due is not None:
            if now > self._verdict_due or any(now - peer.heard > SILENT_S for peer in self.peers):
                self._end(self._who_is_stuck(), 0.0)
        elif ACTIVITY.waiting_s() >= self.timeout:
            self._verdict_due = now + GRACE_S
            if self.rank == 0:
                self._over(self._who_is_stuck(), 0.0)
            self._tell({"stuck": True})

    def _who_is_stuck(self) -> str:
        """By what was last heard: ranks that are silent, else those that wait for nobody, else all, each with what it
        waits in."""
        now = time.monotonic()
        silent = [peer for peer in self.peers if now - peer.heard > SILENT_S]
        if silent:
            said = [
                f"{_named(p)} has not been heard of for {now - p.heard:.0f} s, last heard in {p.doing}" for p in silent
            ]
            return "; ".join(said)
        me = Peer(self.rank, self.host, None, now, now, ACTIVITY.last_place())
        everyone = sorted([me, *self.peers], key=lambda peer: peer.rank)
        busy = [peer for peer in everyone if not peer.waits and now - peer.since > self.timeout / 2]
        if busy:
            return "; ".join(f"{_named(p)} has been in {p.doing} for {now - p.since:.0f} s" for p in busy)
        places: dict[str, list[str]] = {}
        for peer in everyone:
            places.setdefault(peer.doing, []).append(str(peer.rank))
        return "all ranks wait: " + "; ".join(f"rank {', '.join(ranks)} in {doing}" for doing, ranks in places.items())

    # What the main thread calls

    def close(self, failed: str = "") -> None:
        """Say goodbye; or say why this rank ends, and the others will end too."""
        self._ending = {"failed": failed} if failed else {"bye": True}
        with contextlib.suppress(OSError):
            self._wake_in.send(b".")
        self._thread.join(GRACE_S)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process for an exception, at once: destroying the process groups may wait for peers that never
        answer. An exception out of a collective may come of another rank's end, which the watching thread knows."""
        if ACTIVITY.failed_waiting:
            time.sleep(2 * GRACE_S)  # the watching thread may wait GRACE_S for this one before it speaks
        with self._once:
            print(f"{self.name}: failed in {ACTIVITY.last_place()}", file=sys.stderr)
            traceback.print_exception(error)
            sys.stdout.flush()
            self.close(failed=f"raised {type(error).__name__}: {str(error)[:500]}")
            os._exit(FAILED)


@contextlib.contextmanager
def watched(assembly: Assembly, timeout: float, name: str) -> Iterator[None]:
    """Watch for as long as the block runs, and take what it raises; for all that the ranks do together."""
    watch = Watch(assembly, timeout, name)
    try:
        yield
    except SystemExit as stop:
        watch.close(failed=f"ended with status {stop.code}" if stop.code else "")
        raise
    except BaseException as error:
        watch.fail(error)
    watch.close()


def _named(peer: Peer) -> str:
    return f"rank {peer.rank} on {peer.host}"
