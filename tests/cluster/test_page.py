"""The commands of docs/several-machines.md, on two hosts, as the page has them but for a length of next to nothing."""

import shlex

import pytest

from heiretsu.bench.network import ROOT
from tests.cluster.launching import PYTHON, TINY, ended
from tests.cluster.table import ROWS
from tests.documents import commands

pytestmark = pytest.mark.full

PAGE = (ROOT / "docs/several-machines.md").read_text()
COMMANDS = [command for command in commands(PAGE) if command.run]
LAUNCHES = [command for command in COMMANDS if "--node_rank=0" in command.words]
SHORT = [*TINY, "--max_iters", "3", "--save_interval", "2"]
TORCHRUN = [str(PYTHON), "-m", "torch.distributed.run"]


def on_node(words, rank: int, folder) -> list[str]:
    """The command of the page as it is on this node, with its files in the folder."""
    line = shlex.join(words).replace("--node_rank=0", f"--node_rank={rank}").replace("runs/", f"{folder}/")
    first = {"torchrun": TORCHRUN, "python": [str(PYTHON)]}
    return [*first[words[0]], *shlex.split(line)[1:], *SHORT, "--checkpoint_dir", str(folder / "run")]


@pytest.mark.parametrize("command", LAUNCHES, ids=lambda command: command.words[0])
def test_launches_of_the_page_train_on_two_hosts(command, net, tmp_path):
    others = [found.words for found in COMMANDS if "--node_rank=1" in found.words]
    assert tuple(word.replace("--node_rank=0", "--node_rank=1") for word in command.words) in others
    run = [host.start(*on_node(command.words, rank, tmp_path)) for rank, host in enumerate(net.hosts)]
    (status, text), (other_status, other) = ended(run)
    assert (status, other_status) == (0, 0), text + other
    assert "hosts: alder ranks 0-1, birch ranks 2-3; between hosts: dp" in text
    assert "step 3/3: loss" in text


def test_the_page_shows_the_header_that_it_has():
    assert "hosts: alder ranks 0-1, birch ranks 2-3; between hosts: dp\n" in PAGE


def test_every_command_that_can_run_here_is_run_by_a_test():
    """Those with a program that only tests/cluster runs; the others are tests/test_docs.py's."""
    run = {shlex.join(command.words[:3]) for command in COMMANDS}
    assert len(LAUNCHES) == 2
    assert run == {
        "python -m heiretsu.run.launch",  # above
        "torchrun --nnodes=2 --node_rank=0",  # above
        "torchrun --nnodes=2 --node_rank=1",
        "sbatch --nodes=2 examples/slurm/train.sbatch",  # test_slurm.py, with more flags
        "python bench/parallel.py --hosts",  # test_wire.py
    }


def test_table_of_the_page_has_every_row():
    for text in ROWS.values():
        assert f"| {text} | " in PAGE
