"""sample.py: text from the checkpoint of any mesh, the same every time, or one line that says what is wrong."""

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from heiretsu.data.tokenizer import load_tokenizer
from heiretsu.kernels import plain
from heiretsu.parallel import checkpoint_folder
from heiretsu.run import saved, state
from heiretsu.run.batches import read_batches
from heiretsu.run.building import build_engine
from heiretsu.run.options import parse_args
from heiretsu.run.sampling import generate
from heiretsu.run.saved import load_model, newest_in
from tests.training import dataset

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "sample.py")
FLAGS = "--n_layer 2 --n_head 2 --n_embed 16 --block_size 16 --batch_size 2 --learning_rate 0.05 --tokenizer bytes"
MIXTURE = ("--num_experts", "2", "--moe_freq", "2")


def save_two(mesh, folder: Path, flags: list[str]) -> dict[str, torch.Tensor]:
    """Checkpoints after steps 1 and 2 of a small run. Returns this rank's first-layer norm, whole on every rank."""
    config = parse_args([*FLAGS.split(), *flags], mesh.world.size)
    engine = build_engine(config, mesh, plain)
    data = dataset(config.model.vocab_size, config.model.block_size)
    for step in (0, 1):
        engine.step(read_batches(config, mesh, data, step))
        state.save(folder, step + 1, engine, json.loads(config.to_json()), keep=2)
    return {name: param.detach() for name, param in engine.params.items()}


@pytest.fixture(scope="module")
def dense(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return folder, ranks(save_two, folder, [])[0]


def text(capsys, folder: Path, *flags: str) -> str:
    sample.main(sample.parse_args(["--checkpoint", str(folder), "--device", "cpu", *flags]))
    return capsys.readouterr().out


def test_it_is_what_the_model_of_the_newest_checkpoint_says(capsys, dense):
    folder, params = dense
    path = newest_in(folder, print)
    assert path.name == "step_00000002" and newest_in(path, print) == path
    model, run = load_model(folder, plain)
    assert run["step"] == 2 and not model.training
    for name, param in model.named_parameters():
        assert torch.equal(param, params[name]), name
    tokenizer = load_tokenizer("bytes")
    tokens = list(generate(model, tokenizer.encode_ordinary("The "), 30, temperature=0.9, top_k=20, seed=5))
    assert tokenizer.eot_token not in tokens
    flags = "--num_tokens 30 --temperature 0.9 --top_k 20 --seed 5".split()
    assert text(capsys, folder, "--prompt", "The ", *flags) == "The " + tokenizer.decode(tokens) + "\n"


def test_a_checkpoint_is_read_against_its_checksums_once(capsys, dense, monkeypatch):
    read = []
    monkeypatch.setattr(saved, "verify", lambda path, mesh=None: read.append(path))
    monkeypatch.setattr(checkpoint_folder, "verify", lambda path, mesh=None: read.append(path))
    text(capsys, dense[0], "--num_tokens", "1")
    assert read == [dense[0] / "step_00000002"]


def test_it_asks_for_the_device_that_its_flags_and_the_checkpoint_need(capsys, dense, monkeypatch):
    asked, shown = [], []
    monkeypatch.setattr(sample, "choose_device", lambda *args, **kwargs: asked.append((args, kwargs)) or "cpu")
    monkeypatch.setattr(sample, "print", lambda *args, **kwargs: shown.append(kwargs.get("flush")), raising=False)
    text(capsys, dense[0], "--num_tokens", "1", "--fused")
    assert asked == [(("cpu",), {"fused": True, "float64": False})]
    assert shown == [
        True,
        True,
        True,
        True,
        None,
    ]  # the text as it is made: what made it, the prompt, a token, the rest
    monkeypatch.setattr(sample, "read_run", lambda path: {"config": {"dtype": "float64"}})
    text(capsys, dense[0], "--num_tokens", "1")
    assert asked[1:] == [(("cpu",), {"fused": False, "float64": True})]


@pytest.mark.parametrize("script", ["sample.py", "convert.py", "data/prepare.py", "data/fineweb.py"])
def test_what_is_not_installed_says_how_to(script, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "heiretsu" else real(name, *at))
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit, match=r"^heiretsu is not installed: run `pip install -e \.` "):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_convert_wants_a_direction(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert.py"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "convert.py"), run_name="__main__")
    assert exit.value.code == 2
    assert "convert.py: error: the following arguments are required: direction\n" in capsys.readouterr().err


def test_a_seed_repeats_itself_and_another_does_not(capsys, dense):
    one, again, other = (text(capsys, dense[0], "--num_tokens", "40", "--seed", seed) for seed in "445")
    assert one == again != other


def test_the_likeliest_token_needs_no_seed(capsys, dense):
    cold = [text(capsys, dense[0], "--temperature", "0", "--num_tokens", "9", "--seed", seed) for seed in "12"]
    top_1 = text(capsys, dense[0], "--top_k", "1", "--num_tokens", "9")
    assert cold == [top_1, top_1]


@pytest.mark.parametrize(
    "mesh, mixture", [({"tp": 2, "pp": 2}, ()), ({"ep": 2, "dp": 2}, MIXTURE)], ids=["dense", "mixture"]
)
def test_any_mesh_may_have_saved_it(ranks, capsys, tmp_path, mesh, mixture):
    sizes = [f"--{name}={size}" for name, size in mesh.items()]
    ranks(save_two, tmp_path, [*mixture, *sizes], **mesh)
    alone = [*mixture, "--batch_size", str(2 * mesh.get("dp", 1) * mesh.get("ep", 1))]
    ranks(save_two, tmp_path / "alone", alone)
    flags = ["--prompt", "ab", "--num_tokens", "12", "--temperature", "0"]
    assert text(capsys, tmp_path, *flags) == text(capsys, tmp_path / "alone", *flags)


def test_fused_kernels_say_the_same(capsys, dense):
    flags = ["--prompt", "ab", "--num_tokens", "12", "--temperature", "0"]
    assert text(capsys, dense[0], *flags, "--fused") == text(capsys, dense[0], *flags)


def test_characters_come_whole_and_the_end_of_text_ends_it():
    tokenizer = load_tokenizer("bytes")
    pieces = list(sample.decode(tokenizer, [*"é並".encode(), tokenizer.eot_token, *b"after"]))
    assert pieces == ["", "é", "", "", "並", ""]
    assert "".join(sample.decode(tokenizer, "並".encode()[:2])) == "\N{REPLACEMENT CHARACTER}"


def test_a_piece_comes_before_the_next_token_is_made():
    tokens = iter(b"ab")
    assert next(sample.decode(load_tokenizer("bytes"), tokens)) == "a"
    assert next(tokens) == ord("b")


def test_the_command_line_keeps_the_text_apart_from_what_made_it(dense):
    command = [sys.executable, SCRIPT, "--checkpoint", str(dense[0]), "--prompt", "Once", "--num_tokens", "5"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once") and done.stdout.endswith("\n")
    assert "step_00000002: step 2; plain PyTorch ops on" in done.stderr


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--checkpoint", "."], ".: no checkpoint in it is whole: step_00000009: not a complete checkpoint: .metadata"),
        (["--checkpoint", "step_00000009"], "step_00000009: not a complete checkpoint: .metadata missing"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch, flags, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step_00000009").mkdir()
    (tmp_path / "step_00000009" / "run.json").write_text("{}")
    with pytest.raises(SystemExit) as exit:
        sample.main(sample.parse_args([*flags, "--device", "cpu"]))
    assert exit.value.code.startswith("sample.py: error: ") and complaint in exit.value.code
    assert "\n" not in exit.value.code


def test_flags_have_their_defaults_and_arrive_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in "xy":
        (tmp_path / folder).mkdir()
    assert vars(sample.parse_args(["--checkpoint", "x"])) == {
        "checkpoint": "x",
        "prompt": "",
        "num_tokens": 200,
        "temperature": 0.8,
        "top_k": None,
        "seed": 1337,
        "device": "auto",
        "fused": False,
        "vocab_dir": None,
    }
    given = (
        "--checkpoint y --prompt p --num_tokens 0 --temperature 0 --top_k 1 --seed 3 --device cpu --fused --vocab_dir v"
    )
    assert vars(sample.parse_args(given.split())) == {
        "checkpoint": "y",
        "prompt": "p",
        "num_tokens": 0,
        "temperature": 0.0,
        "top_k": 1,
        "seed": 3,
        "device": "cpu",
        "fused": True,
        "vocab_dir": "v",
    }
    for device in ("cuda", "mps"):
        assert sample.parse_args(["--checkpoint", "y", "--device", device]).device == device


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ([], "the following arguments are required: --checkpoint"),
        (["--checkpoint", ".", "--num", "3"], "unrecognized arguments: --num 3"),
        (["--checkpoint", ".", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--checkpoint", "nowhere"], "nowhere: there is no such folder\n"),
    ],
)
def test_flags_that_are_missing_or_wrong_are_refused(flags, complaint, capsys):
    with pytest.raises(SystemExit) as exit:
        sample.parse_args(flags)
    assert exit.value.code == 2
    assert f"sample.py: error: {complaint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, flags", [("sample.py", ["--checkpoint"]), ("convert.py", ["export"]), ("convert.py", ["import"])]
)
def test_a_folder_that_is_not_there_is_refused_before_torch_is_imported(script, flags, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    out = ["out"] if script == "convert.py" else []
    with pytest.raises(SystemExit) as exit, monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script, *flags, "nowhere", *out])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert exit.value.code == 2
    assert capsys.readouterr().err.endswith(f"{script}: error: nowhere: there is no such folder\n")


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(["--help"])
    assert "tokens to generate (default: 200)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "flags, least",
    [("--num_tokens -1", 0), ("--temperature -0.1", 0), ("--temperature nan", 0), ("--top_k 0", 1)],
)
def test_numbers_that_mean_nothing_are_refused(capsys, flags, least):
    with pytest.raises(SystemExit):
        sample.parse_args(["--checkpoint", ".", *flags.split()])
    assert f"error: {flags} must be at least {least}\n" in capsys.readouterr().err
