"""train.py as a user runs it: the command line, torchrun, the log file, and what is refused."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import types
import unittest.mock
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from heiretsu.data.batches import TokenDataset
from heiretsu.data.shards import write_shard
from heiretsu.kernels import fused, plain
from heiretsu.kernels.control import CONTROL
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import log as run_log
from heiretsu.run import training, tuning
from heiretsu.run.batches import evaluate, read_batches
from heiretsu.run.building import build_engine
from heiretsu.run.options import parse_args
from tests.training import TRAIN, dataset, train_here

if fused.HAS_TRITON:
    from heiretsu.kernels.gpu import launch

TINY = "--n_layer 2 --n_head 2 --n_embed 16 --block_size 16 --eval_interval 3 --eval_iters 2 --sample_tokens 8".split()
EXACT = [*TINY, "--dtype", "float64", "--max_iters", "10", "--learning_rate", "0.01", "--grad_clip", "0.5"]
MOE = ["--num_experts", "4", "--moe_freq", "1"]


def start(arguments: list[str], ranks: int = 1, agents: int = 1, **environment) -> list[subprocess.Popen]:
    """`python train.py ...`, or torchrun with this many ranks on this many agents ("nodes") of one machine."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **environment}
    commands = [[sys.executable, TRAIN, *arguments]]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks // agents}"]
        meet = [f"--nnodes={agents}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        commands = [[*torchrun, *meet, f"--node_rank={i}", TRAIN, *arguments] for i in range(agents)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=env, **pipes) for command in commands]


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], str, str]:
    """Exit statuses, standard output and standard error of all agents."""
    results = [process.communicate(timeout=240) for process in processes]
    out, err = ("".join(texts) for texts in zip(*results, strict=True))
    return [process.returncode for process in processes], out, err


def log_of(tmp_path: Path, name: str, arguments: list[str], **how) -> list[dict]:
    path = tmp_path / f"{name}.jsonl"
    statuses, out, err = finish(start([*arguments, "--log_file", str(path)], **how))
    assert set(statuses) == {0}, out + err
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_here(tmp_path: Path, name: str, arguments: list[str]) -> list[dict]:
    """The same of a run on one process, without a process of its own: for what others are compared with."""
    path = tmp_path / f"{name}.jsonl"
    train_here(*arguments, "--sample_tokens", "0", "--log_file", str(path))
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(ours: list[dict], theirs: list[dict]) -> None:
    assert [record["step"] for record in ours] == list(range(10))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() - {"tokens_per_s", "mfu", "memory_mib", "slowest_rank", "slowest_over_median"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-9), f"step {mine['step']}: {key}"
    assert [record["step"] for record in ours if "eval_loss" in record] == [2, 5, 8, 9]


def test_log_file_is_the_same_on_two_nodes_with_experts_split_between_them(tmp_path):
    single = log_here(tmp_path, "single", [*EXACT, *MOE, "--batch_size", "4"])
    assert all(record["aux_loss"] > 0 for record in single)
    nodes = [*EXACT, *MOE, "--ep", "2", "--batch_size", "2"]
    assert_same_run(log_of(tmp_path, "nodes", nodes, ranks=2, agents=2), single)


def test_sigterm_ends_a_run_that_cannot_save(tmp_path):
    (process,) = start([*EXACT, "--max_iters", "1000000", "--eval_interval", "0", "--log_file", str(tmp_path / "log")])
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    process.terminate()
    assert finish([process])[0] == [-signal.SIGTERM]


FEW = [*EXACT, *MOE, "--max_iters", "2", "--eval_interval", "0", "--block_size", "8", "--dropout", "0.1"]


def test_kernels_in_the_interpreter_give_the_plain_run_and_say_that_they_run(tmp_path):
    plain = log_here(tmp_path, "plain", [*FEW, "--batch_size", "2"])
    mesh = ["--tp", "2", "--batch_size", "2", "--fused", "--log_file", str(tmp_path / "fused.jsonl")]
    statuses, out, err = finish(start([*FEW, *mesh], ranks=2, TRITON_INTERPRET="1"))
    assert statuses == [0], err
    assert "kernels: fused kernels: Triton in the interpreter" in out
    fused = [json.loads(line) for line in (tmp_path / "fused.jsonl").read_text().splitlines()]
    for key in ("loss", "aux_loss", "grad_norm"):
        assert [record[key] for record in fused] == pytest.approx([record[key] for record in plain], rel=1e-9), key


def test_output_names_model_mesh_kernels_data_and_ends_with_a_sample_and_wandb_is_not_imported():
    arguments = [*TINY, "--max_iters", "3", "--fused", "--device", "cpu"]
    statuses, out, err = finish(start(arguments, PYTHONPROFILEIMPORTTIME="1"))
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines()}
    assert "torch" in imported and "wandb" not in imported
    assert statuses == [0]
    for start_of_line in (
        "config: {",
        "model: ",
        "mesh: dp 1 x ep 1 x pp 1 x tp 1 on ",
        "kernels: fused kernels: CPU forms",
        "data: ",
        "batch: ",
    ):
        assert f"\n{start_of_line}" in f"\n{out}"
    assert "validation loss" in out and "--- sample ---" in out


REFUSED = {
    "world size": ("--dp 2", "--dp 2 x --ep 1 x --pp 1 x --tp 1 = 2 ranks, but 1 process started"),
    "heads by tp": ("--tp 3", "--tp 3 does not divide --n_head 4"),
    "layers by pp": ("--pp 5", "--n_layer is 4"),
    "layers by virtual stages": (
        "--pp 2 --schedule interleaved --virtual_stages 3",
        "--pp 2 x --virtual_stages 3 stages need at least as many layers, but --n_layer is 4",
    ),
    "interleaved without a pipeline": ("--schedule interleaved", "but --pp is 1: use --schedule 1f1b"),
    "experts by ep": ("--ep 3 --num_experts 8", "--ep 3 does not divide --num_experts 8"),
    "ep without experts": ("--ep 2", "--num_experts is 0"),
    "top_k": ("--num_experts 2 --top_k 3", "--top_k 3 must be in 1..2"),
    "moe_freq": ("--num_experts 2 --moe_freq 5", "--moe_freq 5 must be in 1..4"),
    "microbatches": ("--grad_accum_steps 0", "--grad_accum_steps 0 must be at least 1"),
    "block size": ("--block_size 0", "--block_size 0 must be at least 1"),
    "heads": ("--n_head 3", "--n_head 3 does not divide --n_embed 128"),
    "amp on a CPU": ("--amp fp16 --device cpu", "--amp bf16"),
    "autotune without fused": ("--autotune", "--autotune measures launch parameters of the fused kernels: it needs"),
    "autotune on a CPU": ("--autotune --fused --device cpu", "needs a GPU, but --device is cpu"),
    "amp with float64": ("--amp bf16 --dtype float64", "--dtype float64"),
    "data_dir": ("--data_dir /nowhere", "/nowhere"),
    "nothing to resume": ("--resume auto", "--checkpoint_dir"),
    "save interval": ("--save_interval -1", "--save_interval -1 must be at least 0"),
    "loss scale": ("--loss_scale 0.5", "--loss_scale 0.5 must be a number of at least 1"),
    "loss scale's window": ("--loss_scale_window 0", "--loss_scale_window 0 must be at least 1"),
    "learning rates": ("--learning_rate 1e-4 --min_lr 1e-3", "--min_lr 0.001 is above --learning_rate 0.0001"),
    "dropout": ("--dropout 1", "--dropout 1.0 must be in [0, 1)"),
    "betas": ("--betas 0.9 1", "--betas 0.9 1.0"),
    "unknown flag": ("--batchsize 4", "--batchsize"),
    "a value": ("--schedule zigzag", "zigzag"),
    "chunks": ("--num_train_chunks 0", "--num_train_chunks 0"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_wrong_flags_are_refused_in_one_line_that_names_them(capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        # Where the world size is not what is wrong, let it be right.
        sizes = [int(n) for flag, n in zip(arguments.split(), arguments.split()[1:], strict=False) if flag[2:] in MESH]
        parse_args(arguments.split(), world_size=1 if "ranks, but" in message else int(np.prod(sizes)))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_schedule_that_nccl_cannot_carry_is_refused():
    two, three = (parse_args(f"--pp {pp} --schedule interleaved --n_layer 6".split(), world_size=pp) for pp in (2, 3))
    with pytest.raises(ValueError, match="--schedule interleaved with --pp 2 would block on nccl"):
        two.backend_on("cuda")
    assert (two.backend_on("cpu"), three.backend_on("cuda")) == ("gloo", "nccl")


MESH = ("dp", "ep", "pp", "tp")


def test_wrong_flags_are_refused_before_torch_is_imported():
    began = time.perf_counter()
    statuses, _, err = finish(start(["--tp", "2"]))
    assert statuses == [2] and err.startswith("train.py: error: ") and err.count("\n") == 1
    program = "import sys; import heiretsu.run.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert time.perf_counter() - began < 20  # far from the second that it takes, since other tests may be running


def test_autotune_is_refused_where_there_turns_out_to_be_no_gpu(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for devices in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(devices, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        train_here("--autotune", "--fused")
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "train.py: error: --autotune measures Triton kernels and needs a GPU, and this run is on the cpu\n"
    )


def choices_of_a_rank(mesh):
    """What this rank will launch, where a tuner would choose its rank; and the names of the calls that it was given."""
    asked = []

    def tune(calls, device):
        asked.extend(name.split()[0] for name in calls)
        return {launch.tiles_named("dropout").find("hopper"): {"num_warps": mesh.rank + 1}}

    with unittest.mock.patch.object(tuning.autotune, "tune", tune):
        config = parse_args([*TINY, "--dp", "2", "--fused"], world_size=2)
        data = dataset(config.model.vocab_size, config.model.block_size)
        tuning.tune_kernels(build_engine(config, mesh, fused), read_batches(config, mesh, data, 0))
    return CONTROL.chosen, asked


@pytest.mark.skipif(not fused.HAS_TRITON, reason="there is nothing to tune")
def test_every_rank_launches_what_rank_0_chose(ranks):
    (first, asked), (second, unasked) = ranks(choices_of_a_rank, dp=2)
    assert list(first.values()) == list(second.values()) == [{"num_warps": 1}]
    assert {*asked} == {"attention", "linear_cross_entropy", "bias_gelu", "layer_norm"} and unasked == []


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_tuning_took_of_a_gpu_is_given_back(kind):
    engine = types.SimpleNamespace(mesh=abstract_mesh(device=kind))
    with (
        unittest.mock.patch.object(tuning, "record_calls", lambda *_: []),
        unittest.mock.patch.object(tuning, "autotune", types.SimpleNamespace(tune=lambda *_: {}), create=True),
        unittest.mock.patch.object(torch.cuda, "empty_cache") as emptied,
    ):
        tuning.tune_kernels(engine, [])
    assert emptied.call_count == (kind == "cuda")


def write_data(folder: Path, train=1000, val=1000, tokens=None) -> list[str]:
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        if count:
            write_shard(
                folder / f"fineweb_{split}_000001.bin", rng.integers(200, size=count) if tokens is None else tokens
            )
    return ["--data_dir", str(folder), "--tokenizer", "bytes", *TINY, "--max_iters", "2"]


def test_data_dir_with_fineweb_names_is_read(tmp_path, capsys):
    train_here(*write_data(tmp_path))
    assert "1,000 training tokens" in capsys.readouterr().out


def corrupt(folder: Path) -> None:
    path = folder / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[1024:])  # without its header


BAD_DATA = {
    "no shards": (lambda folder: [path.unlink() for path in folder.iterdir()], "train"),
    "corrupt header": (corrupt, "fineweb_train_000001.bin: not a token shard"),
    "empty shard": (
        lambda folder: (folder / "fineweb_val_000001.bin").write_bytes(b""),
        "fineweb_val_000001.bin: empty",
    ),
    "short shard": (lambda folder: write_shard(folder / "fineweb_train_000001.bin", range(5)), "--block_size 16"),
    "token id": (
        lambda folder: write_shard(folder / "fineweb_train_000001.bin", [257] * 99),
        "token id 257 at position 0",
    ),
}


@pytest.mark.parametrize("spoil, message", BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_is_refused_by_name(tmp_path, capsys, monkeypatch, spoil, message):
    monkeypatch.delenv("RANK", raising=False)
    arguments = write_data(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_here(*arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_bad_data_ends_every_rank(tmp_path):
    arguments = write_data(tmp_path)
    corrupt(tmp_path)
    statuses, _, err = finish(start([*arguments, "--dp", "2", "--log_file", str(tmp_path / "log")], ranks=2))
    assert statuses == [1] and err.count("not a token shard") == 1
    assert not (tmp_path / "log").exists()


def test_sigterm_finishes_the_step_saves_and_resume_goes_on(tmp_path):
    arguments = [*EXACT, "--checkpoint_dir", str(tmp_path / "checkpoints"), "--sample_tokens", "0"]
    endless = [*arguments, "--max_iters", "1000000", "--eval_interval", "0", "--log_file", str(tmp_path / "a.jsonl")]
    (process,) = start(endless)
    while not (tmp_path / "a.jsonl").exists() or len((tmp_path / "a.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    process.terminate()
    statuses, out, err = finish([process])
    assert statuses == [0] and "stopped by SIGTERM" in out, out + err
    done = len((tmp_path / "a.jsonl").read_text().splitlines())
    log = log_of(tmp_path, "a", [*arguments, "--max_iters", str(done + 2), "--resume", "auto"])
    assert [record["step"] for record in log] == list(range(done + 2))
    straight = log_here(tmp_path, "b", [*EXACT, "--max_iters", str(done + 2)])
    losses = [record["loss"] for record in straight]
    assert [record["loss"] for record in log] == pytest.approx(losses, rel=1e-12)


def test_wandb_offline_run_holds_the_numbers_of_the_log_file(tmp_path):
    pytest.importorskip("wandb", reason="wandb is an extra")
    arguments = [*TINY, *MOE, "--max_iters", "3", "--wandb", "--wandb_mode", "offline", "--wandb_project", "there"]
    log = log_of(tmp_path, "log", arguments, WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows, project = read_wandb(path)
    assert project == "there" and len(rows) == 3
    for row, record in zip(rows, log, strict=True):
        assert {key: row[key] for key in record} == record
        assert sum(row[f"expert_load/layer0/expert{e}"] for e in range(4)) == pytest.approx(1.0)
        assert any(key.startswith("expert_load/chart_table") for key in row)
    assert {"mfu", "memory_mib", "aux_loss", "grad_norm", "lr"} <= log[0].keys()


def read_wandb(path: Path) -> tuple[list[dict], str]:
    """The history rows and the project of an offline run, from wandb's own record of it."""
    from wandb.proto import wandb_internal_pb2

    rows, project = [], ""
    for data in leveldb_records(path.read_bytes()[7:], offset=7):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            project = record.run.project
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows, project


def leveldb_records(log: bytes, offset: int):
    """Records of a LevelDB log: in blocks of 32 KiB, each behind a checksum (4 bytes), length (2) and type (1)."""
    position, parts = 0, b""
    while position < len(log):
        left = 2**15 - (position + offset) % 2**15
        if left < 7:  # the rest of a block is filled with zeros
            position += left
            continue
        length, kind = struct.unpack("<HB", log[position + 4 : position + 7])
        parts += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield parts
            parts = b""


def test_profile_writes_a_trace_for_each_rank_with_the_regions_named(tmp_path):
    arguments = [
        *TINY,
        "--pp",
        "2",
        "--grad_accum_steps",
        "2",
        "--max_iters",
        "6",
        "--profile",
        str(tmp_path / "trace"),
    ]
    statuses, out, err = finish(start(arguments, ranks=2))
    assert statuses == [0], err
    assert "by region:" in out and "by kernel:" in out
    for rank in (0, 1):
        names = {e.get("name") for e in json.loads((tmp_path / f"trace/rank{rank}.json").read_text())["traceEvents"]}
        assert {f"F0.{rank}", f"B1.{rank}", "optimizer", "average gradients", "all-reduce world"} <= names
        assert ("head" in names) == (rank == 1) and ("send F0.0" in names) == (rank == 0)


def test_init_from_takes_the_parameters_and_starts_anew(tmp_path):
    first = [*EXACT, "--max_iters", "4", "--checkpoint_dir", str(tmp_path / "a"), "--save_interval", "4"]
    before = log_of(tmp_path, "first", first)
    log = log_of(tmp_path, "second", [*EXACT, "--init_from", str(tmp_path / "a"), "--learning_rate", "1e-12"])
    assert log[0]["step"] == 0 and log[9]["eval_loss"] == pytest.approx(before[3]["eval_loss"], rel=1e-6)


def test_tokens_per_second_are_those_of_the_whole_batch(tmp_path, monkeypatch):
    """2 microbatches of 3 sequences of 16 tokens, each step half a second by the clock that it is given."""
    config = parse_args([*TINY, *"--batch_size 3 --grad_accum_steps 2 --max_iters 2 --eval_interval 0".split()], 1)
    config = replace(config, log_file=str(tmp_path / "log"), sample_tokens=0)
    mesh, data = abstract_mesh(), dataset(config.model.vocab_size, config.model.block_size)
    engine, clock = build_engine(config, mesh, plain), [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(run_log, "peak_flops", lambda *_: None)
    real = engine.step

    def step(*args):
        clock[0] += 0.5
        return real(*args)

    engine.step = step
    training.train(config, mesh, engine, data, data)
    assert [json.loads(line)["tokens_per_s"] for line in (tmp_path / "log").read_text().splitlines()] == [192.0] * 2
    assert replace(config, dp=2, ep=2, tp=2, pp=2).tokens_per_step == 4 * 96


def test_a_model_that_knows_nothing_is_evaluated_to_log_257_nats():
    config = parse_args([*TINY, "--eval_iters", "3"], world_size=1)
    engine = build_engine(config, abstract_mesh(), plain)
    for param in engine.params.values():
        param.data.zero_()
    tokens = np.random.default_rng(0).integers(257, size=999)
    data = TokenDataset([tokens], config.model.block_size, seed=0, vocab_size=257, bytes_per_token=1.25)
    found = evaluate(config, engine.mesh, engine, data)
    bits = 8.005624549193879  # log2(257) a token
    assert found == pytest.approx({"eval_loss": 5.54907608489522, "eval_bits_per_byte": bits / 1.25}, rel=1e-6)
