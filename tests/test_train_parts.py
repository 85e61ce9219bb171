"""The parts of train.py that a run of the command shows only in part: devices, the header, the sample, evaluation."""

import contextlib
import math
import runpy
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from heiretsu.data.batches import TokenDataset
from heiretsu.kernels import plain
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.pipeline import Context
from heiretsu.run import sampling
from heiretsu.run.batches import evaluate, read_batches
from heiretsu.run.building import build_engine
from heiretsu.run.device import find_device
from heiretsu.run.options import parse_args
from heiretsu.run.prepare import Prepared
from heiretsu.run.resume import Origin
from heiretsu.run.sampling import find_tokenizer, sample
from tests.training import MIXTURE, TRAIN, dataset, run_config


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as a machine without one can pretend; returns the device that was set."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("local_rank, index", [(None, 0), ("0", 0), ("1", 1)])
def test_each_rank_of_a_machine_has_its_own_gpu(gpus, monkeypatch, local_rank, index):
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert find_device(parse_args(["--amp", "bf16"])) == torch.device("cuda", index)
    assert gpus == [index]


def test_a_rank_without_a_gpu_is_refused(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="local rank 2 has no GPU: this machine has 2, and each rank needs its own"):
        find_device(parse_args([]))
    assert gpus == []


def test_what_a_device_cannot_do_is_refused(gpus, monkeypatch):
    config = parse_args(["--amp", "bf16"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ValueError, match="--amp bf16 needs a GPU of compute capability 8.0 or later: use --amp fp16"):
        find_device(config)
    assert find_device(replace(config, amp="fp16")).type == "cuda"
    assert find_device(replace(config, amp="none", autotune=True)).type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_device(config) == torch.device("cpu")
    with pytest.raises(ValueError, match="--amp fp16 needs a GPU, and this run is on the cpu: use --amp bf16"):
        find_device(replace(config, amp="fp16"))
    with pytest.raises(ValueError, match="--autotune measures Triton kernels and needs a GPU, and this run is on the"):
        find_device(replace(config, amp="none", autotune=True))


def header(*flags, **mesh):
    config = parse_args(list(flags), world_size=math.prod(mesh.values()))
    data = types.SimpleNamespace(num_tokens=1234567)
    mine = Prepared(config, rank=0, device=torch.device("cpu"), kernels="plain ops", train_data=data)
    first, *rest = mine.describe().split("\n")
    assert first == f"config: {config.to_json()}"
    return rest, config.model.num_parameters


def test_the_header_of_a_dense_model_on_one_process_to_the_letter():
    lines, count = header("--batch_size", "8", "--grad_accum_steps", "3", "--max_iters", "77")
    assert lines == [
        f"model: {count:,} parameters, 4 layers, 4 heads, 128 wide, vocabulary 257, block 128",
        "mesh: dp 1 x ep 1 x pp 1 x tp 1 on cpu",
        "kernels: plain ops; activations float32",
        "data: embedded corpus, 1,234,567 training tokens (bytes)",
        "batch: 24 sequences, 3,072 tokens; 77 steps",
    ]


def test_the_header_of_a_mixture_on_a_mesh_to_the_letter():
    flags = (
        "--num_experts 4 --top_k 1 --moe_freq 2 --ep 2 --pp 2 --schedule interleaved --grad_accum_steps 6 --amp bf16"
    )
    lines, count = header(*flags.split(), "--compile", "--data_dir", ".", "--tokenizer", "gpt2", ep=2, pp=2)
    assert lines == [
        f"model: {count:,} parameters, 4 layers, 4 heads, 128 wide, vocabulary 50257, block 128, 4 experts, top 1, "
        "every 2 layers",
        "mesh: dp 1 x ep 2 x pp 2 x tp 1 on cpu, interleaved over 6 microbatches, 2 stages a rank",
        "kernels: plain ops; activations bf16, compiled",
        "data: ., 1,234,567 training tokens (gpt2)",
        "batch: 192 sequences, 24,576 tokens; 1000 steps",
    ]


def test_a_pipeline_of_one_stage_a_rank_names_its_schedule():
    lines, _ = header("--pp", "2", "--dtype", "float64", pp=2)
    assert lines[1:3] == [
        "mesh: dp 1 x ep 1 x pp 2 x tp 1 on cpu, 1f1b over 1 microbatches",
        "kernels: plain ops; activations float64",
    ]


def test_there_is_a_tokenizer_for_a_sample_that_is_wanted_and_can_be_made(capsys):
    alone = abstract_mesh()
    assert find_tokenizer(parse_args([]), alone).name == "bytes"
    assert find_tokenizer(parse_args(["--sample_tokens", "0"]), alone) is None
    assert find_tokenizer(parse_args(["--dp", "2"], world_size=2), abstract_mesh(dp=2)) is None
    assert capsys.readouterr().out == ""
    config = parse_args(["--tokenizer", "gpt2", "--vocab_dir", "nowhere"])
    assert find_tokenizer(config, alone) is None
    said = capsys.readouterr().out
    assert said.startswith("there will be no sample at the end: --vocab_dir nowhere: cannot read ")


def test_the_sample_is_what_generate_gives_after_an_end_of_text(monkeypatch):
    config = parse_args("--n_layer 1 --n_head 1 --n_embed 8 --block_size 8 --sample_tokens 5 --seed 3".split())
    engine = build_engine(config, abstract_mesh(), plain)
    asked = []

    def generate(*arguments, **options):
        asked.append((arguments, options))
        yield from b"abc"

    monkeypatch.setattr(sampling, "generate", generate)
    tokenizer = find_tokenizer(config, abstract_mesh())
    assert sample(config, engine, tokenizer) == "--- sample ---\nabc\n---"
    assert asked == [((engine.stages[0], [256], 5), {"temperature": 0.9, "seed": 3})]


class Watched:
    """A dataset that notes which samples are read."""

    bytes_per_token = None

    def __init__(self, data):
        self.data, self.read = data, []

    def batch(self, step, indices):
        self.read.append((step, list(indices)))
        return self.data.batch(step, indices)

    def eval_batch(self, indices):
        self.read.append(("evaluation", list(indices)))
        return self.data.eval_batch(indices)


def test_each_replica_reads_its_own_part_of_a_global_batch():
    config = run_config(MIXTURE, global_batch=24, microbatches=2, dp=2, ep=2)  # 3 sequences a microbatch
    reads = []
    for rank in range(4):
        data = Watched(dataset(67, 8))
        mesh = abstract_mesh(dp=2, ep=2, rank=rank)
        batches = read_batches(config, mesh, data, 7)
        assert [batch.context for batch in batches] == [Context(7, 6 * rank), Context(7, 6 * rank + 3)]
        reads += data.read
    assert reads == [(7, list(range(start, start + 3))) for start in range(0, 24, 3)]


def test_an_evaluation_is_the_mean_over_the_first_global_batches():
    """And its bits are counted for a byte of text."""
    config = replace(run_config(MIXTURE, global_batch=24, microbatches=2, dp=2, ep=2), eval_iters=3)
    reads = []
    for rank in range(4):
        data, losses = Watched(dataset(67, 8)), iter([1.0, 2.0, 6.0])
        engine = types.SimpleNamespace(evaluate=lambda batches, losses=losses: {"loss": next(losses)})
        mesh = abstract_mesh(dp=2, ep=2, rank=rank)
        assert evaluate(config, mesh, engine, data) == {"eval_loss": 3.0}
        reads += data.read
    assert sorted(sum((indices for _, indices in reads), [])) == list(range(72))
    data = TokenDataset([np.zeros(100, dtype=np.uint16)], 8, 0, 67, bytes_per_token=4.0)
    engine = types.SimpleNamespace(evaluate=lambda batches: {"loss": 8 * math.log(2)})
    alone = replace(config, dp=1, ep=1)
    found = evaluate(alone, abstract_mesh(), engine, data)
    assert found == {"eval_loss": pytest.approx(8 * math.log(2)), "eval_bits_per_byte": pytest.approx(2.0)}


@pytest.fixture
def parts(monkeypatch):
    """train.py's functions, and what its parts were asked to do, in order; each of them is a fake."""
    found = runpy.run_path(TRAIN)
    did, mesh = [], types.SimpleNamespace(rank=0)
    data = types.SimpleNamespace(digest=lambda: "digest")
    hosts = types.SimpleNamespace(
        only_dp_crosses=lambda: True, crossing=lambda: ["pp", "tp"], describe=lambda: ["hosts"]
    )
    mine = types.SimpleNamespace(
        config=parse_args([]), device="a device", ops="ops", train_data=data, val_data="val", describe=lambda: "header"
    )
    state = types.SimpleNamespace(mine=mine, mesh=mesh, hosts=hosts, did=did, fails=None, origin=Origin("path", "ab12"))

    def part(name, answer=None):
        def do(*what, **named):
            did.append((name, *(one for one in what if not callable(one)), *named.values()))
            if state.fails == name:
                raise ValueError(f"{name} failed")
            for say in (one for one in what if callable(one)):
                say(f"by {name}")
            return answer

        return do

    @contextlib.contextmanager
    def held_folder(*what):
        part("held_folder")(*what)
        yield
        did.append("let go")

    @contextlib.contextmanager
    def together(*what):
        did.append(("together", *what))
        yield

    fakes = {
        "make_mesh": mesh, "find_origin": state.origin, "check_changes": None, "build_engine": "engine",
        "read_batches": "batches", "tune_kernels": None, "gather_hosts": hosts, "restore": 7, "train": None,
        "prepare": mine, "escape_what_cannot_be_printed": None,
    }  # fmt: skip
    names = found["run"].__globals__
    for name, answer in fakes.items():
        monkeypatch.setitem(names, name, part(name, answer))
    monkeypatch.setitem(names, "held_folder", held_folder)
    monkeypatch.setitem(names, "together", together)
    state.run, state.main = found["run"], found["main"]
    return state


def test_a_run_takes_its_folders_builds_restores_and_trains(parts, capsys):
    config, mesh, data = parts.mine.config, parts.mesh, parts.mine.train_data
    parts.run(parts.mine)
    facts = {"run_id": "ab12", "data": "digest"}
    steps = [
        ("make_mesh", 1, 1, 1, 1, "a device"),
        ("held_folder", config, mesh),
        ("find_origin", config, mesh),
        ("check_changes", config, parts.origin, "digest"),
        ("build_engine", config, mesh, "ops"),
        ("gather_hosts", mesh),
        ("restore", config, "engine", parts.origin),
        ("train", config, mesh, "engine", data, "val", 7, facts),
        "let go",
    ]
    assert parts.did == steps
    said = ["by held_folder", "by find_origin", "by check_changes", "header", "hosts", "by restore"]
    assert capsys.readouterr().out.splitlines() == said
    parts.mesh.rank = 1
    parts.did.clear()
    parts.run(parts.mine)
    assert parts.did == steps and capsys.readouterr().out == ""


def test_kernels_are_tuned_with_the_first_batch_before_the_run_begins(parts):
    parts.mine.config = replace(parts.mine.config, autotune=True)
    parts.run(parts.mine)
    data = parts.mine.train_data
    read = ("read_batches", parts.mine.config, parts.mesh, data, 0)
    at = parts.did.index(read)
    assert parts.did[at - 1][0] == "build_engine" and parts.did[at + 1] == ("tune_kernels", "engine", "batches")


@pytest.mark.parametrize("part", ["held_folder", "find_origin", "check_changes", "restore"])
def test_what_a_user_can_mend_is_one_line_and_status_2(parts, capsys, monkeypatch, part):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    parts.fails = part
    with pytest.raises(SystemExit) as stop:
        parts.run(parts.mine)
    assert stop.value.code == 2 and capsys.readouterr().err == f"train.py: error: {part} failed\n"
    assert "train" not in {what[0] for what in parts.did}


def test_checkpoints_of_hosts_that_share_no_folder_need_a_whole_model_on_the_first(parts, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    parts.hosts.only_dp_crosses = lambda: False
    parts.run(parts.mine)
    parts.mine.config = replace(parts.mine.config, local_checkpoints=True)
    with pytest.raises(SystemExit) as stop:
        parts.run(parts.mine)
    line = "train.py: error: --local_checkpoints: only dp may run between hosts, and here pp, tp does\n"
    assert stop.value.code == 2 and capsys.readouterr().err == line
    parts.hosts.only_dp_crosses = lambda: True
    parts.run(parts.mine)


def test_a_rank_prepares_meets_the_others_and_runs(parts):
    mine = parts.mine
    mine.backend, mine.rank, mine.report = "gloo", 3, "report"
    parts.main("config")
    assert parts.did[:3] == [
        ("escape_what_cannot_be_printed",),
        ("prepare", "config"),
        ("together", mine.config, "gloo", 3, "report"),
    ]
    assert parts.did[-2][0] == "train"
