"""Every planted bug is caught by the parity case that it names. One run of mutation_runner.py serves them all."""

import json
import subprocess
import sys

import pytest

from tests.kernels.cases import all_mutations
from tests.kernels.conftest import MUTATION_LINES

# Variants of the table's first mutation, in a process of their own, as the runner needs it.
VARIANTS = """
import sys
from tests.kernels import mutation_runner

def variants(original=mutation_runner._list_mutations):
    bug = original()[0]
    return [
        {**bug, "id": "no change", "new": bug["old"]},
        {**bug, "id": "not there", "old": "no kernel says this"},
        {**bug, "id": "no Python", "new": "((("},
        {**bug, "id": "the bug itself"},
    ]

mutation_runner._list_mutations = variants
sys.exit(mutation_runner.main(["--json", sys.argv[1]]))
"""
MUTATIONS = [mutation.id for mutation, _ in all_mutations()]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    rows = [item.callspec.params for item in request.session.items if item.module is request.module]
    selected = [row["mutation"] for row in rows if "mutation" in row]
    path = tmp_path_factory.mktemp("mutations") / "results.json"
    command = [sys.executable, "-m", "tests.kernels.mutation_runner", "--json", str(path), *selected]
    run = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True)
    assert path.exists(), run.stdout + run.stderr
    request.config.stash[MUTATION_LINES] = run.stdout.splitlines()
    return json.loads(path.read_text())


@pytest.mark.full
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(results, mutation):
    result = results[mutation]
    assert result["verdict"] == "caught", result["why"]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("runner") / "results.json"
    run = subprocess.run(
        [sys.executable, "-c", VARIANTS, path], cwd=request.config.rootpath, capture_output=True, text=True
    )
    assert run.returncode == 1, run.stdout + run.stderr
    return {name: (result["verdict"], result["why"]) for name, result in json.loads(path.read_text()).items()}


@pytest.mark.parametrize(
    ("name", "verdict", "why"),
    [
        ("no change", "survived", "no error"),
        ("not there", "broken", "occurs 0 times"),
        ("no Python", "broken", "SyntaxError"),
        ("the bug itself", "caught", "Error: "),
    ],
)
def test_the_runner_calls_a_bug_caught_only_where_a_case_goes_red_for_it(verdicts, name, verdict, why):
    assert verdicts[name][0] == verdict and why in verdicts[name][1], verdicts[name]
