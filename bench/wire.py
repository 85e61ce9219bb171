"""What a step sends to other ranks: bytes, by what it calls, and the time for which it waits for them.

Counted is what leaves this rank, as the algorithms need it at least: of an all-reduce of n bytes over k ranks
2 n (k - 1) / k, of an all-gather n (k - 1), of an all-to-all what is not for oneself.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class BytesSent(TorchDispatchMode):
    """bytes, by the name of the collective, of all that this thread calls while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            self.bytes[name.strip("_")] += bytes_sent(name.strip("_"), args)
        return func(*args, **(kwargs or {}))


def bytes_sent(name: str, args: tuple) -> int:
    """By this rank, for one call of a c10d operator. ValueError for one that the engine has not used so far."""
    group = next(group for arg in args if (group := _as_group(arg)) is not None)
    ranks = group.size()
    if name == "allreduce":
        return sum(tensor.nbytes for tensor in args[0]) * 2 * (ranks - 1) // ranks
    if name == "alltoall_base":
        _, sent, _, _, counts = args[:5]
        own = counts[group.rank()] / max(1, sum(counts)) if counts else 1 / ranks
        return round(sent.nbytes * (1 - own))
    if name == "allgather":
        return sum(tensor.nbytes for tensor in args[1]) * (ranks - 1)
    if name == "send":
        return sum(tensor.nbytes for tensor in args[0])
    if name in ("recv", "recv_any_source", "barrier"):
        return 0
    raise ValueError(f"no count of the bytes of c10d::{name}: write one")


def _as_group(arg) -> dist.ProcessGroup | None:
    with contextlib.suppress(Exception):
        return dist.ProcessGroup.unbox(arg)
    return None


class Waiting:
    """seconds: for which this process has waited for messages, in `waiting`'s block."""

    seconds = 0.0


@contextlib.contextmanager
def waiting() -> Iterator[Waiting]:
    """Clock every wait for a message in the block. Blocking collectives wait for their work like any other."""
    work, found = torch._C._distributed_c10d.Work, Waiting()
    wait = work.wait

    def timed(self, *args):
        began = time.perf_counter()
        try:
            return wait(self, *args)
        finally:
            found.seconds += time.perf_counter() - began

    with patch.object(work, "wait", timed):
        yield found
