"""Train on Modal's GPUs (https://modal.com): edit TRAINING_CONFIG, then

    python modal_train.py                       # check the configuration and print what it would cost; rents nothing
    modal run modal_train.py::download          # once: FineWeb-10B shards onto the volume
    modal run --detach modal_train.py           # train, or go on from the last checkpoint
    modal run --detach modal_train.py --nodes 2 # the same on the GPUs of two containers
    modal run modal_train.py::bench             # bench/kernels.py on one GPU
    modal run modal_train.py::parity            # the kernel tests on one GPU

Needs `pip install -e '.[modal]'`, `modal setup`, and for wandb a secret of that name with WANDB_API_KEY in it.

A preempted run is started again by Modal with the same arguments; --resume auto then goes on from the last checkpoint.

Between containers only dp may run. A volume is no file system that containers share: each sees what it had when the
container started, and its own writes. So the first container must hold a whole model, whose checkpoint it then writes
and commits alone.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

try:
    import modal

    from heiretsu.run.config import RunConfig
    from heiretsu.run.data_sheets import data_sheet
    from heiretsu.run.flags import command_line
    from heiretsu.run.memory import bytes_of_a_rank
    from heiretsu.run.options import parse_args
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}: run `pip install -e .[modal]` in this folder (or `make train`, for a run on this machine)")

GPU = "A100-40GB"  # one of GPUS; TRAINING_CONFIG's dp x ep x pp x tp says how many

# The flags of train.py by name; True is a switch. GPT-2 medium, every second layer a mixture of eight experts.
TRAINING_CONFIG: dict[str, object] = {
    # model
    "n_layer": 24,
    "n_head": 16,
    "n_embed": 1024,
    "block_size": 1024,
    "num_experts": 8,
    "top_k": 2,
    "moe_freq": 2,
    # topology
    "dp": 2,
    "ep": 1,
    "pp": 1,
    "tp": 2,
    # batch and optimiser
    "batch_size": 8,
    "grad_accum_steps": 4,
    "max_iters": 2000,
    "learning_rate": 3e-4,
    "warmup_iters": 100,
    "min_lr": 3e-5,
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
    "grad_clip": 1.0,
    # speed
    "amp": "bf16",
    "fused": True,
    # evaluation, checkpoints, tracking
    "tokenizer": "gpt2",
    "eval_interval": 250,
    "eval_iters": 10,
    "save_interval": 250,
    "keep": 2,
    "wandb": True,
    "wandb_project": "heiretsu-moe-training",
    "run_name": "gpt2-medium-8x2-dp2-tp2",
}

# GB, and dollars a GPU hour by Modal's list when this was written.
GPUS = {
    "L40S": (48, 1.95),
    "A100-40GB": (40, 2.10),
    "A100-80GB": (80, 2.50),
    "H100": (80, 3.95),
    "H200": (141, 4.54),
    "B200": (180, 6.25),
}
GPUS_PER_CONTAINER = 8
ASSUMED_MFU = 0.25  # a guess to budget by, not a measurement; the run prints its own
START_UP_MINUTES = 5  # a container, the first compilation of the kernels, evaluations
SECONDS_TO_SAVE = 25  # of the 30 that Modal leaves a preempted container

ROOT = Path(__file__).parent
SOURCE, DATA, CHECKPOINTS = "/opt/heiretsu", "/data", "/checkpoints"
LEFT_AT_HOME = [".git", ".venv", "*.egg-info", ".*_cache", ".hypothesis", "build", "dist", "runs", "wandb"]
LEFT_AT_HOME += ["**/__pycache__", "**/*.bin"]


def num_gpus(config: Mapping[str, object]) -> int:
    sizes = [config.get(axis, 1) for axis in ("dp", "ep", "pp", "tp")]
    counts = [size for size in sizes if isinstance(size, int) and size > 0]
    if counts != sizes:
        sys.exit(f"TRAINING_CONFIG: dp, ep, pp, tp = {sizes}: each must be a whole number above 0")
    return math.prod(counts)


def remote_flags(config: Mapping[str, object]) -> list[str]:
    """The configuration as train.py's command line, and the folders that only the container has."""
    folder = f"{CHECKPOINTS}/{config.get('run_name') or 'run'}"
    return [*command_line(config), "--data_dir", DATA, "--checkpoint_dir", folder, "--resume", "auto"]


def asked_nodes(command_line: list[str]) -> int:
    """--nodes, ahead of Modal's own reading: of how many containers a function is made is fixed when it is declared."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=1)
    return max(1, parser.parse_known_args(command_line)[0].nodes)


def checked(config: Mapping[str, object], gpu: str, nodes: int = 1) -> RunConfig:
    """The run as train.py will read it. Exits with one line if it would refuse it, or if Modal has no such machine."""
    gpus = num_gpus(config)
    if gpu not in GPUS:
        sys.exit(f"GPU {gpu!r} is none of {', '.join(GPUS)}")
    if gpus % nodes:
        sys.exit(f"TRAINING_CONFIG: dp x ep x pp x tp = {gpus} GPUs, which --nodes {nodes} does not divide")
    if gpus > GPUS_PER_CONTAINER * nodes:
        most = f"a container has at most {GPUS_PER_CONTAINER}: raise --nodes {nodes}, or lower dp"
        sys.exit(f"TRAINING_CONFIG: dp x ep x pp x tp = {gpus} GPUs, but {most}")
    replica = gpus // int(str(config.get("dp", 1)))
    if gpus // nodes % replica:
        sys.exit(
            f"TRAINING_CONFIG: ep x pp x tp = {replica} GPUs hold a model, but a container of --nodes {nodes} has "
            f"{gpus // nodes}, and only dp may run between containers: choose fewer nodes, or raise dp"
        )
    run = parse_args([*command_line(config), "--checkpoint_dir", CHECKPOINTS], world_size=gpus)
    if state_gb(run) > GPUS[gpu][0]:
        needs = f"parameters, gradients and AdamW's moments take {state_gb(run):.0f} GB a GPU"
        sys.exit(f"TRAINING_CONFIG: {needs}, but {gpu} has {GPUS[gpu][0]}: raise tp or pp, or ep for experts")
    return run


def state_gb(run: RunConfig) -> float:
    """Parameters, gradients and optimizer state on the GPU that holds most layers."""
    return bytes_of_a_rank(run).state / 1e9


def estimate(config: RunConfig, gpu: str, gpus: int) -> tuple[float, float]:
    """Hours and dollars of the whole run, at ASSUMED_MFU."""
    flops = config.model.flops_per_token * config.tokens_per_step * config.max_iters
    hours = flops / (gpus * data_sheet(gpu).bf16_flops * ASSUMED_MFU) / 3600 + START_UP_MINUTES / 60
    return hours, hours * GPUS[gpu][1] * gpus


def plan(config: Mapping[str, object] = TRAINING_CONFIG, gpu: str = GPU, nodes: int = 1) -> str:
    """What the configuration asks for and about what it costs, after checking it."""
    run, gpus = checked(config, gpu, nodes), num_gpus(config)
    hours, dollars = estimate(run, gpu, gpus)
    tokens, (memory_gb, price) = run.tokens_per_step * run.max_iters, GPUS[gpu]
    return "\n".join(
        [
            f"machine: {gpus} x {gpu}" + (f" in {nodes} containers" if nodes > 1 else ""),
            f"command: {shlex.join(['train.py', *remote_flags(config)])}",
            f"tokens:  {run.tokens_per_step:,} a step, {tokens:,} in {run.max_iters} steps",
            f"memory:  {state_gb(run):.1f} of {memory_gb} GB a GPU for weights, gradients, AdamW; then activations",
            f"cost:    about {hours:.1f} h and ${dollars:.2f}, at {ASSUMED_MFU:.0%} MFU and ${price:.2f} a GPU hour",
        ]
    )


def make_image(*extras: str) -> modal.Image:
    """The versions of constraints.txt, then the source on top, so that an edit rebuilds only the last layers."""
    constraints = f"{SOURCE}/constraints.txt"
    return (
        modal.Image.debian_slim(python_version="3.12")
        .apt_install("build-essential")  # Triton compiles its launcher with a C compiler
        .add_local_file(ROOT / "constraints.txt", constraints, copy=True)
        .pip_install_from_pyproject(
            str(ROOT / "pyproject.toml"), list(extras), extra_options=f"--constraint {constraints}"
        )
        .add_local_dir(ROOT, SOURCE, copy=True, ignore=LEFT_AT_HOME)
        .run_commands(f"python -m pip install --no-deps --editable {SOURCE}")
    )


app = modal.App("heiretsu")
data_volume = modal.Volume.from_name("fineweb-data", create_if_missing=True)
checkpoint_volume = modal.Volume.from_name("heiretsu-checkpoints", create_if_missing=True)
secrets = [modal.Secret.from_name("wandb-secret")] if TRAINING_CONFIG.get("wandb") else []
training_image = make_image("fineweb", "wandb")
checks_image = make_image("bench", "test")


NODES = asked_nodes(sys.argv[1:])


def on_nodes(function: Callable) -> Any:
    """The function on a cluster of NODES containers at once, or as it is on one. Modal 1.6 has both names out of its
    experimental module; the oldest that we allow, 1.0, has them only there."""
    if NODES == 1:
        return function
    clustered = modal.clustered if hasattr(modal, "clustered") else modal.experimental.clustered
    return clustered(size=NODES, rdma=True)(function)


def place_in_cluster() -> tuple[int, list[str]]:
    """In a container of a cluster: its number, and the addresses of all its containers, in order."""
    if hasattr(modal, "Cluster"):
        cluster = modal.Cluster.from_context()
        return cluster.container_rank(), list(cluster.container_ips())
    info = modal.experimental.get_cluster_info()
    return info.rank, list(info.container_ips)


@app.function(
    image=training_image,
    gpu=f"{GPU}:{max(1, num_gpus(TRAINING_CONFIG) // NODES)}",
    volumes={DATA: data_volume, CHECKPOINTS: checkpoint_volume},
    secrets=secrets,
    timeout=24 * 3600,
    # A container of several that ends takes the others with it: all begin anew, from the last checkpoint.
    retries=modal.Retries(initial_delay=0.0, max_retries=5) if NODES > 1 else None,
)
@on_nodes
def train(nodes: int, gpus: int, arguments: list[str]) -> None:
    """In each container. gpus: of one. The first makes the checkpoints durable, whatever ends it."""
    node, addresses = place_in_cluster() if nodes > 1 else (0, ["localhost"])
    try:
        train_on_node(node, addresses, gpus, arguments, cwd=SOURCE)
    finally:
        if node == 0:
            checkpoint_volume.commit()


def train_on_node(node: int, addresses: list[str], gpus: int, arguments: list[str], cwd: str) -> None:
    """One container's share of the run. addresses: of all containers, by number."""
    launcher = ["torch.distributed.run", "--standalone"]
    if len(addresses) > 1:
        arguments = [*arguments, "--local_checkpoints"]
        first = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
        launcher = [
            "heiretsu.run.launch",
            f"--nnodes={len(addresses)}",
            f"--node_rank={node}",
            f"--master_addr={first}",
        ]
    run_to_the_end([sys.executable, "-m", *launcher, f"--nproc_per_node={gpus}", "train.py", *arguments], cwd=cwd)


def run_to_the_end(command: list[str], cwd: str) -> None:
    """Run the command. If this process is interrupted, tell it by SIGTERM, and give it the time to save and leave.

    Raises subprocess.CalledProcessError if the command fails.
    """
    process = subprocess.Popen(command, cwd=cwd, start_new_session=True)  # an interrupt is for us alone
    try:
        status = process.wait()
    except BaseException:  # Modal announces a preemption by interrupting the main thread
        process.terminate()
        try:
            process.wait(SECONDS_TO_SAVE)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if status:
        raise subprocess.CalledProcessError(status, command)


@app.function(image=training_image, volumes={DATA: data_volume}, timeout=6 * 3600)
def download(shards: int = 10) -> None:
    """FineWeb-10B onto the volume: shards of 100 million tokens, 200 MB each. Files that are there already stay."""
    try:
        run_to_the_end([sys.executable, "data/fineweb.py", str(shards), "--out", DATA], cwd=SOURCE)
    finally:
        data_volume.commit()


@app.function(image=checks_image, gpu=GPU, timeout=3600)
def bench(arguments: str = "") -> None:
    """bench/kernels.py on one GPU: `modal run modal_train.py::bench --arguments "--quick"`."""
    run_to_the_end([sys.executable, "bench/kernels.py", *shlex.split(arguments)], cwd=SOURCE)


@app.function(image=checks_image, gpu=GPU, timeout=3600)
def parity(arguments: str = "") -> None:
    """The kernel tests, on the device."""
    run_to_the_end([sys.executable, "-m", "pytest", "tests/kernels", *shlex.split(arguments)], cwd=SOURCE)


@app.local_entrypoint()
def main(nodes: int = 1) -> None:
    """On this machine: check, say what it costs, and only then rent. nodes: containers, each with its share of GPUs."""
    print(plan(nodes=nodes), flush=True)
    train.remote(nodes, num_gpus(TRAINING_CONFIG) // nodes, remote_flags(TRAINING_CONFIG))


if __name__ == "__main__":
    print(plan(nodes=NODES))
