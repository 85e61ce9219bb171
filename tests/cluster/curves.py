"""Ten steps on each of several meshes of the ranks of both hosts, against one process: what test_topologies.py starts.

Under heiretsu.run.launch on every host. Each mesh has process groups of its own, because where a rank sits depends on
the mesh; they meet at the launcher's store. Rank 0 prints a line of JSON for each mesh.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # torchrun puts this folder on the path, not the repository

import torch
import torch.distributed as dist

from heiretsu.parallel.mesh import Mesh, make_mesh, process_groups
from heiretsu.run.hosts import gather_hosts, placed_rank
from heiretsu.run.interfaces import use_interface
from tests.cluster.test_topologies import STEPS, TOLERANCE, TOPOLOGIES
from tests.training import DENSE, MIXTURE, failures, run_config, run_steps, single_process


def on_mesh(config) -> dict:
    mesh: Mesh = make_mesh(config.dp, config.ep, config.pp, config.tp)
    hosts = gather_hosts(mesh)
    traces: list = [None] * mesh.world.size
    dist.all_gather_object(traces, run_steps(mesh, config, STEPS))
    if mesh.rank:
        return {}
    reference = single_process(config, STEPS)
    gaps = [abs(a - b) / abs(b) for t in traces for a, b in zip(t.losses, reference.losses, strict=True)]
    return {
        "crossing": hosts.crossing(),
        "ranks": hosts.ranks,
        "largest_gap": max(gaps),
        "findings": failures(traces, reference, TOLERANCE),
    }


def main() -> None:
    torch.set_num_threads(1)
    use_interface("gloo", os.environ)
    world_size = int(os.environ["WORLD_SIZE"])
    meeting = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for name, sizes in TOPOLOGIES.items():
        config = run_config(MIXTURE if sizes.get("ep", 1) > 1 else DENSE, global_batch=8, microbatches=2, **sizes)
        rank = placed_rank(os.environ, config.ep, config.pp, config.tp)
        with process_groups("gloo", world_size, rank=rank, store=dist.PrefixStore(name, meeting)):
            found = on_mesh(config)
        if rank == 0:
            print(json.dumps({"mesh": name, **found}), flush=True)


if __name__ == "__main__":
    main()
