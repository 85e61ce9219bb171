"""A real Slurm on the two hosts of bench/network.py: munged and slurmd on both, slurmctld on the first.

Everything that it writes is in the folder of the network, its daemons live in the hosts' process spaces, and so all of
it goes when the network goes.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

from heiretsu.bench.network import ADDRESSES, NAMES, PATIENCE_S, Network

NEEDED = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "srun": "slurm-wlm"}
CONF = """
ClusterName=heiretsu
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# No cgroup is made: a step's processes are found by their parents.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Eight slots a node, whatever the machine has: jobs of these tests share nodes.
SlurmdParameters=config_overrides
SlurmdTimeout={node_timeout_s}
KillWait=30
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE_TIMEOUT_S = 10  # after which a node that says nothing is down


def lacking() -> str | None:
    """In one line, what this machine lacks for a Slurm; None if it has all."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = {package for program, package in NEEDED.items() if shutil.which(program, path=path) is None}
    return f"apt-get install {' '.join(sorted(missing))}" if missing else None


class Slurm:
    """folder: what the jobs share, and where they are submitted from."""

    def __init__(self, net: Network):
        self.net = net
        self.folder = net.folder / "slurm"
        self.folder.mkdir()
        (self.folder / "state").mkdir()
        nodes = [f"NodeName={name} NodeAddr={ADDRESSES[name]} CPUs=8 State=UNKNOWN" for name in NAMES]
        self.conf = self.folder / "slurm.conf"
        self.conf.write_text(
            CONF.format(
                first=NAMES[0],
                address=ADDRESSES[NAMES[0]],
                folder=self.folder,
                nodes="\n".join(nodes),
                node_timeout_s=NODE_TIMEOUT_S,
            )
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for host in net.hosts:
            host.environment |= {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
            host.run("sh", "-c", "mount -t tmpfs tmpfs /run && mkdir -p /run/munge")
            private = [f"--{what}-file={host.folder}/munged.{what}" for what in ("pid", "log", "seed")]
            host.start("munged", "--foreground", "--force", f"--key-file={key}", *private)
        self.hastened: set[tuple[int, str]] = set()  # jobs, and how often they had been requeued
        self.controller = net.alder.start("slurmctld", "-D")
        for host in net.hosts:
            self.start_node(host)
        self.wait_for_nodes()

    def start_node(self, host) -> None:
        host.start("slurmd", "-D", "-N", host.name)

    def wait_for_nodes(self, patience_s: float = PATIENCE_S) -> None:
        """Until both nodes take jobs."""
        deadline = time.monotonic() + patience_s
        while self.ask("sinfo", "-h", "-o", "%T %D").split() != ["idle", "2"]:
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.3)

    def ask(self, *command: str) -> str:
        process = self.net.alder.start(*command, cwd=self.folder)
        process.wait()
        return process.text()

    def submit(self, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> int:
        """The number of the job that sbatch makes of it."""
        said = self.net.alder.run("sbatch", *arguments, cwd=cwd or self.folder, **environment)
        return int(re.search(r"Submitted batch job (\d+)", said).group(1))

    def job(self, number: int) -> dict[str, str]:
        """What scontrol knows of a job. One that was requeued begins after three seconds, not after two minutes: within
        one second slurmd takes its new credential for the old, which it has revoked."""
        job = dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", str(number))))
        if job.get("Reason") == "BeginTime" and (again := (number, job["Restarts"])) not in self.hastened:
            self.hastened.add(again)
            self.ask("scontrol", "update", f"JobId={number}", "StartTime=now+3")
        return job

    def wait_for(self, number: int, *states: str, patience_s: float = PATIENCE_S) -> dict[str, str]:
        """Until the job is in one of these states."""
        deadline = time.monotonic() + patience_s
        while (job := self.job(number)).get("JobState") not in states:
            assert time.monotonic() < deadline, f"job {number} is not {states} but {job}\n{self.logs()}"
            time.sleep(0.3)
        return job

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))
