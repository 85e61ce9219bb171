"""The roll call: all ranks report to rank 0 before they do anything together.

A rank that does not come, cannot run, was started differently or does not see the folder where the run is saved is
named, on every rank, while no collective exists that could wait for it. Ranks find rank 0 by the store that torchrun
gives them. After a restart that store still holds what the last generation of ranks wrote, addresses of dead
processes among it: so everything is asked again until a living rank 0 answers, and what torch keeps there goes under a
prefix of this generation's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from heiretsu.run.interfaces import source_address
from heiretsu.run.lines import Line, arrivals, connect, listen

_KEY = "heiretsu/roll call"
_CONNECT_S = 5.0
_VISIBLE_S = 5.0  # for a file to be seen on another node, whose file system may still show what it knew before


@dataclass(frozen=True)
class Report:
    """What a rank brings to the roll call. facts: JSON, compared with those of the others. refused: why it cannot run,
    if so. folder: where the run is saved, if anywhere; all ranks must see the same one."""

    facts: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    folder: str | None = None


@dataclass(frozen=True)
class Assembly:
    """What comes of it. hosts: by rank. lines: to the other ranks, on rank 0; to rank 0, on the others. refused: one
    line if the run cannot be."""

    rank: int
    hosts: list[str]
    lines: dict[int, Line]
    token: str
    refused: str


def assemble(rank: int, world_size: int, timeout: float, mine: Report) -> tuple[Assembly, dist.Store]:
    """This rank's part in the roll call, and the store for the process group, with this generation's prefix.

    Raises ValueError if rank 0 or the store does not answer within timeout seconds.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise ValueError(f"{world_size} ranks meet at MASTER_ADDR and MASTER_PORT, which are not set: use torchrun")
    # As torch's own rendezvous does it, but rank 0 does not wait here for the others: who is late is to be named.
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=timeout)
    try:
        store = dist.TCPStore(address, int(port), None, is_host, limit, wait_for_workers=False, multi_tenant=is_host)
    except dist.DistError as error:
        raise ValueError(
            f"rank {rank} on {socket.gethostname()} did not find the store at {address}:{port} within {timeout:.0f} s "
            f"(--timeout): {str(error).splitlines()[0]}"
        ) from error
    assembly = roll_call_over(store, rank, world_size, timeout, mine)
    return assembly, dist.PrefixStore(assembly.token, store)


def roll_call_over(store: dist.Store, rank: int, world_size: int, timeout: float, mine: Report) -> Assembly:
    """The roll call of ranks that share this store."""
    deadline = time.monotonic() + timeout
    if rank == 0:
        return _call(store, world_size, deadline, timeout, mine)
    try:
        return _answer(store, rank, deadline, timeout, mine)
    except (dist.DistError, RuntimeError) as error:  # HashStore and FileStore raise the latter for a time-out
        raise ValueError(
            f"rank {rank} on {socket.gethostname()} did not find rank 0 within {timeout:.0f} s (--timeout)"
        ) from error


def _call(store: dist.Store, world_size: int, deadline: float, timeout: float, mine: Report) -> Assembly:
    """Rank 0: wait for all, compare, answer."""
    token, host = secrets.token_hex(8), socket.gethostname()
    lines: dict[int, Line] = {}
    said: dict[int, dict[str, Any]] = {}
    left: list[int] = []  # ranks that were here and are not any more
    with listen() as door, _mark(mine.folder, token) as refused:
        master = os.environ.get("MASTER_ADDR", host)
        addresses = [source_address(master) or host, master, host]
        store.set(_KEY, json.dumps({"token": token, "addresses": addresses, "port": door.getsockname()[1]}))
        for line, hello in arrivals(door, deadline):
            if hello is None:
                left = [rank for rank in lines if lines[rank] is line]
            elif hello.get("token") == token:
                lines[hello["rank"]], said[hello["rank"]] = line, hello
            if left or len(lines) == world_size - 1:
                break
    hosts = [host] + [said[rank]["host"] if rank in said else "?" for rank in range(1, world_size)]
    refused = refused or mine.refused
    for rank, hello in sorted(said.items()):
        if hello["refused"]:
            refused = refused or f"rank {rank} on {hosts[rank]}: {hello['refused']}"
    if left:
        refused = refused or f"rank {left[0]} on {hosts[left[0]]} was lost while the others were waited for"
    if absent := [rank for rank in range(1, world_size) if rank not in said]:
        refused = refused or f"rank {', '.join(map(str, absent))} did not come within {timeout:.0f} s (--timeout)"
    refused = refused or disagreement([mine.facts] + [said[rank]["facts"] for rank in sorted(said)])
    for rank, hello in sorted(said.items()):
        if not hello["sees"]:
            refused = refused or (
                f"rank {rank} on {hosts[rank]} does not see what rank 0 on {host} wrote into --checkpoint_dir "
                f"{hello['folder']}: all ranks need one folder on a file system that they share"
            )
    for line in lines.values():
        line.send({"token": token, "hosts": hosts, "refused": refused})
    for line in lines.values():
        line.flush(_CONNECT_S)
    return Assembly(0, hosts, lines, token, refused)


def disagreement(by_rank: Sequence[dict[str, Any]]) -> str:
    """How the facts of the first rank that differs from rank 0 differ; "" if none do."""
    for rank, theirs in enumerate(by_rank):
        names = [name for name in by_rank[0] | theirs if theirs.get(name) != by_rank[0].get(name)]
        if names:
            said = ", ".join(f"{name} {theirs.get(name)} (rank 0: {by_rank[0].get(name)})" for name in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return f"rank {rank} has {said}{more}: all ranks of a run must be started alike"
    return ""


def _answer(store: dist.Store, rank: int, deadline: float, timeout: float, mine: Report) -> Assembly:
    """The other ranks: find rank 0, report, hear."""
    while time.monotonic() < deadline:
        place = json.loads(store.get(_KEY))  # perhaps the last generation's, whose rank 0 does not answer any more
        line = connect(place["addresses"], place["port"], _CONNECT_S)
        if line is not None:
            hello = {"token": place["token"], "rank": rank, "host": socket.gethostname(), "facts": mine.facts}
            sees = _sees(mine.folder, place["token"])
            line.send({**hello, "refused": mine.refused, "sees": sees, "folder": mine.folder})
            heard = line.wait(deadline + _CONNECT_S)
            if heard is not None and heard.get("token") == place["token"]:
                return Assembly(rank, heard["hosts"], {0: line}, place["token"], heard["refused"])
            line.close()
        time.sleep(0.1)
    raise ValueError(f"rank {rank} on {socket.gethostname()}: rank 0 did not answer within {timeout:.0f} s (--timeout)")


@contextlib.contextmanager
def _mark(folder: str | None, token: str):
    """A file in the folder for as long as the block runs, for others to see. Gives why it could not be made, or ""."""
    if folder is None:
        yield ""
        return
    path = _mark_path(folder, token)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        why = ""
    except OSError as error:
        why = f"--checkpoint_dir {folder}: {error.strerror}"
    try:
        yield why
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _sees(folder: str | None, token: str) -> bool:
    deadline = time.monotonic() + _VISIBLE_S
    while folder is not None and not _mark_path(folder, token).exists():
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):
            os.listdir(folder)  # makes a network file system ask again
        time.sleep(0.2)
    return True


def _mark_path(folder: str, token: str) -> Path:
    return Path(folder) / f".roll-call-{token}"
