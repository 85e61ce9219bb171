"""torchrun on one of several nodes, after they have all met; what keeps them apart is one line, within --wait_s.

    python -m heiretsu.run.launch --nnodes=2 --node_rank=0 --master_addr=alder --nproc_per_node=8 train.py --dp 16

on every node, with its own --node_rank. The flags are torchrun's. Before torchrun starts, node 0 listens at
--master_addr and --master_port until every node has called in with its name, and then tells all of them how it went. A
node that cannot be reached, does not come, has another's rank or would offer the others its loopback address thus ends
the start everywhere, with its name. torchrun would wait for it for minutes, and end in a traceback. The meeting also
finds the interface for GLOO_SOCKET_IFNAME, where the name of a host does not say.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass

from heiretsu.run.interfaces import addresses_of, find_interface, interfaces, is_loopback
from heiretsu.run.lines import Line, arrivals, listen

PROGRAM = "heiretsu.run.launch"
WAIT_S = 300.0  # a container's image may have to be fetched on one node
RETRY_S = 0.2
TORCHRUNS_PORT = 29500


@dataclass(frozen=True)
class Node:
    """One node of the launch. problem: why it cannot take part, in one line."""

    rank: int
    name: str
    problem: str | None = None


def meet(nnodes: int, rank: int, address: str, port: int, wait_s: float) -> str | None:
    """Node `rank` meets the others at node 0, which is at address:port. All nodes call it.

    Returns in one line what went wrong, on all nodes that came; None if nothing did. Sets GLOO_SOCKET_IFNAME for this
    process and its children if gloo must be told. ValueError, in one line, where this node finds none of the others;
    they then miss it after wait_s.
    """
    deadline = time.monotonic() + wait_s
    if rank:
        return _call(rank, address, port, deadline)
    with _listen(address, port) as door:
        lines, names, problem = _gather(door, nnodes, deadline)
    # The door is closed before the others hear: their torchrun comes to this very port.
    if problem is None and len(names) < nnodes:
        there = ", ".join(f"node {rank} is {name}" for rank, name in sorted(names.items()))
        missing = [str(rank) for rank in range(nnodes) if rank not in names]
        whose = f"node{'s' * (len(missing) > 1)} {', '.join(missing)} of {nnodes} ({there})"
        problem = f"{whose} did not call in at {address}:{port} in {wait_s:g} s"
    if problem is None:
        try:
            _tell_gloo(lines[0].sock.getpeername()[0].removeprefix("::ffff:"))
        except ValueError as error:
            problem = str(error)
    for line in lines:
        line.send({"problem": problem})
        line.close()
    return problem


def _gather(door: socket.socket, nnodes: int, deadline: float) -> tuple[list[Line], dict[int, str], str | None]:
    """Lines to the nodes that called in, all nodes' names by rank, and the first problem of one, which ends it; until
    all are there, or time is up."""
    lines, names = [], {0: socket.gethostname()}
    for line, message in arrivals(door, deadline):
        try:
            node = Node(**(message or {}))
            among_them = 0 <= node.rank < nnodes
        except TypeError:
            continue  # not one of ours
        lines.append(line)
        problem = node.problem
        if not among_them:
            problem = f"host {node.name} has --node_rank {node.rank}: of {nnodes} it is 0 to {nnodes - 1}"
        elif node.rank in names:
            problem = f"hosts {names[node.rank]} and {node.name} both have --node_rank {node.rank}"
        names.setdefault(node.rank, node.name)
        if problem is not None or len(names) == nnodes:
            return lines, names, problem
    return lines, names, None


def _listen(address: str, port: int) -> socket.socket:
    here = socket.gethostname()
    known = addresses_of(address)
    if not known:
        raise ValueError(f"host {here}: --master_addr {address} resolves to nothing here")
    own = {one for found in interfaces().values() for one in found}
    if not any(is_loopback(one) or one in own for one in known):
        raise ValueError(
            f"host {here} has --node_rank 0, but --master_addr {address} ({known[0]}) is not it: node 0 must run there"
        )
    try:
        return listen(port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise ValueError(f"host {here}: port {port} is taken: choose another with --master_port") from None


def _call(rank: int, address: str, port: int, deadline: float) -> str | None:
    here = socket.gethostname()
    known = addresses_of(address)
    if known and is_loopback(known[0]):
        raise ValueError(
            f"host {here}: --master_addr {address} resolves to {known[0]}, which is {here} itself, not node 0: give an "
            f"address by which node 0 is reached from here, or mend /etc/hosts"
        )
    problem = None
    try:
        _tell_gloo(address)
    except ValueError as error:
        problem = str(error)
    why = f"the name {address} resolves to nothing"
    began = time.monotonic()
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection((address, port), timeout=left))
            line.send(asdict(Node(rank, here, problem)))
            answer = line.wait(time.monotonic() + 2 * left)  # node 0 waits as long, and may have begun as much later
            line.close()
            if answer is not None and "problem" in answer:
                return answer["problem"]
            why = "what listens there does not answer as node 0 does"
        except TimeoutError:
            why = "no answer: is it down, or the cable, or a firewall between?"
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(min(RETRY_S, max(0.0, left)))
    waited = time.monotonic() - began
    raise ValueError(f"host {here}: node 0 not reached at {address}:{port} in {waited:.0f} s ({why})")


def _tell_gloo(route_to: str | None) -> None:
    interface = find_interface(os.environ, route_to)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        print(f"{PROGRAM}: host {socket.gethostname()}: gloo uses {interface}", flush=True)


def main(argv: list[str] | None = None) -> None:
    own = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", add_help=False, allow_abbrev=False)
    own.add_argument("--wait_s", type=float, default=WAIT_S)
    given, rest = own.parse_known_args(argv)
    # Slow, and --wait_s is refused above.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    args = get_args_parser().parse_args(rest)
    nnodes = int(str(args.nnodes).rpartition(":")[2])
    if nnodes > 1:
        try:
            address, port = args.master_addr.strip("[]"), args.master_port or TORCHRUNS_PORT
            problem = meet(nnodes, args.node_rank, address, port, given.wait_s)
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            print(f"{PROGRAM}: error: {problem}", file=sys.stderr, flush=True)
            sys.exit(2)
    try:
        run(args)
    except SignalException as ended:
        print(f"{PROGRAM}: node {args.node_rank} was ended by {signal.Signals(ended.sigval).name}")
        sys.exit(128 + ended.sigval)
    except ChildFailedError as failed:
        print(failed, file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
