"""Every command in README.md, CONTRIBUTING.md and docs/ works: its flags parse, its files and targets exist.

Training commands go through train.py's own parser, with as many ranks as torchrun would start; the others through the
parser or the folder that they name. A command of a kind that is not listed here fails: say how to check it.
"""

import re
import shlex
from pathlib import Path

import pytest

from heiretsu.bench import plot_schedule
from heiretsu.model.options import parse_args
from heiretsu.parallel.schedules import SCHEDULES, lower, simulate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """The command lines of a page: its ```sh blocks, and `...` spans that begin with a program."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += re.findall(r"`((?:python|torchrun|make|pytest) [^`]+)`", prose)
    return [line.removeprefix("$ ").strip() for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = [(page.name, command) for page in PAGES if page.exists() for command in commands(page)]


def check(command):
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # VARIABLE=value in front
        words = words[1:]
    if words[0] == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        sizes = dict(word.removeprefix("--").split("=") for word in words[1:script] if "=" in word)
        check_python(words[script:], int(sizes.get("nproc_per_node", 1)) * int(sizes.get("nnodes", 1)))
    elif words[0] in ("python", "python3"):
        check_python(words[1:], world_size=1)
    elif words[0] == "make":
        targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif words[0] in ("pytest", "modal"):
        check_paths(words[1:])
    else:
        assert words[0] in ("pip", "git", "cd", "python3.12"), "no check for commands of this kind"


def check_python(words, world_size):
    if words[0] == "-m":
        module = words[1].replace("heiretsu.", "").replace(".", "/")
        assert words[1] in ("pytest", "venv", "build") or (ROOT / f"{module}.py").is_file()
        return check_paths(words[2:])
    assert (ROOT / words[0]).is_file(), f"{words[0]} does not exist"
    if words[0] == "train.py":
        parse_args(words[1:], world_size=world_size)
    elif words[0] == "bench/plot_schedule.py":
        plot_schedule.parse_args(words[1:])
    else:
        text = (ROOT / words[0]).read_text()
        for flag in (word for word in words[1:] if word.startswith("--")):
            known = any(re.search(rf"{flag.partition('=')[0]}\b", t) for t in (text, options_text()))
            assert known, f"{words[0]} has no {flag}"


def options_text():
    return (ROOT / "model" / "options.py").read_text() + (ROOT / "tests" / "torchrun.py").read_text()


def check_paths(words):
    for word in words:
        if "/" in word and not word.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists(), f"{word} does not exist"


@pytest.mark.parametrize("page, command", COMMANDS)
def test_documented_command_works(page, command):
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "python train.py --no_such_flag",
        "torchrun --standalone --nproc_per_node=2 train.py --tp 4",
        "python no_such_script.py",
        "python bench/plot_schedule.py --schedule none",
        "python bench/kernels.py --no_such_flag",
        "make nothing",
        "pytest tests/no_such_test.py",
        "perl -e 1",
    ],
)
def test_a_command_that_does_not_work_is_seen(command):
    with pytest.raises((AssertionError, SystemExit)):
        check(command)


@pytest.mark.parametrize("page", [page.name for page in PAGES if page.exists()])
def test_links_between_pages_lead_somewhere(page):
    path = next(p for p in PAGES if p.name == page)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}"


def test_drawing_in_the_page_on_schedules_is_what_the_command_prints(capsys):
    plot_schedule.main(["--schedule", "1f1b", "--pp", "4", "--micro_batches", "8"])
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "adding-a-schedule.md").read_text()


@pytest.mark.parametrize("name, chunks", [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)])
def test_table_in_the_page_on_schedules_is_what_the_simulation_gives(name, chunks):
    program = lower(SCHEDULES[name](4, 8, chunks))
    timeline = simulate(program, forward_cost=1 / chunks, backward_cost=2 / chunks)
    held = " ".join(f"{activations / chunks:g}" for activations in timeline.peak_activations)
    row = rf"^\| {name}.* \| {timeline.bubble:.1%} \| {held} \|$"
    assert re.search(row, (ROOT / "docs" / "adding-a-schedule.md").read_text(), re.M)
