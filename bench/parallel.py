"""What each axis costs on the wire: two hosts, one rank each, with a cable of --rate between them; Linux, as root.

    python bench/parallel.py --hosts 2 --rate 1gbit
    python bench/parallel.py --hosts 2 --rate 100mbit --axes dp --n_embed 256

The hosts are network namespaces of this machine (bench/network.py), so that no other machine and no address of this one
takes part. For each axis, a step: its median time; the bytes that our collectives ask to send, beside those that the
interface of the host has sent, headers and acknowledgements included; the share of the time for which the step waits
for messages; and for dp, how much of what the gradients send had left when the backward pass ended, which is what
overlap is: the most of three steps, because gloo's threads share the cores with the backward pass.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__" and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # this folder's file names are not names for `import`
if importlib.util.find_spec("heiretsu") is None:
    sys.exit("heiretsu is not installed: run `pip install -e .` in the repository, or `make install`")

import torch
import torch.distributed as dist

from heiretsu.bench import network, tables
from heiretsu.bench.wire import BytesSent, waiting
from heiretsu.kernels import plain
from heiretsu.parallel.data import GradientAverager
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import make_mesh, process_groups
from heiretsu.parallel.pipeline import Context, Microbatch
from heiretsu.run.building import build_engine
from heiretsu.run.config import RunConfig
from heiretsu.run.interfaces import use_interface
from heiretsu.run.options import parse_args

AXES = ("dp", "tp", "pp", "ep")
WARMUP_STEPS, COUNTED_STEPS = 2, 3
SETTLING_S = 0.3  # for the last packets of a step to leave
MARK = "wire: "  # before the line in which rank 0 reports
HEADERS = ["axis", "ms/step", "waits %", "counted KB", "interface KB", "ratio", "sent in backward %"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--hosts", type=int, choices=(2,), default=2)
    parser.add_argument("--rate", default="1gbit", help="of each direction, as tc spells it: 100mbit, 1gbit")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    for name, default in {"n_layer": 4, "n_embed": 128, "block_size": 64, "batch_size": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bucket_kb", type=int, default=256, help="gradients that dp sends at a time")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--as_rank", action="store_true", help=argparse.SUPPRESS)  # one rank's part
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    flags = parse(argv)
    if flags.as_rank:
        measure_rank(flags)
        return
    if lacking := network.lacking():
        sys.exit(f"bench/parallel.py: two hosts on one machine need: {lacking}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # takes down all that was made, as Ctrl-C does
    with network.network() as net:
        net.rate(flags.rate)
        figures = measure(net, sys.argv[1:] if argv is None else argv)
    print(f"2 hosts with 1 rank each, {flags.rate} between them; {torch.__version__}, gloo")
    print(tables.aligned(HEADERS, [table_row(axis, found) for axis, found in figures.items()]))
    if flags.json:
        Path(flags.json).write_text(json.dumps(figures, indent=1) + "\n")


def measure(net: network.Network, argv: list[str]) -> dict[str, dict]:
    """By axis, what both ranks found, of the one that waits longer."""
    processes = []
    for rank, host in enumerate(net.hosts):
        launcher = ["-m", "heiretsu.run.launch", "--nnodes=2", f"--node_rank={rank}", "--master_addr=alder"]
        program = [str(Path(__file__).resolve()), *argv, "--as_rank"]
        processes.append(host.start(sys.executable, *launcher, "--nproc_per_node=1", *program))
    found = []
    for process in processes:
        if process.wait():
            sys.exit(process.text())
        found += [json.loads(line[len(MARK) :]) for line in process.text().splitlines() if line.startswith(MARK)]
    return {axis: max((by_axis[axis] for by_axis in found), key=lambda one: one["waits"]) for axis in found[0]}


def table_row(axis: str, found: dict) -> list[str]:
    kilobytes = [f"{found[name] / 1e3:,.1f}" for name in ("counted", "wire")]
    early = "-" if found["sent_in_backward"] is None else f"{100 * found['sent_in_backward']:.0f}"
    ratio = f"{found['wire'] / found['counted']:.3f}"
    return [axis, f"{1e3 * found['seconds']:.0f}", f"{100 * found['waits']:.0f}", *kilobytes, ratio, early]


# One rank


def measure_rank(flags: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    use_interface("gloo", os.environ)
    rank, found = int(os.environ["RANK"]), {}
    meeting = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for axis in flags.axes:
        with process_groups("gloo", 2, rank=rank, store=dist.PrefixStore(axis, meeting)):
            found[axis] = on_mesh(flags, axis)
    print(MARK + json.dumps(found), flush=True)


def on_mesh(flags: argparse.Namespace, axis: str) -> dict:
    config = config_of(flags, axis)
    mesh = make_mesh(config.dp, config.ep, config.pp, config.tp)
    engine = build_engine(config, mesh, plain)
    engine.updater.averager = GradientAverager(engine.params, engine.table, 1000 * flags.bucket_kb)
    generator = torch.Generator().manual_seed(mesh.replica.index)
    tokens = torch.randint(
        config.model.vocab_size,
        (config.grad_accum_steps, config.batch_size, config.model.block_size + 1),
        generator=generator,
    )
    batches = [
        Microbatch(x[:, :-1].contiguous(), x[:, 1:].contiguous(), Context(first_sample=i)) for i, x in enumerate(tokens)
    ]
    for _ in range(WARMUP_STEPS):
        engine.step(batches)
    counted = [counted_step(engine, batches) for _ in range(COUNTED_STEPS)]
    found = max(counted, key=lambda one: one["sent_in_backward"] or 0.0)
    times, waits = [], 0.0
    for _ in range(flags.steps):
        dist.barrier()
        began = time.perf_counter()
        with waiting() as waited:
            engine.step(batches)
        times.append(time.perf_counter() - began)
        waits += waited.seconds
    return {**found, "seconds": statistics.median(times), "waits": waits / sum(times)}


def config_of(flags: argparse.Namespace, axis: str) -> RunConfig:
    """The step on an axis of two: the same batch of a step for each."""
    line = ["--device", "cpu", f"--{axis}", "2", "--n_head", "2", "--sample_tokens", "0"]
    for name in ("n_layer", "n_embed", "block_size"):
        line += [f"--{name}", str(getattr(flags, name))]
    if axis == "ep":
        line += ["--num_experts", "4"]
    config = parse_args(line, world_size=2)
    microbatches = 4 if config.pp > 1 else 1
    return replace(
        config, grad_accum_steps=microbatches, batch_size=flags.batch_size // (config.replicas * microbatches)
    )


def counted_step(engine: Engine, batches: list[Microbatch]) -> dict:
    """Bytes of one step: that our collectives ask to send, that the interface sent, and for dp what share of it had
    left by the end of the backward pass."""
    marks: dict[str, int] = {}
    finish = engine.updater.averager.finish

    def finish_marked():
        marks["backward_ended"] = sent_by_interface()
        finish()

    dist.barrier()
    time.sleep(SETTLING_S)
    before = sent_by_interface()
    with patch.object(engine.updater.averager, "finish", finish_marked), BytesSent() as counted:
        engine.step(batches)
    time.sleep(SETTLING_S)
    after = sent_by_interface()
    early = (marks["backward_ended"] - before) / (after - before) if engine.mesh.dp.size > 1 else None
    return {"counted": counted.total, "by": counted.bytes, "wire": after - before, "sent_in_backward": early}


def sent_by_interface() -> int:
    """Bytes that this host's end of the cable has sent: it has no other interface than that and loopback."""
    return network.interface_bytes(Path("/proc/net/dev").read_text(), "tx")


if __name__ == "__main__":
    main()
