"""What a rank finds out by itself, in which order, what it brings to the roll call, and how all come together."""

import contextlib
import hashlib
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import heiretsu.data
from heiretsu.kernels import plain
from heiretsu.run import prepare as preparing
from heiretsu.run import together as coming_together
from heiretsu.run.options import parse_args
from heiretsu.run.prepare import facts, prepare
from heiretsu.run.roll_call import Report
from heiretsu.run.together import together

DATA = [SimpleNamespace(digest=lambda: "one"), SimpleNamespace(digest=lambda: "two")]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def parts(monkeypatch):
    """Each thing that a rank finds out, noted; `fails` is the one that does not go well."""
    did = SimpleNamespace(asked=[], fails=None, device="cpu")

    def part(name, answer=None):
        def ask(*what):
            did.asked.append((name, *what))
            if did.fails == name:
                raise ValueError(f"{name} is wrong")
            return answer(*what) if callable(answer) else answer

        return ask

    answers = {
        "find_device": lambda config: torch.device(did.device),
        "keep_freed_memory": None,
        "choose_ops": (plain, "plain ops"),
        "make_folders": None,
        "named_checkpoint": Path("runs/step_00000004"),
        "tokenizer_of": "gpt2",
        "open_data": tuple(DATA),
        "use_interface": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(preparing, name, part(name, answer))
    return did


def test_a_rank_finds_out_in_the_order_in_which_a_user_would_be_told(parts):
    config = parse_args(["--data_dir", ".", "--vocab_dir", "v", "--num_train_chunks", "3", "--num_val_chunks", "4"])
    mine = prepare(config)
    told = config.with_tokenizer("gpt2")
    sizes = (".", 128, 1337, 50257, 3, 4, "gpt2", "v")
    assert parts.asked == [
        ("find_device", config),
        ("keep_freed_memory",),
        ("choose_ops", False, torch.device("cpu")),
        ("make_folders", config, 0),
        ("named_checkpoint", config),
        ("tokenizer_of", "."),
        ("open_data", *sizes),
        ("use_interface", "gloo", preparing.os.environ),
    ]
    assert (mine.config, mine.rank, mine.backend, mine.device) == (told, 0, "gloo", torch.device("cpu"))
    assert (mine.ops, mine.kernels, mine.train_data, mine.val_data) == (plain, "plain ops", *DATA)
    assert mine.report == Report(facts(told, "gloo on cpu", DATA, Path("runs/step_00000004")), folder=None)


def test_what_is_wrong_goes_into_the_report_and_the_rest_is_left(parts):
    for parts.fails in ("find_device", "choose_ops", "make_folders", "open_data", "use_interface"):
        parts.asked.clear()
        mine = prepare(parse_args([]))
        assert mine.report == Report(refused=f"{parts.fails} is wrong") and parts.asked[-1][0] == parts.fails


def test_a_tokenizer_that_is_named_is_not_looked_for_and_a_gpus_memory_is_not_malloc(parts):
    parts.device = "meta"
    mine = prepare(parse_args(["--data_dir", ".", "--tokenizer", "bytes", "--checkpoint_dir", "c"]))
    assert not {"tokenizer_of", "keep_freed_memory"} & {name for name, *_ in parts.asked}
    assert mine.report.folder == "c" and mine.report.facts["messages and device"] == "gloo on meta"
    local = prepare(parse_args(["--checkpoint_dir", "c", "--local_checkpoints"]))
    assert local.report.folder is None and local.report.facts["a checkpoint folder"] is True


def test_a_rank_takes_its_place_in_the_mesh(parts, monkeypatch):
    for name, value in (("RANK", 1), ("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", 4), ("GROUP_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    mine = prepare(parse_args("--ep 2 --pp 4 --num_experts 2 --grad_accum_steps 4".split()))
    assert mine.rank == 4 and ("make_folders", mine.config, 4) in parts.asked


def test_facts_are_every_flag_but_paths_and_what_is_found_there(monkeypatch):
    monkeypatch.setattr(preparing, "code_digest", lambda: "code")
    config = parse_args(["--checkpoint_dir", "a/b", "--betas", "0.5", "0.75"])
    found = facts(config, "nccl on cuda", DATA, Path("x/step_00000004"))
    rest = {name: value for name, value in found.items() if not name.startswith("--")}
    assert rest == {
        "messages and device": "nccl on cuda",
        "code": "code",
        "torch": torch.__version__,
        "data": "one, two",
        "a checkpoint folder": True,
        "checkpoint to resume": "step_00000004",
        "checkpoint to start from": None,
    }
    flags = config.as_json()
    paths = {"data_dir", "vocab_dir", "log_file", "profile", "checkpoint_dir", "resume", "init_from"}
    names = (flags.keys() | flags["model"].keys()) - paths - {"model"}
    assert {name for name in found if name.startswith("--")} == {f"--{name}" for name in names}
    assert found["--betas"] == [0.5, 0.75] and found["--n_layer"] == 4 and found["--seed"] == 1337
    other = facts(replace(config, checkpoint_dir=None, init_from="far/step_00000001"), "", DATA, None)
    assert (other["a checkpoint folder"], other["checkpoint to resume"]) == (False, None)
    assert other["checkpoint to start from"] == "step_00000001"


def test_the_digest_of_the_code_is_of_names_and_bytes_of_every_file_and_of_the_script(tmp_path, monkeypatch):
    package = SimpleNamespace(__path__=[str(tmp_path / "p")], __name__="p")
    (tmp_path / "p" / "q").mkdir(parents=True)
    (tmp_path / "p" / "b.py").write_bytes(b"two")
    (tmp_path / "p" / "q" / "a.py").write_bytes(b"three")
    (tmp_path / "p" / "note.txt").write_bytes(b"left out")
    (tmp_path / "train.py").write_bytes(b"script")
    monkeypatch.setattr(preparing, "_SOURCES", (package,))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    expected = b"p/b.py\0twop/q/a.py\0three"
    assert preparing.code_digest() == hashlib.sha256(expected + b"script").hexdigest()[:16]
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert preparing.code_digest() == hashlib.sha256(expected).hexdigest()[:16]


def test_every_part_of_the_library_that_a_run_uses_is_its_code():
    names = ["heiretsu.data", "heiretsu.kernels", "heiretsu.model", "heiretsu.parallel", "heiretsu.run"]
    assert [package.__name__ for package in preparing._SOURCES] == names and preparing._SOURCES[0] is heiretsu.data


def test_one_process_needs_nobody_and_says_what_is_wrong(capsys):
    with together(parse_args([]), "gloo", 0, Report({})):
        pass
    assert not torch.distributed.is_initialized()
    with pytest.raises(SystemExit) as stop, together(parse_args([]), "gloo", 0, Report(refused="no data")):
        pytest.fail("it ran")
    assert stop.value.code == 2 and capsys.readouterr().err == "train.py: error: no data\n"


def test_ranks_that_have_agreed_get_their_groups_and_a_watch_over_them(monkeypatch):
    did, report = [], Report({"a": 1})
    assembly = SimpleNamespace(refused="")

    @contextlib.contextmanager
    def entered(name, *what, **more):
        did.append((name, what, more))
        yield
        did.append(f"{name} over")

    monkeypatch.setattr(coming_together, "assemble", lambda *what: did.append(what) or (assembly, "store"))
    monkeypatch.setattr(coming_together, "process_groups", lambda *what, **more: entered("groups", *what, **more))
    monkeypatch.setattr(coming_together, "watched", lambda *what: entered("watch", *what))
    config = parse_args(["--dp", "2", "--tp", "2", "--timeout", "7.5"], world_size=4)
    with together(config, "gloo", 3, report):
        did.append("run")
    groups = {"store": "store", "rank": 3, "timeout": timedelta(seconds=17.5)}
    name = "rank 3 (dp=1, ep=0, pp=0, tp=1)"
    assert did == [
        (3, 4, 7.5, report),
        ("groups", ("gloo", 4), groups),
        ("watch", (assembly, 7.5, name), {}),
        "run",
        "watch over",
        "groups over",
    ]


@pytest.mark.parametrize("how", ["refused", "raised"])
def test_ranks_that_have_not_agreed_end_with_one_line_each(monkeypatch, capsys, how):
    def assemble(*what):
        if how == "raised":
            raise ValueError("not so")
        return SimpleNamespace(refused="not so"), None

    monkeypatch.setattr(coming_together, "assemble", assemble)
    with pytest.raises(SystemExit) as stop, together(parse_args(["--dp", "2"], world_size=2), "gloo", 0, Report({})):
        pytest.fail("it ran")
    assert stop.value.code == 2 and capsys.readouterr().err == "train.py: error: not so\n"
