"""GPT-2 in Hugging Face's files: the same model there and here, both ways, on any topology, or one clear line."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from heiretsu.kernels import plain
from heiretsu.model import hf
from heiretsu.model.config import ModelConfig
from heiretsu.model.gpt import GPT
from heiretsu.model.hf import gpt2
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.pipeline import Microbatch
from heiretsu.run import state
from heiretsu.run.building import build_engine
from heiretsu.run.conversion import INDEX, WEIGHTS, export_model, import_model, read_model, read_tensors
from heiretsu.run.options import parse_args
from heiretsu.run.saved import load_model
from tests.documents import run_script

CONVERT = str(Path(__file__).parents[2] / "convert.py")
FAMILIES = hf.families()
KNOWN = " or ".join(map(repr, FAMILIES))
MODEL = ModelConfig(vocab_size=257, block_size=12, n_layer=2, n_head=2, n_embed=16)
EPS = torch.finfo(torch.float32).eps
FLAGS = "--n_layer 2 --n_head 2 --n_embed 16 --block_size 12 --batch_size 4 --tokenizer bytes --learning_rate 0.01"


@pytest.fixture(scope="module")
def transformers():
    """transformers, offline. Imported here, because the ranks import this module and have no use for it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def published(transformers, tmp_path_factory):
    """A folder as GPT-2 is published in, and the model in it, without a zero or a one among its values."""
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=12, n_layer=2, n_head=2, n_embd=16, bos_token_id=256, eos_token_id=256
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.3 * torch.randn_like(param) + (1.0 if param.dim() == 1 else 0.0))
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    return import_model(published[0], tmp_path_factory.mktemp("imported"))


def ids() -> torch.Tensor:
    return torch.randint(257, (4, 13), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_logits(model: GPT) -> torch.Tensor:
    """(B, T, V): of each position, with what came before it as the context."""
    return torch.stack([model.next_token_logits(ids()[:, : t + 1]) for t in range(12)], dim=1)


@torch.no_grad()
def their_logits(model) -> torch.Tensor:
    return model(ids()[:, :-1]).logits


def same_model(folder) -> GPT:
    """The weights of a Hugging Face folder in our model, in float64."""
    model = GPT(MODEL, abstract_mesh(), plain, dtype=torch.float64)
    model.load_state_dict(read_model(folder)[1])
    return model.eval()


def test_logits_are_those_of_transformers(published, imported):
    folder, theirs = published
    ours, run = load_model(imported, plain)
    assert run["step"] == 0
    in_float32 = their_logits(theirs)
    exact = their_logits(theirs.double())
    theirs.float()
    assert (our_logits(same_model(folder)) - exact).abs().max() < 1e-12 * exact.abs().max()
    error = (our_logits(ours) - exact).abs().max()
    assert error <= 2 * (in_float32 - exact).abs().max() + 4 * EPS * exact.abs().max()


def test_there_and_back_changes_no_bit(transformers, published, imported, tmp_path):
    folder, theirs = published
    out = export_model(imported, tmp_path / "exported")
    back, report = transformers.GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(their_logits(back.eval()), their_logits(theirs))
    before, after = read_tensors(folder), read_tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert read_model(out)[0].model == MODEL
    with safetensors.safe_open(out / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it, older releases of transformers refuse the file


def evaluate_step_evaluate(mesh, source: Path, out: Path, sizes: dict) -> tuple[float, float]:
    """Loss of the checkpoint and after one step from it, which is saved."""
    config = parse_args([*FLAGS.split(), *(f"--{name}={size}" for name, size in sizes.items())], mesh.world.size)
    engine = build_engine(config, mesh, plain)
    as_json = json.loads(config.to_json())
    state.load_parameters(source, engine, as_json)
    batch = [Microbatch(ids()[:, :-1], ids()[:, 1:])]
    before = engine.evaluate(batch)["loss"]
    engine.step(batch)
    after = engine.evaluate(batch)["loss"]
    state.save(out, 1, engine, as_json, keep=1)
    return before, after


def test_a_mesh_starts_from_the_imported_and_its_checkpoint_is_exported(
    ranks, transformers, published, imported, tmp_path
):
    sizes = {"tp": 2, "pp": 2}
    losses = ranks(evaluate_step_evaluate, imported, tmp_path / "run", sizes, **sizes)
    trained = transformers.GPT2LMHeadModel.from_pretrained(export_model(tmp_path / "run", tmp_path / "out"))
    targets = ids()[:, 1:].flatten()
    for model, ours in zip((published[1], trained.eval()), zip(*losses, strict=True), strict=True):
        theirs = torch.nn.functional.cross_entropy(their_logits(model).flatten(0, 1), targets).item()
        assert ours == pytest.approx([theirs] * 4, rel=8 * EPS)
    assert losses[0][1] < losses[0][0]


def copy_of(folder: Path, to: Path, **changes) -> Path:
    """The published folder again, with a few things different in config.json; None takes a key away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    to.mkdir()
    (to / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    (to / WEIGHTS).symlink_to(folder / WEIGHTS)
    return to


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"model_type": "llama"}, f"model_type is 'llama'; only {KNOWN} can be imported"),
        ({"activation_function": "relu"}, "activation_function is 'relu'; only 'gelu_new' or 'gelu_pytorch_tanh'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"n_inner": 100}, "n_inner is 100; only 4 \\* n_embd"),
        ({"n_head": None}, "config.json has no n_head"),
        ({"vocab_size": 1000}, r"vocab_size is 1000, of no tokenizer that train.py has: bytes \(257\), gpt2 \(50257\)"),
        ({"n_layer": 3}, "the weights have no tensor h.2.attn.c_attn.bias"),
        ({"n_layer": 1}, "the weights have an unknown tensor h.1.attn.c_attn.bias"),
        ({"n_positions": 16}, r"wpe.weight has shape \(12, 16\), but config.json asks for \(16, 16\)"),
    ],
)
def test_what_is_not_this_gpt2_is_refused(published, tmp_path, changes, complaint):
    source = copy_of(published[0], tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=complaint):
        import_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_leaves_out_the_defaults_is_read(published, tmp_path):
    said = {key: None for key in gpt2.COMPUTED}
    assert read_model(copy_of(published[0], tmp_path / "short", **said))[0].model == MODEL


def test_files_of_the_first_days_and_split_files_are_read(published, tmp_path):
    """No prefix, the causal mask among the weights, the tied head stored twice, two files."""
    tensors = {name.removeprefix("transformer."): value for name, value in read_tensors(published[0]).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 12, 12).tril() for i in range(2)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    source = copy_of(published[0], tmp_path / "old")
    (source / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {name: f"part{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        safetensors.torch.save_file({name: tensors[name] for name in names if files[name] == file}, source / file)
    (source / INDEX).write_text(json.dumps({"weight_map": files}))
    ours = read_model(source)[1]
    expected = read_model(published[0])[1]
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match="only a tied head can be imported"):
        hf.from_hf(gpt2, tensors, MODEL)


def test_nothing_is_written_over(imported, published, tmp_path):
    with pytest.raises(ValueError, match="holds checkpoints already"):
        import_model(published[0], imported.parent)
    with pytest.raises(ValueError, match="holds config.json already"):
        export_model(imported, published[0])


def test_folders_are_made_and_an_empty_one_is_taken(imported, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("new/deep", "empty"):
        assert (export_model(imported, tmp_path / folder) / WEIGHTS).is_file()


def test_what_to_install_is_said_where_there_is_no_safetensors(imported, tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError) as refused:
        export_model(imported, tmp_path / "out")
    assert str(refused.value) == "safetensors is not installed: pip install 'heiretsu[hf]'"


def test_sizes_are_taken_up_to_131072_and_no_further():
    assert hf.read_sizes({"n": 2**17}, {"n_layer": "n"}).n_layer == 2**17
    for size in (0, 2**17 + 1, 4.0, True, None):
        with pytest.raises(ValueError, match="config.json has no n, or one that is no size"):
            hf.read_sizes({"n": size}, {"n_layer": "n"})


def test_a_mixture_is_not_exported(tmp_path):
    config = parse_args([*FLAGS.split(), "--num_experts", "2"], world_size=1)
    engine = build_engine(config, abstract_mesh(), plain)
    state.save(tmp_path, 5, engine, json.loads(config.to_json()), keep=1)
    with pytest.raises(ValueError, match="2 experts have no form in GPT-2"):
        export_model(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(published, tmp_path, capsys):
    run_script(CONVERT, ["import", str(published[0]), str(tmp_path / "run")])
    run_script(CONVERT, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    run, out = tmp_path / "run" / "step_00000000", tmp_path / "out"
    assert capsys.readouterr().err == f"wrote {run}\nwrote {out}\n"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", WEIGHTS]
    assert (out / "config.json").read_text().startswith('{\n  "'), "for people to read, too"
    with pytest.raises(SystemExit) as exit:
        run_script(CONVERT, ["export", str(tmp_path / "run"), str(tmp_path / "out2"), "--family", "llama"])
    assert exit.value.code == f"convert.py: error: model_type is 'llama'; only {KNOWN} can be exported"


def test_the_family_of_the_guide_is_one_file_and_loses_no_bit(published, imported, tmp_path, monkeypatch):
    """docs/adding-a-model-family.md: its file, put where a family is looked for, and nothing else."""
    page = (Path(CONVERT).parent / "docs" / "adding-a-model-family.md").read_text()
    (source,) = re.findall(r"^```python\n(\"\"\".*?)^```", page, re.M | re.S)
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "toy.py").write_text(source)
    monkeypatch.setattr(hf, "__path__", [*hf.__path__, str(tmp_path / "families")])
    assert hf.families() == sorted([*FAMILIES, "toy"])
    run_script(CONVERT, ["export", str(imported), str(tmp_path / "toy"), "--family", "toy"])
    theirs, gpt2s = read_tensors(tmp_path / "toy"), read_tensors(published[0])
    q, k, v = gpt2s["transformer.h.1.attn.c_attn.weight"].T.split(16)
    for name, expected in {
        "model.layers.1.attention.q.weight": q,
        "model.layers.1.attention.v.weight": v,
        "model.layers.0.up.weight": gpt2s["transformer.h.0.mlp.c_fc.weight"].T,
        "model.tokens.weight": gpt2s["transformer.wte.weight"],
        "model.norm.bias": gpt2s["transformer.ln_f.bias"],
    }.items():
        assert torch.equal(theirs[name], expected), name
    assert len(theirs) == 2 + 2 + 2 * 16 and not torch.equal(q, k)
    run_script(CONVERT, ["import", str(tmp_path / "toy"), str(tmp_path / "run")])
    back, _ = load_model(tmp_path / "run", plain)
    for name, param in load_model(imported, plain)[0].named_parameters():
        assert torch.equal(back.get_parameter(name), param), name
    config = json.loads((tmp_path / "toy" / "config.json").read_text()) | {"act": "relu"}
    (tmp_path / "toy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="act is 'relu'; only 'gelu_tanh' can be imported"):
        import_model(tmp_path / "toy", tmp_path / "other")
    with pytest.raises(ValueError, match="model_type is 'llama'; only .*'toy'.* can be imported"):
        import_model(copy_of(published[0], tmp_path / "llama", model_type="llama"), tmp_path / "other")


def test_every_family_says_how_each_of_our_parameters_is_stored(imported):
    """Under names that are all different; and what makes ours of theirs undoes what makes theirs of ours."""
    params = dict(load_model(imported, plain)[0].named_parameters())
    for name in hf.families():
        family = hf.find_family(name, "imported")
        theirs = hf.to_hf(family, params, MODEL)
        assert len(theirs) == sum(len(stored.names) for stored in family.parameters(MODEL).values())
        back = hf.from_hf(family, theirs, MODEL)
        assert back.keys() == params.keys() and all(torch.equal(back[key], params[key]) for key in params)
        assert family.read_config(family.write_config(MODEL, "float32")) == MODEL
