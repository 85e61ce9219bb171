"""Copies of the tree, each with a warm process in it. The tree itself is only read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SLOWER = 10.0  # a test may take so many times its measured time, and --patience more
UNMEASURED_S, COLLECTION_S = 600.0, 100.0
SLOW_IMPORTS = [
    "torch", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch._dynamo", "triton", "transformers",
    "transformers.models.gpt2.modeling_gpt2", "safetensors.torch", "numpy", "tiktoken", "tqdm", "requests",
    "huggingface_hub", "hypothesis", "hypothesis.strategies", "xdist.plugin", "pytest_timeout",
    "_hypothesis_pytestplugin",
]  # fmt: skip
HERE = Path(__file__).parent
SITE = Path("tests", "mutation", "site")


class Copy:
    """with Copy(root) as copy: copy.run(["tests/test_x.py"], ...), any number of times."""

    def __init__(self, root: Path, patience_s: float = 20.0, marks: str = "not full", imports=SLOW_IMPORTS):
        self.root, self.patience_s, self.marks, self.imports = root, patience_s, marks, imports

    def __enter__(self) -> Copy:
        above = Path(tempfile.mkdtemp(prefix="heiretsu-mutate-"))
        self.folder, self.trace = above / "tree", above / "trace"
        shutil.copytree(self.root, self.folder, ignore=_not_source)
        if not (self.folder / SITE).exists():  # a tree that is not this one, in a test
            shutil.copytree(HERE / SITE.name, self.folder / SITE)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder / SITE)}
        for name in ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
            environment.pop(name, None)
        # It removes the copy itself, so that one is not left if this process is killed.
        warm = [sys.executable, str(HERE / "warm.py"), str(above), *self.imports]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(warm, cwd=self.folder, env=environment, **pipes)
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(
        self,
        tests: dict[str, list[str]],
        files=None,
        seconds=None,
        trace: bool = False,
        functions=None,
        patience: float = 1.0,
    ) -> dict:
        """Run tests ({file: node ids}, all of a file for an empty list), with some of the copy's files edited.

        files: {path: text}. seconds: {node id: measured time}. functions: run only these. patience: times the limit.
        See warm.py for the answer.
        """
        measured = seconds or {}
        every = [test for names in tests.values() for test in names]
        limits = {test: patience * (self.patience_s + SLOWER * measured.get(test, 0.0)) for test in every}
        if trace:
            shutil.rmtree(self.trace, ignore_errors=True)
            self.trace.mkdir()
        job = {"files": files or {}, "tests": tests, "limits": limits, "marks": self.marks}
        job["other_limit"] = UNMEASURED_S if trace else COLLECTION_S + self.patience_s
        job["functions"] = functions
        job["trace"] = str(self.trace) if trace else None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process in {self.folder} died")
        return json.loads(answer)

    def output(self) -> str:
        """What pytest said in the last run."""
        return (self.folder / "pytest.log").read_text(errors="replace")


def _not_source(folder: str, names: list[str]) -> set[str]:
    dropped = {name for name in names if name in ("build", "dist", "runs", "wandb") or name.endswith((".bin", ".pyc"))}
    return dropped | {name for name in names if name.startswith((".", "__pycache__")) or name.endswith(".egg-info")}
