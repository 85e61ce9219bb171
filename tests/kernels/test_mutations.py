"""Every planted bug is caught by the parity case that it names. One run of mutation_runner.py serves them all."""

import json
import subprocess
import sys

import pytest

from tests.kernels.cases import all_mutations
from tests.kernels.conftest import MUTATION_LINES

MUTATIONS = [mutation.id for mutation, _ in all_mutations()]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    selected = [item.callspec.params["mutation"] for item in request.session.items if item.module is request.module]
    path = tmp_path_factory.mktemp("mutations") / "results.json"
    command = [sys.executable, "-m", "tests.kernels.mutation_runner", "--json", str(path), *selected]
    run = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True)
    assert path.exists(), run.stdout + run.stderr
    request.config.stash[MUTATION_LINES] = run.stdout.splitlines()
    return json.loads(path.read_text())


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(results, mutation):
    result = results[mutation]
    assert result["verdict"] == "caught", result["why"]
