"""Every flag of train.py: its default, its values, the first value that is refused, and what follows from it."""

import argparse
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from heiretsu.model.gpt import GPT, build_stages
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import config, options
from heiretsu.run.config import RunConfig
from heiretsu.run.flags import command_line
from heiretsu.run.memory import bytes_of_a_rank
from heiretsu.run.options import parse_args, refuse

DEFAULTS = {
    "preset": "tiny",
    "data_dir": None,
    "tokenizer": "bytes",
    "vocab_dir": None,
    "num_train_chunks": None,
    "num_val_chunks": None,
    "batch_size": 16,
    "grad_accum_steps": 1,
    "max_iters": 1000,
    "max_skips": 50,
    "check_replicas": 0,
    "eval_interval": 250,
    "eval_iters": 10,
    "learning_rate": 1e-3,
    "warmup_iters": 0,
    "min_lr": None,
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
    "grad_clip": 1.0,
    "amp": "none",
    "loss_scale": None,
    "loss_scale_window": 2000,
    "dtype": "float32",
    "compile": False,
    "fused": False,
    "autotune": False,
    "device": "auto",
    "dist_backend": None,
    "timeout": 600.0,
    "seed": 1337,
    "dp": 1,
    "ep": 1,
    "pp": 1,
    "tp": 1,
    "schedule": "1f1b",
    "virtual_stages": 2,
    "log_file": None,
    "wandb": False,
    "wandb_project": "heiretsu",
    "wandb_entity": None,
    "wandb_mode": "online",
    "run_name": None,
    "checkpoint_dir": None,
    "save_interval": 0,
    "allow_changes": False,
    "local_checkpoints": False,
    "on_save_error": "stop",
    "resume": "none",
    "init_from": None,
    "keep": 2,
    "profile": None,
    "memory_snapshot": False,
    "sample_tokens": 300,
}
MODEL_DEFAULTS = {
    "vocab_size": 257,
    "block_size": 128,
    "n_layer": 4,
    "n_head": 4,
    "n_embed": 128,
    "dropout": 0.0,
    "num_experts": 0,
    "top_k": 2,
    "moe_freq": 2,
    "aux_loss_coef": 0.01,
}
# Every flag that takes a value, at one that is not its default and of its type.
GIVEN = {
    "preset": "gpt2",
    "data_dir": ".",
    "tokenizer": "gpt2",
    "vocab_dir": "vocabulary",
    "num_train_chunks": 3,
    "num_val_chunks": 2,
    "batch_size": 5,
    "grad_accum_steps": 6,
    "max_iters": 70,
    "max_skips": 19,
    "check_replicas": 18,
    "eval_interval": 7,
    "eval_iters": 8,
    "learning_rate": 0.25,
    "warmup_iters": 9,
    "min_lr": 0.125,
    "weight_decay": 0.5,
    "betas": (0.75, 0.875),
    "grad_clip": 2.5,
    "amp": "bf16",
    "loss_scale": 1024.0,
    "loss_scale_window": 11,
    "device": "cpu",
    "dist_backend": "gloo",
    "timeout": 12.5,
    "seed": 13,
    "dp": 2,
    "ep": 3,
    "pp": 4,
    "tp": 1,
    "schedule": "interleaved",
    "virtual_stages": 3,
    "log_file": "log.jsonl",
    "wandb_project": "project",
    "wandb_entity": "entity",
    "wandb_mode": "offline",
    "run_name": "name",
    "checkpoint_dir": "folder",
    "save_interval": 14,
    "on_save_error": "continue",
    "resume": "auto",
    "init_from": "first",
    "keep": 15,
    "profile": "traces",
    "sample_tokens": 16,
}
MODEL_GIVEN = {
    "block_size": 17,
    "n_layer": 12,
    "n_head": 3,
    "n_embed": 18,
    "dropout": 0.25,
    "num_experts": 6,
    "top_k": 4,
    "moe_freq": 5,
    "aux_loss_coef": 0.75,
}
SWITCHES = ("allow_changes", "compile", "fused", "wandb", "memory_snapshot", "local_checkpoints")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def words(values: dict) -> list[str]:
    return [
        word
        for name, value in values.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, tuple) else (value,)))
    ]


def test_defaults():
    config = asdict(parse_args([]))
    assert config.pop("model") == MODEL_DEFAULTS
    assert {name: config[name] for name in DEFAULTS} == DEFAULTS
    assert replace(RunConfig(), tokenizer="bytes") == parse_args([])


def test_every_flag_arrives_as_it_was_given():
    config = parse_args([*words(GIVEN | MODEL_GIVEN), *(f"--{name}" for name in SWITCHES)], world_size=24)
    found = asdict(config)
    model = found.pop("model")
    for name, value in {**GIVEN, **dict.fromkeys(SWITCHES, True)}.items():
        assert found[name] == value and type(found[name]) is type(value), name
    for name, value in MODEL_GIVEN.items():
        assert model[name] == value and type(model[name]) is type(value), name
    assert model["vocab_size"] == 50257
    assert json.loads(config.to_json()) == json.loads(json.dumps(asdict(config)))


def test_sizes_that_follow_by_hand():
    config = parse_args([*words(GIVEN | MODEL_GIVEN)], world_size=24)
    assert (config.replicas, config.num_ranks, config.stages_per_rank) == (6, 24, 3)
    assert (config.global_batch_size, config.tokens_per_step) == (5 * 6 * 6, 5 * 6 * 6 * 17)
    assert parse_args(["--pp", "2", "--virtual_stages", "2"], world_size=2).stages_per_rank == 1
    mesh = "--dp 2 --ep 1 --pp 3 --tp 4 --n_layer 3 --grad_accum_steps 3".split()
    assert parse_args(mesh, world_size=24).mesh == (2, 1, 3, 4)


AT_LEAST_1 = (
    "batch_size grad_accum_steps max_iters max_skips eval_iters dp ep pp tp virtual_stages keep loss_scale_window "
    "num_train_chunks num_val_chunks n_layer n_head block_size"
).split()
AT_LEAST_0 = (
    "eval_interval check_replicas warmup_iters weight_decay grad_clip save_interval sample_tokens num_experts".split()
)
NOT_NEGATIVE = ("weight_decay", "grad_clip", "min_lr", "aux_loss_coef")
EDGES = [  # what is needed beside it, the last that is taken, the first that is refused, what is said of it
    *(("", f"--{name} 1", f"--{name} 0", f"--{name} 0 must be at least 1") for name in AT_LEAST_1),
    *(("", f"--{name} 0", f"--{name} -1", rf"--{name} -1(\.0)? must be at least 0") for name in AT_LEAST_0),
    ("--n_head 1", "--n_embed 1", "--n_embed 0", "--n_embed 0 must be at least 1"),
    ("", "--timeout 0.001", "--timeout 0", "--timeout 0.0 must be above 0, and at most 604800 seconds"),
    ("", "--timeout 604800", "--timeout 604801", "--timeout 604801.0 must be above 0, and at most 604800 seconds"),
    ("", "--timeout 1", "--timeout nan", "--timeout nan must be above 0"),
    ("", "--loss_scale 1", "--loss_scale 0.99", "--loss_scale 0.99 must be a number of at least 1"),
    ("", "--loss_scale 1e38", "--loss_scale inf", "--loss_scale inf must be a number of at least 1"),
    *(("", f"--{n} 1e-30", f"--{n} nan", f"--{n} nan must be at least 0, and finite") for n in NOT_NEGATIVE),
    *(
        ("--learning_rate 2", f"--{n} 1", f"--{n} inf", f"--{n} inf must be at least 0, and finite")
        for n in NOT_NEGATIVE
    ),
    *(("", f"--{n} 0", f"--{n} -0.001", f"--{n} -0.001 must be at least 0, and finite") for n in NOT_NEGATIVE),
    ("", "--learning_rate 1e30", "--learning_rate inf", "--learning_rate inf must be above 0, and finite"),
    ("", "--learning_rate 1", "--learning_rate nan", "--learning_rate nan must be above 0, and finite"),
    ("", "--dropout 0", "--dropout nan", r"--dropout nan must be in \[0, 1\)"),
    ("", f"--seed {2**64 - 1}", f"--seed {2**64}", rf"--seed {2**64} must be at least 0, and below 2\*\*64"),
    ("", "--seed 0", "--seed -1", "--seed -1 must be at least 0"),
    (
        "",
        f"--max_iters {2**63 - 1}",
        f"--max_iters {2**63}",
        rf"--max_iters {2**63} must be at least 1, and below 2\*\*63",
    ),
    ("", "--learning_rate 1e-30", "--learning_rate 0", "--learning_rate 0.0 must be above 0"),
    ("", "--betas 0 0", "--betas -0.1 0", r"--betas -0.1 0.0 must both be in \[0, 1\)"),
    ("", "--betas 0.99 0.999", "--betas 0.99 1", r"--betas 0.99 1.0 must both be in \[0, 1\)"),
    ("", "--dropout 0", "--dropout -0.1", r"--dropout -0.1 must be in \[0, 1\)"),
    ("", "--dropout 0.99", "--dropout 1", r"--dropout 1.0 must be in \[0, 1\)"),
    ("--num_experts 4", "--top_k 1", "--top_k 0", "--top_k 0 must be in 1..4, the number of --num_experts"),
    ("--num_experts 4", "--top_k 4", "--top_k 5", "--top_k 5 must be in 1..4, the number of --num_experts"),
    ("--num_experts 4", "--moe_freq 1", "--moe_freq 0", r"--moe_freq 0 must be in 1..4 \(--n_layer\)"),
    ("--num_experts 4", "--moe_freq 4", "--moe_freq 5", r"--moe_freq 5 must be in 1..4 \(--n_layer\)"),
    ("", "--top_k 9 --moe_freq 9", "--top_k 9 --num_experts 2", "--top_k 9 must be in 1..2"),
    ("", "--min_lr 0.001", "--min_lr 0.0011", "--min_lr 0.0011 is above --learning_rate 0.001"),
    ("", "--warmup_iters 1000", "--warmup_iters 1001", "--warmup_iters 1001 is more than --max_iters 1000"),
    ("", "--n_embed 130 --n_head 2", "--n_embed 130", "--n_head 4 does not divide --n_embed 130: heads have equal"),
    ("", "--amp bf16 --device cpu", "--amp fp16 --device cpu", "--amp fp16 needs a GPU, but --device is cpu"),
    ("--dtype float64", "--amp none", "--amp bf16", "--amp bf16 lowers precision and --dtype float64 raises it"),
    ("", "--autotune --fused", "--autotune", "--autotune measures launch parameters .*: it needs --fused"),
    ("--fused", "--autotune --device cuda", "--autotune --device mps", "needs a GPU, but --device is mps"),
    ("", "--resume auto --checkpoint_dir a", "--resume auto", "--resume auto looks in --checkpoint_dir, which is not"),
    ("", "--resume .", "--resume nowhere", "nowhere: there is no such folder"),
    ("--init_from a", "--resume none", "--resume b", "--init_from starts a new run and --resume goes on with one"),
    ("--memory_snapshot", "--profile a", "", "--memory_snapshot is written beside the traces: it needs --profile DIR"),
    ("", "--data_dir .", "--data_dir nowhere", "--data_dir nowhere: there is no such directory"),
    ("--ep 2", "--num_experts 2", "--num_experts 0", "--ep 2 splits experts, but --num_experts is 0"),
    ("--ep 2", "--num_experts 4", "--num_experts 3", "--ep 2 does not divide --num_experts 3"),
    ("--n_head 8", "--tp 8", "--tp 3", r"--tp 3 does not divide --n_head 8: .* \(try --tp 1, 2, 4, 8\)"),
    ("--schedule interleaved", "--pp 2", "--pp 1", "--schedule interleaved deals out .* but --pp is 1"),
    ("--schedule interleaved --pp 2", "--n_layer 4", "--n_layer 3", "--pp 2 x --virtual_stages 2 .* --n_layer is 3"),
]


@pytest.mark.parametrize("beside, taken, refused, message", EDGES, ids=[edge[2] or edge[0] for edge in EDGES])
def test_the_last_value_is_taken_and_the_first_beyond_it_refused(capsys, beside, taken, refused, message):
    def run(arguments):
        given = arguments.split()
        sizes = [int(n) for flag, n in zip(given, given[1:], strict=False) if flag[2:] in ("dp", "ep", "pp", "tp")]
        world_size = math.prod(sizes)
        return parse_args(given, world_size=world_size)

    assert isinstance(run(f"{beside} {taken}"), RunConfig)
    with pytest.raises(SystemExit) as stop:
        run(f"{beside} {refused}")
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out
    assert re.fullmatch(rf"train\.py: error: .*{message}.*\n", said.err), said.err


CHOICES = {
    "tokenizer": ("bytes", "gpt2"),
    "preset": ("tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
    "schedule": ("gpipe", "1f1b", "interleaved"),
    "dist_backend": ("nccl", "gloo"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "amp": ("none", "fp16", "bf16"),
    "dtype": ("float32", "float64"),
    "wandb_mode": ("online", "offline", "disabled"),
    "on_save_error": ("stop", "continue"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_taken_and_no_other(capsys, name):
    for value in CHOICES[name]:
        ranks = 2 if value == "interleaved" else 1
        assert getattr(parse_args([f"--{name}", value, "--pp", str(ranks)], world_size=ranks), name) == value
    with pytest.raises(SystemExit):
        parse_args([f"--{name}", "another"])
    said = capsys.readouterr().err
    assert all(value in said for value in CHOICES[name]) and said.count("\n") == 1


def test_presets_bring_their_sizes_and_flags_override_them():
    sizes = {"tiny": (4, 4, 128, 128), "gpt2": (12, 12, 768, 1024), "gpt2-xl": (48, 25, 1600, 1024)}
    for preset, expected in sizes.items():
        model = parse_args(["--preset", preset]).model
        assert (model.n_layer, model.n_head, model.n_embed, model.block_size) == expected
    model = parse_args(["--preset", "gpt2", "--n_layer", "2"]).model
    assert (model.n_layer, model.n_head) == (2, 12)


def test_the_vocabulary_is_that_of_the_tokenizer():
    assert parse_args([]).model.vocab_size == 257
    assert parse_args(["--tokenizer", "gpt2"]).model.vocab_size == 50257
    undecided = parse_args(["--data_dir", "."])
    assert (undecided.tokenizer, undecided.model.vocab_size) == (None, 50257)
    decided = undecided.with_tokenizer("bytes")
    assert (decided.tokenizer, decided.model.vocab_size, decided.data_dir) == ("bytes", 257, ".")
    assert parse_args(["--data_dir", ".", "--tokenizer", "bytes"]).tokenizer == "bytes"


def test_a_run_that_saves_has_a_folder_to_save_to():
    assert parse_args(["--save_interval", "5"]).checkpoint_dir == "runs/checkpoints"
    assert parse_args(["--save_interval", "5", "--run_name", "mine"]).checkpoint_dir == "runs/mine"
    assert parse_args(["--save_interval", "5", "--checkpoint_dir", "here"]).checkpoint_dir == "here"
    assert parse_args(["--run_name", "mine"]).checkpoint_dir is None


def test_messages_go_by_nccl_on_cuda_and_gloo_elsewhere_unless_told():
    config = parse_args([])
    assert [config.backend_on(kind) for kind in ("cuda", "cpu", "mps")] == ["nccl", "gloo", "gloo"]
    assert parse_args(["--dist_backend", "gloo"]).backend_on("cuda") == "gloo"
    interleaved = ["--schedule", "interleaved", "--n_layer", "6"]
    with pytest.raises(ValueError, match="--schedule interleaved with --pp 2 would block on nccl: use --pp 3 or more"):
        parse_args([*interleaved, "--pp", "2"], world_size=2).backend_on("cuda")
    assert parse_args([*interleaved, "--pp", "2"], world_size=2).backend_on("cpu") == "gloo"
    assert parse_args([*interleaved, "--pp", "3"], world_size=3).backend_on("cuda") == "nccl"
    assert parse_args(["--pp", "2"], world_size=2).backend_on("cuda") == "nccl"
    one_stage = [*interleaved, "--virtual_stages", "1", "--pp", "2"]
    assert parse_args(one_stage, world_size=2).backend_on("cuda") == "nccl"


def test_the_world_is_what_torchrun_says(monkeypatch, capsys):
    for started, message in (
        ("1", "--dp 2 x --ep 1 x --pp 1 x --tp 1 = 2 ranks, but 1 process started: use torchrun --nproc_per_node=2"),
        ("3", "= 2 ranks, but 3 processes started: use torchrun --nproc_per_node=2"),
    ):
        monkeypatch.setenv("WORLD_SIZE", started)
        with pytest.raises(SystemExit):
            parse_args(["--dp", "2"])
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse_args(["--dp", "2"]).dp == 2


def test_one_rank_of_a_host_speaks_and_the_others_leave_it_the_time_to(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(options.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as first:
        refuse("it is wrong")
    assert capsys.readouterr().err == "train.py: error: it is wrong\n" and waited == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit):
        refuse("it is wrong")
    assert waited == [] and capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as second:
        refuse("it is wrong")
    assert (first.value.code, second.value.code) == (2, 2)
    assert waited == [2] and capsys.readouterr().err == ""


def test_switches_lists_and_absences_become_flags():
    values = {"fused": True, "compile": False, "min_lr": None, "betas": (0.9, 0.99), "max_iters": 5}
    assert command_line(values) == ["--fused", "--betas", "0.9", "0.99", "--max_iters", "5"]


def test_help_tells_defaults_and_a_flag_cannot_be_shortened(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    groups = [
        "data",
        "model",
        "optimisation",
        "parallelism",
        "device and precision",
        "evaluation, logs and checkpoints",
    ]
    assert [line[:-1] for line in out.splitlines() if line.endswith(":") and line[0] != " "][-6:] == groups
    told = " ".join(out.split())
    for text in ("optimizer steps (default: 1000)", "checkpoints kept (default: 2)", "--betas B1 B2"):
        assert text in told
    with pytest.raises(SystemExit):
        parse_args(["--max_iter", "5"])
    assert "unrecognized arguments: --max_iter 5 (see train.py --help)" in capsys.readouterr().err


def flags_in_words() -> str:
    """Each flag, under its heading: type, default, choices, names of its values, help, and its bounds."""
    lines = []
    for group in options._parser()._action_groups:
        lines += [f"[{group.title}]"] if group._group_actions and group.title in config.GROUPS else []
        for action in group._group_actions if lines else ():
            bounds = config.FLAGS[action.dest].bounds
            kind = action.type.__name__ if action.type else type(action).__name__.strip("_")
            parts = [*action.option_strings, kind, action.default, action.choices, action.nargs, action.metavar]
            about = (
                "" if bounds is None else f" | {bounds.low} {bounds.above} {bounds.below} {bounds.high} {bounds.words}"
            )
            lines.append(f"{' '.join(map(str, parts))} | {action.help}{about}")
    return "\n".join(lines) + "\n"


def test_the_flags_are_those_of_the_list():
    """A change of a flag is a change of flags.txt: what a user's scripts rely on is not changed by the way."""
    listed = Path(__file__).with_name("flags.txt")
    assert flags_in_words() == listed.read_text(), f"a change that is meant goes into {listed}, too"


def test_every_flag_is_in_one_of_these_tables():
    """So that a new one gets its default, its type and its edges judged here, too."""
    flags = {action.dest for action in options._parser()._actions if not isinstance(action, argparse._HelpAction)}
    assert flags - set(DEFAULTS) - set(MODEL_DEFAULTS) == set()
    assert flags - set(GIVEN) - set(MODEL_GIVEN) - set(SWITCHES) == {"autotune", "dtype"}


def test_every_number_has_its_bounds():
    numbers = {action.dest for action in options._parser()._actions if action.type in (int, float)}
    assert len(numbers) > 30 and numbers == {name for name, flag in config.FLAGS.items() if flag.bounds}


FAR_TOO_LARGE = (
    "--batch_size 1000000000000",
    "--n_layer 10000000",
    "--n_embed 10000000 --n_head 2",
    "--block_size 100000000",
    "--num_experts 1000000000",
    "--grad_accum_steps 10000000000",
)


@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize("flags", FAR_TOO_LARGE)
def test_what_fits_no_memory_is_refused_at_once_by_its_bytes(capsys, flags, device):
    with pytest.raises(SystemExit) as stop:
        parse_args([*flags.split(), "--device", device], world_size=1)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert flags.split(" --n_head")[0] in said and re.search(r"need \S+ [TPE]iB a rank \(parameters ", said), said


def test_bytes_of_a_rank_are_those_of_its_tensors():
    """The rank with the most of them, on a mesh that splits everything."""
    flags = "--preset gpt2 --tokenizer gpt2 --num_experts 8 --moe_freq 2 --amp bf16 --fused"
    alone = bytes_of_a_rank(parse_args(flags.split(), world_size=1))
    mesh = abstract_mesh(device="meta")
    whole = sum(p.numel() for p in GPT(parse_args(flags.split(), world_size=1).model, mesh, ops=None).parameters())
    assert alone.parameters == pytest.approx(4 * whole, rel=0.001)
    assert (alone.gradients, alone.moments) == (alone.parameters, 2 * alone.parameters)
    assert alone.tokens == pytest.approx(16 * 16 * 1024, rel=0.01)
    split = bytes_of_a_rank(parse_args(f"{flags} --ep 2 --pp 2 --tp 2 --n_head 12".split(), world_size=8))
    mesh = abstract_mesh(1, 2, 2, 2, rank=0, device="meta")
    stages = build_stages(parse_args(flags.split(), world_size=1).model, mesh, None, torch.float32, None, 0, 1)
    mine = sum(p.numel() for stage in stages for p in stage.parameters())
    assert split.parameters == pytest.approx(4 * mine, rel=0.2)  # the last stage has fewer layers, for its head
