"""Two hosts on one machine: network namespaces with names and addresses of their own, and a cable between them.

    with network() as net:
        net.alder.run("torchrun", ...)     # a program on a host, to its end; `start` does not wait
        net.unplug(); net.rate("100mbit")

A host is one `unshare` with a network, a mount, a process and a name space, whose first process reads a pipe that this
process holds. When the pipe closes, by `close`, by an error or because this process was killed, the kernel ends every
process of the host and takes the interface, the addresses and the mounts with them: nothing has to be undone, and what
the machine outside has is never touched. Addresses are of the range for tests of networks (RFC 2544), and there is no
route out of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
INTERFACE = "wire0"
NAMES = ("alder", "birch")
ADDRESSES = {"alder": "198.18.77.1", "birch": "198.18.77.2"}
ADDRESSES_V6 = {"alder": "fd77::1", "birch": "fd77::2"}
PATIENCE_S = 400  # for what takes seconds on a machine that does nothing else
NEEDED = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}


def lacking() -> str | None:
    """In one line, what this machine lacks for two hosts; None if it has all."""
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = {package for program, package in NEEDED.items() if shutil.which(program) is None}
    if missing:
        return f"apt-get install {' '.join(sorted(missing))}"
    made = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return None if made.returncode == 0 else f"this machine allows no namespaces: {made.stderr.decode().strip()}"


@dataclass
class Process:
    """A program on a host. What it prints goes to a file: a pipe that nobody reads would hold it up."""

    popen: subprocess.Popen
    output: Path

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Its status. AssertionError, with what it has printed, if it has not ended by then."""
        try:
            return self.popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not ended after {patience_s} s, having printed:\n{self.text()}") from None

    def wait_for(self, words: str, patience_s: float = PATIENCE_S) -> None:
        """Until it has printed them. AssertionError if it ends without, or has not by then."""
        deadline = time.monotonic() + patience_s
        while words not in self.text():
            ended = self.popen.poll() is not None and words not in self.text()
            assert not ended, f"ended without {words!r}, having printed:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {words!r} in {patience_s} s, but:\n{self.text()}"
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        """To the program itself: nsenter, which is what we started, waits for it in the other process space."""
        children: list[str] = []
        while not children and self.popen.poll() is None:
            children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), number)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self.signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(10)
        self.popen.kill()


@dataclass
class Host:
    """One host. folder: of its own files, which the machine outside sees too."""

    name: str
    folder: Path
    holder: subprocess.Popen = field(init=False)
    pid: int = field(init=False)  # of its first process, as seen from outside
    environment: dict[str, str] = field(default_factory=dict)
    started: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.names({**ADDRESSES})
        hosts = self.folder / "hosts"
        begin = f"hostname {self.name} && mount --bind {hosts} /etc/hosts && ip link set lo up && echo up && exec cat"
        spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.holder = subprocess.Popen(
            ["unshare", *spaces, "sh", "-c", begin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.holder.stdout.readline() == "up\n", f"{self.name} did not come up"
        self.pid = int(Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text())

    def names(self, addresses: dict[str, str]) -> None:
        """What names resolve to on this host."""
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")

    def start(self, *command: str | Path, cwd: Path = ROOT, **environment: str) -> Process:
        """A program on this host, not waited for. Variables of the machine's launchers do not reach it."""
        output = self.folder / f"output.{len(self.started)}"
        inside = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid", f"--wdns={cwd}"]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC", "GLOO", "NCCL"))}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            clean.pop(name, None)
        with open(output, "wb") as file:
            popen = subprocess.Popen(
                [*inside, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**clean, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **self.environment, **environment},
            )
        self.started.append(Process(popen, output))
        return self.started[-1]

    def run(self, *command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
        """A program on this host, to its end: what it printed. AssertionError if it fails."""
        process = self.start(*command, cwd=cwd, **environment)
        status = process.wait()
        assert status == 0, f"{command} ended with {status}:\n{process.text()}"
        return process.text()

    def stop_processes(self) -> None:
        """End what was started here and still runs."""
        for process in self.started:
            if process.popen.poll() is None:
                process.kill()

    def close(self) -> None:
        self.stop_processes()
        self.holder.stdin.close()
        self.holder.wait(30)


class Network:
    def __init__(self, folder: Path):
        self.folder = folder
        self.hosts: list[Host] = []
        try:
            for name in NAMES:
                self.hosts.append(Host(name, folder / name))
            self.alder, self.birch = self.hosts
            ends = [str(host.pid) for host in self.hosts]
            pair = f"ip link add {INTERFACE} netns {ends[0]} type veth peer name {INTERFACE} netns {ends[1]}"
            subprocess.run(pair.split(), check=True)
            for host in self.hosts:
                host.run("ip", "addr", "add", f"{ADDRESSES[host.name]}/30", "dev", INTERFACE)
            self.plug()
        except BaseException:
            self.close()
            raise

    def plug(self) -> None:
        for host in self.hosts:
            host.run("ip", "link", "set", INTERFACE, "up")
            # An interface that goes down loses its IPv6 address.
            host.run("ip", "-6", "addr", "replace", f"{ADDRESSES_V6[host.name]}/64", "dev", INTERFACE, "nodad")

    def unplug(self) -> None:
        """Pull the cable. Neither side is told by a packet: what it waits for just never comes."""
        self.alder.run("ip", "link", "set", INTERFACE, "down")

    def rate(self, limit: str | None) -> None:
        """Limit what each host sends, as `tc` spells it (100mbit, 1gbit); None lifts it."""
        for host in self.hosts:
            if limit is None:
                host.start("tc", "qdisc", "del", "dev", INTERFACE, "root").wait()
            else:
                bucket = ["rate", limit, "burst", "256kb", "latency", "200ms"]
                host.run("tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *bucket)

    def close(self) -> None:
        for host in self.hosts:
            host.close()


def interface_bytes(table: str, direction: str) -> int:
    """What a host's end of the cable has sent (tx) or received (rx), from the text of its /proc/net/dev."""
    numbers = next(line.partition(":")[2] for line in table.splitlines() if line.strip().startswith(INTERFACE))
    return int(numbers.split()[0 if direction == "rx" else 8])


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Two hosts with a cable, for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="heiretsu-hosts-") as folder:
        net = Network(Path(folder))
        try:
            yield net
        finally:
            net.close()
