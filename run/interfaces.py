"""By which of its interfaces a host talks to the others, found or asked for in one line."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# Linux: the IPv4 address of an interface. In bytes, so that no tool that edits numbers comes to the calls beside it, of
# which 0x8914 takes an interface down.
SIOCGIFADDR = int.from_bytes(b"\x89\x15", "big")


def interfaces() -> dict[str, list[str]]:
    """The addresses of each of this machine's interfaces that has one; those of a link alone (fe80::) left out."""
    found: dict[str, list[str]] = {}
    with socket.socket(type=socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.setdefault(name, []).append(socket.inet_ntoa(answer[20:24]))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        digits, *_, name = line.split()
        address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
        if not address.startswith("fe80"):
            found.setdefault(name, []).append(address)
    return found


def find_interface(environment: Mapping[str, str], route_to: str | None = None) -> str | None:
    """The interface that gloo must be told of on this host; None if it will find one by itself.

    Gloo listens on the address of the host's own name. Debian's installer, among others, gives that name 127.0.1.1, and
    other hosts then knock at their own door. route_to: an address of another host, by whose route the interface is
    chosen where there are several. ValueError, in one line, if one must be asked for, or if GLOO_SOCKET_IFNAME or
    NCCL_SOCKET_IFNAME names none that can be used.
    """
    here, found = socket.gethostname(), interfaces()
    listed = ", ".join(f"{name} {' '.join(addresses)}" for name, addresses in found.items())
    outward = [name for name in found if not is_loopback(found[name][0])]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        asked = environment.get(variable)
        if asked and not any(_asks_for(asked, name, exact=variable.startswith("GLOO")) for name in outward):
            raise ValueError(f"host {here}: {variable}={asked} is no interface that leads to other hosts: {listed}")
    if environment.get("GLOO_SOCKET_IFNAME"):
        return None
    own = addresses_of(here)
    if any(address in found[name] for address in own[:1] for name in outward):
        return None
    problem = f"its own name resolves to {own[0]}" if own else "its own name resolves to nothing"
    leads = [name for name in outward if route_to is not None and source_address(route_to) in found[name]]
    if leads or len(outward) == 1:
        return (leads or outward)[0]
    raise ValueError(
        f"host {here}: {problem}, which other hosts cannot reach: say by which interface they can, as in "
        f"GLOO_SOCKET_IFNAME={min(outward, default='eth0')} (there are: {listed})"
    )


def use_interface(backend: str, environment: MutableMapping[str, str]) -> None:
    """Set GLOO_SOCKET_IFNAME where this process runs with gloo on one of several hosts and must be told. ValueError as
    of `find_interface`."""
    if backend != "gloo" or int(environment.get("GROUP_WORLD_SIZE", 1)) == 1:
        return
    interface = find_interface(
        environment, environment.get("MASTER_ADDR") if environment["GROUP_RANK"] != "0" else None
    )
    if interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = interface


def _asks_for(asked: str, name: str, exact: bool) -> bool:
    """Whether a list of names means this interface. NCCL's are prefixes; a leading = makes them exact, ^ excludes."""
    excluding, asked = asked.startswith("^"), asked.removeprefix("^")
    exact, wanted = exact or asked.startswith("="), asked.removeprefix("=").split(",")
    matching = name in wanted if exact else name.startswith(tuple(wanted))
    return matching != excluding


def addresses_of(name: str) -> list[str]:
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(name, None)))
    except OSError:
        return []


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def source_address(target: str) -> str | None:
    """This machine's address on the way to another. Nothing is sent: a datagram socket only looks up the route."""
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return None
