"""The watch's own books; what it does to a run is in tests/faults."""

import selectors
import socket
import time
from types import SimpleNamespace

from heiretsu.run.lines import Line
from heiretsu.run.watch import Peer, Watch


def test_a_rank_that_has_left_is_not_listened_to_any_more():
    """Its line stays readable for ever: the thread would do nothing but look at it."""
    here, there = socket.socketpair()
    peer = Peer(1, "birch", Line(here), since=time.monotonic(), heard=time.monotonic())
    with selectors.DefaultSelector() as selector:
        selector.register(here, selectors.EVENT_READ, peer)
        there.close()
        assert [key.data for key, _ in selector.select(timeout=0)] == [peer]
        watch = SimpleNamespace(_selector=selector, peers=[peer])
        Watch._forget(watch, peer)
        assert selector.select(timeout=0) == [] and watch.peers == []
    here.close()


def test_only_a_beat_that_moved_makes_a_rank_younger():
    peer = Peer(1, "birch", None, since=0.0, heard=0.0)
    peer.hear({"moves": 4, "doing": "step 1", "waits": False})
    first = peer.since
    assert first > 0
    peer.hear({"moves": 4, "doing": "step 1", "waits": True})
    assert peer.since == first and peer.heard >= first and peer.waits
    peer.hear({"moves": 5, "doing": "step 2", "waits": False})
    assert peer.since >= first and peer.doing == "step 2"
