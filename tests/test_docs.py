"""Every command in README.md, CONTRIBUTING.md, docs/ and the tools' own pages works: the program that it names accepts
it, and where that is cheap it is run, each page from top to bottom in a folder of its own. How: tests/documents.py.
"""

import re
from pathlib import Path

import pytest

from heiretsu.bench import plot_schedule
from heiretsu.parallel.schedules import SCHEDULES, actions, lower, simulate
from tests.documents import Command, Reader, check, commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in ("offgpu", "offgpu/emulator", "tests/kernels")]
NAMES = {str(page.relative_to(ROOT)): page for page in PAGES if page.exists()}
COMMANDS = {name: commands(page.read_text()) for name, page in NAMES.items()}


def complaint(command: Command, reader: Reader | None = None) -> str | None:
    """Why the command does not work, checked and, with a reader, run; None if it does."""
    try:
        check(command)
        if reader is not None and command.run:
            reader.follow(command)
    except Exception as error:
        return f"`{command.line}`: {str(error) or type(error).__name__}"
    return None


@pytest.mark.parametrize("page", COMMANDS)
def test_every_command_of_a_page_works(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = Reader()
    wrong = [why for command in COMMANDS[page] if (why := complaint(command, reader))]
    assert not wrong, f"{page} has commands that do not work:\n" + "\n".join(wrong)


def test_the_pages_have_commands():
    """Else the test above has nothing to find: a fence spelt otherwise, a folder moved."""
    assert sum(command.run for found in COMMANDS.values() for command in found) >= 10


@pytest.mark.parametrize(
    "line, reason",
    [
        ("python train.py --no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("python train.py --max_iters ten", "--max_iters: invalid int value: 'ten'"),
        ("python train.py --data_dir nowhere", "there is no such directory"),
        ("torchrun --standalone --nproc_per_node=2 train.py --tp 4", "4 ranks, but 2 processes started"),
        ("torchrun --standalone --nproc_per_nodes=2 train.py", "--nproc_per_nodes=2"),
        ("torchrun --nproc_per_node=4 tests/tests_equiv.py --xp 4", "unrecognized arguments: --xp 4"),
        ("python no_such_script.py", "there is no no_such_script.py"),
        ("python sample.py --prompt x", "arguments are required: --checkpoint"),
        ("python bench/plot_schedule.py --schedule none", "invalid choice: 'none'"),
        ("python bench/kernels.py --no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("python bench/train.py --variants plain --n_head 7", "--n_head 7 does not divide"),
        ("python data/fineweb.py --out x", "arguments are required: N"),
        ("python convert.py export somewhere", "arguments are required: DIR"),
        ("python -m heiretsu.model.none", "there is no module heiretsu.model.none"),
        ("python -m tests.gallery --fast", "tests/gallery.py takes no arguments"),
        ("make nothing", "make knows no nothing"),
        ("make train ARGS='--lr 1'", "unrecognized arguments: --lr 1"),
        ("make train FLAGS=1", "make knows no FLAGS"),
        ("pytest tests/no_such_test.py", "there is no tests/no_such_test.py"),
        ("pytest tests/test_docs.py::test_none", "tests/test_docs.py has no test_none"),
        ("pytest tests/kernels --emulate sm_70", "invalid choice: 'sm_70'"),
        ("python -m pytest tests/kernels -k no_such_op", "-k no_such_op selects nothing"),
        ("modal run modal_train.py::nothing", "modal_train.py has no nothing"),
        ("bash tests/none.sh", "there is no tests/none.sh"),
        ("bash tests/run_full_suite.sh --fuse_all", "unrecognized arguments: --fuse_all"),
        ("NO_SUCH_VARIABLE=1 make test", "nothing here reads NO_SUCH_VARIABLE"),
        ("pip install -e '.[everything]'", "there is no extra everything"),
        ("perl -e 1", "no check for perl"),
        ("cd x && make nothing > log", "make knows no nothing"),
    ],
)
def test_a_command_that_would_be_refused_is_seen(line, reason):
    found = [why for command in commands(f"```sh\n{line}\n```") if (why := complaint(command))]
    assert len(found) == 1 and reason in found[0], found


GOOD_PAGE = """
Run `make test`, `python train.py ...`, then

```sh
git clone https://example.org/it && cd it    # a comment
python train.py --checkpoint_dir runs/a \\
    --save_interval 50 --max_iters 100 --log_file a.jsonl
torchrun --standalone --nproc_per_node=2 train.py --tp 2 --checkpoint_dir runs/a --resume auto --save_interval 50
```

```console
$ python sample.py --checkpoint runs/a --prompt "It is "
It is raining cats and dogs
$ python bench/plot_run.py a.jsonl --out a.png
```

<!-- not run: there is no such folder -->
```sh
python sample.py --checkpoint elsewhere
```

```sh
python data/prepare.py books/*.txt --out data/books
python train.py --data_dir data/books --fused
hf download gpt2 --local-dir published
.venv/bin/python convert.py import published runs/gpt2
python train.py --preset gpt2 --tokenizer gpt2 --data_dir data/fineweb10B --resume runs/gpt2 --max_iters 3
python train.py --preset gpt2 --tokenizer gpt2 --data_dir data/fineweb10B --init_from runs/gpt2 --dropout 0.1 \\
    --profile traces
python sample.py --checkpoint runs/gpt2
python convert.py export runs/gpt2 back
```
"""


def test_a_page_is_read_and_done_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, reader = commands(GOOD_PAGE), Reader()
    assert [complaint(command, reader) for command in found] == [None] * 16
    assert [command.words[1] for command in found if not command.run] == ["sample.py", "test"]
    made = "data/books runs/a/step_00000002 a.png runs/gpt2/step_00000000 back/config.json".split()
    assert [path for path in made if not (tmp_path / path).exists()] == []


@pytest.mark.parametrize(
    "lines, reason",
    [
        ("python sample.py --checkpoint runs/b", "runs/b: there is no such folder"),
        ("python bench/plot_run.py none.jsonl --out a.png", "none.jsonl"),
        (
            "python train.py --save_interval 9\npython train.py --n_layer 9 --resume runs/checkpoints",
            "of another model",
        ),
        (
            "python convert.py import gpt2 out\npython train.py --preset tiny --resume out",
            "of another model",
        ),
        ("python convert.py import gpt2 out\npython train.py --init_from out", "of another model"),
        ("python train.py --init_from nowhere", "nowhere: there is no such folder"),
    ],
)
def test_a_command_that_fails_is_seen(tmp_path, monkeypatch, lines, reason):
    monkeypatch.chdir(tmp_path)
    reader = Reader()
    found = [why for command in commands(f"```sh\n{lines}\n```") if (why := complaint(command, reader))]
    assert len(found) == 1 and reason in found[0], found


@pytest.mark.parametrize("page", NAMES)
def test_links_between_pages_lead_somewhere(page):
    path = NAMES[page]
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}"


def test_drawing_in_the_page_on_schedules_is_what_the_command_prints(capsys):
    plot_schedule.main(["--schedule", "1f1b", "--pp", "4", "--micro_batches", "8"])
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "adding-a-schedule.md").read_text()


def test_function_in_the_page_on_schedules_is_the_schedule_that_it_names():
    page = (ROOT / "docs" / "adding-a-schedule.md").read_text()
    found = {**vars(actions), "schedule": lambda name: lambda function: function}
    exec(re.search(r"```python\n(.+?)```", page, re.S)[1], found)
    for sizes in ((1, 1), (2, 5), (4, 3)):
        assert found["gpipe"](*sizes) == SCHEDULES["gpipe"](*sizes)


@pytest.mark.parametrize("name, stages", [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)])
def test_table_in_the_page_on_schedules_is_what_the_simulation_gives(name, stages):
    program = lower(SCHEDULES[name](4, 8, stages))
    timeline = simulate(program, forward_cost=1 / stages, backward_cost=2 / stages)
    held = " ".join(f"{activations / stages:g}" for activations in timeline.peak_activations)
    row = rf"^\| {name}.* \| {timeline.bubble:.1%} \| {held} \|$"
    assert re.search(row, (ROOT / "docs" / "adding-a-schedule.md").read_text(), re.M)


FLOORS = ("train.py", "run", "data", "model", "parallel", "kernels")


@pytest.mark.parametrize("journey", ["One microbatch", "One parameter"])
def test_a_journey_through_the_code_goes_down_the_floors_and_finds_what_it_names(journey):
    page = (ROOT / "docs" / "token-flow.md").read_text()
    rows = re.findall(r"^\| `([\w/.]+)` \| (.+) \|$", page.partition(f"## {journey}\n")[2].partition("\n## ")[0], re.M)
    floors = [FLOORS.index(file.partition("/")[0]) for file, _ in rows]
    assert len(rows) >= 10 and floors == sorted(floors), journey
    for file, told in rows:
        source = (ROOT / file).read_text()
        for name in set(re.findall(r"`([A-Za-z_.]+)`", told)) - {"wte.weight", "ops"}:
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), f"{file} has no {name}"
