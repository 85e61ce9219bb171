"""How these tests start a run: on both hosts, with heiretsu.run.launch, as docs/several-machines.md has it."""

from __future__ import annotations

from pathlib import Path

from heiretsu.bench.network import ROOT, Network, Process

PYTHON = ROOT / ".venv" / "bin" / "python" if (ROOT / ".venv").exists() else Path(__import__("sys").executable)
# A run of next to nothing, in the precision in which it can be compared with one process.
TINY = "--device cpu --dtype float64 --n_layer 2 --n_head 2 --n_embed 32 --block_size 16 --batch_size 4".split()
TINY += "--eval_interval 0 --sample_tokens 0".split()


def launch(
    net: Network,
    *program: str,
    ranks_per_host: int = 1,
    wait_s: float = 120,
    port: int = 29500,
    environment: dict[str, str] | None = None,
    flags: dict[str, list[str]] | None = None,
) -> list[Process]:
    """The program on both hosts, not waited for. flags: of the launcher, by host, which then override these."""
    processes = []
    for rank, host in enumerate(net.hosts):
        launcher = ["-m", "heiretsu.run.launch", "--nnodes=2", f"--node_rank={rank}", "--master_addr=alder"]
        launcher += [f"--master_port={port}", f"--nproc_per_node={ranks_per_host}", "--wait_s", str(wait_s)]
        launcher += (flags or {}).get(host.name, [])
        processes.append(host.start(PYTHON, *launcher, *program, **(environment or {})))
    return processes


def ended(processes: list[Process]) -> list[tuple[int, str]]:
    """The status and the words of each, once all have ended."""
    return [(process.wait(), process.text()) for process in processes]
