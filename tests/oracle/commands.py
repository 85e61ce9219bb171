"""train.py as a command, and what it leaves behind: its log, and checkpoints by torch's own reader."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

TRAIN = str(Path(__file__).parents[2] / "train.py")
AXES = ("dp", "ep", "pp", "tp")
BYTES_PER_TOKEN = 1.5


def write_data(folder: Path, **splits: list[np.ndarray]) -> Path:
    """A data folder of llm.c's shards, and the meta.json that says what a token stands for."""
    for split, shards in splits.items():
        for number, tokens in enumerate(shards):
            header = np.zeros(256, dtype="<i4")
            header[:3] = 20240520, 1, len(tokens)
            path = folder / f"{split}_{number:06d}.bin"
            path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    counts = {split: sum(map(len, shards)) for split, shards in splits.items()}
    about = {split: {"tokens": n, "bytes": int(n * BYTES_PER_TOKEN)} for split, n in counts.items()}
    meta = {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256, "splits": about}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def train(data: Path, log: Path, flags: list[str], mesh: dict[str, int] | None = None) -> list[dict]:
    """The records of `train.py FLAGS`, under torchrun if the mesh has several ranks."""
    mesh = mesh or {}
    ranks = int(np.prod(list(mesh.values())))
    launcher = [sys.executable]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    common = ["--data_dir", str(data), "--device", "cpu", "--dtype", "float64", "--sample_tokens", "0"]
    sizes = [f"--{axis}={size}" for axis, size in mesh.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [*launcher, TRAIN, *common, *sizes, *flags, "--log_file", str(log)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by its name."""
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in stored.items()
        if isinstance(about, dcp.metadata.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.load(tensors, storage_reader=reader)
    return tensors
