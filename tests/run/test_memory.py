"""The bytes that a rank is taken to need, counted by hand for two runs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from heiretsu.run import memory
from heiretsu.run.memory import Bytes, bytes_of_a_rank, check_memory
from heiretsu.run.options import parse_args


def test_a_small_model_on_one_process():
    """4 layers of 128, 4 heads, block 128, vocabulary 257 padded to 384; 16 sequences."""
    need = bytes_of_a_rank(parse_args([]))
    elements = 4 * (4 * 128 * 128 + 2 * 128 * 512 + 13 * 128) + 384 * 128 + 128 * 128 + 2 * 128
    kept = 5 * 128 + 4 * 128 + 2 * 512 + 2 * 4 * 128  # scores and probabilities at the end
    activations = 2048 * kept * 4 * 4 + 2 * 2048 * 384 * 4
    found = tuple(vars(need).values())
    assert found == (4 * elements, 4 * elements, 8 * elements, 2 * 8 * 2048 + memory._ACTION_BYTES, activations)
    wide = tuple(vars(bytes_of_a_rank(parse_args(["--dtype", "float64"]))).values())
    assert wide[:3] == (8 * elements, 8 * elements, 16 * elements)


def test_a_mixture_on_a_mesh():
    """Two layers a rank, one of them a mixture with two of four experts here; halves of all features; bf16."""
    flags = "--ep 2 --pp 2 --tp 2 --num_experts 4 --moe_freq 2 --grad_accum_steps 4 --fused --amp bf16"
    config = parse_args(flags.split(), world_size=8)
    attention, experts = 4 * 128 * 128 // 2 + 3 * 128 // 2 + 5 * 128, 2 * (128 * 512 + 256 + 128) + 4 * 128
    elements = 2 * attention + 128 * 512 + 256 + 128 + experts + 384 * 128 // 2 + 128 * 128 + 2 * 128
    need, all_at_once = (tuple(vars(bytes_of_a_rank(c)).values()) for c in (config, replace(config, schedule="gpipe")))
    kept = 5 * 128 + (4 * 128 + 2 * 2 * 512) // 2
    assert need[:3] == (4 * elements, 4 * elements, 8 * elements)
    assert need[3] == 4 * (2 * 8 * 2048 + memory._ACTION_BYTES)
    assert (need[4], all_at_once[4]) == (2048 * kept * 2 * 2 * 2, 2048 * kept * 2 * 2 * 4)
    no_mixture_here = replace(config, model=replace(config.model, moe_freq=3, n_layer=2))
    dense = replace(config, model=replace(config.model, num_experts=0, n_layer=2), ep=1)
    layers = (bytes_of_a_rank(c).parameters for c in (no_mixture_here, dense))
    assert next(layers) == next(layers)


def test_layers_and_mixtures_that_do_not_divide_are_counted_where_there_are_most():
    """Five layers over two ranks of a pipeline: three; one mixture of the five, on one of them."""
    config = parse_args("--n_layer 5 --pp 2 --num_experts 2 --moe_freq 4 --grad_accum_steps 3".split(), world_size=2)
    model = config.model
    elements = 2 * model.block_parameters(False, 1, 1) + model.block_parameters(True, 1, 1)
    elements += 384 * 128 + 130 * 128
    need = bytes_of_a_rank(config)
    assert need.parameters == 4 * elements
    kept = 5 * 128 + 4 * 128 + 2 * 2 * 512 + 2 * 4 * 128
    assert need.activations == 2048 * kept * 4 * 3 * 2 + 2 * 2048 * 384 * 4  # two microbatches in flight
    split = bytes_of_a_rank(replace(config, tp=2))
    assert split.activations == 2048 * (5 * 128 + (4 * 128 + 2 * 2 * 512) // 2 + 2 * 4 * 128 // 2) * 4 * 3 * 2 + (
        2 * 2048 * 384 // 2 * 4
    )


def test_what_is_certain_and_what_is_not():
    need = Bytes(1, 20, 300, 4000, 50000)
    assert (need.state, need.certain, need.total) == (321, 4321, 54321)


GiB = 2**30


@pytest.mark.parametrize(
    "device, host, need, whose",
    [
        ("cpu", 10, Bytes(5 * GiB, 0, 0, 5 * GiB, 30 * GiB), None),  # all of it, and four times with the estimate
        ("cpu", 10, Bytes(5 * GiB, 0, 0, 5 * GiB + 1, 0), "this machine has 10 GiB"),
        ("cpu", 10, Bytes(5 * GiB, 0, 0, 5 * GiB, 30 * GiB + 1), "this machine has 10 GiB"),
        ("auto", 10, Bytes(288 * GiB, 0, 0, 0, 0), None),
        ("cuda", 10, Bytes(288 * GiB, 1, 0, 0, 0), "the largest device has 288 GiB"),
        ("auto", 300, Bytes(300 * GiB, 0, 0, 0, 0), None),
        ("auto", 300, Bytes(300 * GiB, 0, 1, 0, 0), "the largest device has 300 GiB"),
    ],
)
def test_a_run_that_is_far_from_fitting_is_refused_and_one_at_the_edge_is_not(monkeypatch, device, host, need, whose):
    config = replace(parse_args([]), device=device)
    monkeypatch.setattr(memory, "host_bytes", lambda: 2 * host * GiB)
    monkeypatch.setattr(memory, "bytes_of_a_rank", lambda config: need)
    told = {"LOCAL_WORLD_SIZE": "2"}
    if whose is None:
        check_memory(config, told)
        return
    with pytest.raises(ValueError) as refusal:
        check_memory(config, told)
    assert " GiB a rank (parameters " in str(refusal.value)
    assert str(refusal.value).endswith(f", and {whose} for each: take less, or more ranks")
    if device == "cpu":
        check_memory(config, {})  # alone, it has twice as much


def test_the_refusal_to_the_letter(monkeypatch):
    config = replace(parse_args(["--num_experts", "3", "--grad_accum_steps", "7"]), device="cpu")
    monkeypatch.setattr(memory, "host_bytes", lambda: 1000)
    monkeypatch.setattr(memory, "bytes_of_a_rank", lambda config: Bytes(1023, 1024, 3 * 2**19, 5 * GiB, 2**50))
    with pytest.raises(ValueError) as refusal:
        check_memory(config, {})
    assert str(refusal.value) == (
        "--n_layer 4 --n_embed 128 --num_experts 3 --block_size 128 --batch_size 16 --grad_accum_steps 7 need 1 PiB a "
        "rank (parameters 1023 bytes, gradients 1 KiB, moments 2 MiB, tokens 5 GiB, activations 1 PiB), and this "
        "machine has 1000 bytes for each: take less, or more ranks"
    )
    assert [memory._words(2**n) for n in (10, 20, 30, 40, 50, 60, 74)] == [
        "1 KiB", "1 MiB", "1 GiB", "1 TiB", "1 PiB", "1 EiB", "1.64e+04 EiB",
    ]  # fmt: skip


def test_a_machines_memory_is_that_of_its_container_where_it_is_held_to_less(monkeypatch):
    limit = SimpleNamespace(there=True, text="max\n", is_file=lambda: limit.there, read_text=lambda: limit.text)
    monkeypatch.setattr(memory, "Path", {"/sys/fs/cgroup/memory.max": limit}.get)
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100}.get)
    assert memory.host_bytes() == 409600
    for limit.text, least in (("1000\n", 1000), ("9999999\n", 409600)):
        assert memory.host_bytes() == least
    limit.there = False
    assert memory.host_bytes() == 409600
