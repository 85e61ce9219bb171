"""Train a GPT-2 or a mixture of experts, on one process or on any mesh of them.

    python train.py                                                      # embedded corpus, this machine
    torchrun --standalone --nproc_per_node=2 train.py --dp 2
    torchrun --standalone --nproc_per_node=2 train.py --ep 2 --num_experts 8
    torchrun --standalone --nproc_per_node=8 train.py --dp 2 --tp 2 --pp 2 --grad_accum_steps 4 --fused --amp bf16

The flags are those of heiretsu.run.config; `python train.py --help` lists them.
"""

import sys

try:
    from heiretsu.run.config import RunConfig
    from heiretsu.run.options import parse_args, refuse
except ModuleNotFoundError as error:
    sys.exit(f"{error}: install the checkout first, with `pip install -e .` (or `make train`, which makes a .venv)")

# Before torch, whose import takes seconds: a wrong flag is refused at once.
CONFIG = parse_args() if __name__ == "__main__" else None

import contextlib

from heiretsu.data.terminal import escape_what_cannot_be_printed
from heiretsu.parallel.mesh import make_mesh
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from heiretsu.run.folders import held_folder
from heiretsu.run.hosts import gather_hosts
from heiretsu.run.prepare import Prepared, prepare
from heiretsu.run.resume import check_changes, find_origin, restore
from heiretsu.run.together import together
from heiretsu.run.training import train
from heiretsu.run.tuning import tune_kernels


def main(config: RunConfig) -> None:
    """A run: what each rank finds out alone, the roll call, and what all of them do together."""
    escape_what_cannot_be_printed()
    mine = prepare(config)
    with together(mine.config, mine.backend, mine.rank, mine.report):
        run(mine)


def run(mine: Prepared) -> None:
    """Take the run's folders, build the engine on this rank's mesh, restore it, and train."""
    config, mesh = mine.config, make_mesh(*mine.config.mesh, mine.device)

    def say(line: str) -> None:
        if mesh.rank == 0:
            print(line, flush=True)

    with contextlib.ExitStack() as held:
        try:
            held.enter_context(held_folder(config, mesh, say))
            origin = find_origin(config, mesh, say)
            facts = {"run_id": origin.run_id, "data": mine.train_data.digest()}
            check_changes(config, origin, facts["data"], say)
        except ValueError as error:
            refuse(error)
        engine = build_engine(config, mesh, mine.ops)
        if config.autotune:
            tune_kernels(engine, read_batches(config, mesh, mine.train_data, step=0))
        hosts = gather_hosts(mesh)
        if config.local_checkpoints and not hosts.only_dp_crosses():
            refuse(f"--local_checkpoints: only dp may run between hosts, and here {', '.join(hosts.crossing())} does")
        say("\n".join([mine.describe(), *hosts.describe()]))
        try:
            first_step = restore(config, engine, origin, say)
        except ValueError as error:
            refuse(error)
        train(config, mesh, engine, mine.train_data, mine.val_data, first_step, facts)


if __name__ == "__main__":
    main(CONFIG)
