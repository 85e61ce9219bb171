"""The bytes that a rank is taken to need, counted by hand for two runs."""

from dataclasses import replace

from heiretsu.run import memory
from heiretsu.run.memory import bytes_of_a_rank
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
