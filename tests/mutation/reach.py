"""Which test reaches which line of the product, and how long it takes: measured once, kept in build/mutation/.

A test file is measured again when it changes. When the product changes, what was measured moves along with the lines
that stayed; a line that is new counts as reached by what reaches its function.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tests.mutation.copies import Copy
from tests.mutation.edits import Edit

# The tests of what is not edited: Triton's kernels and the tools around them; and of installing.
NOT_FOR_THE_PRODUCT = (
    "tests/emulator", "tests/bench", "tests/packaging", "tests/mutation", "tests/kernels/interpreter",
    "tests/kernels/test_interpreted.py", "tests/kernels/test_mutations.py", "tests/kernels/test_emulated.py",
    "tests/kernels/test_autotune.py", "tests/kernels/test_stages_on_gpu.py", "tests/kernels/test_launch.py",
)  # fmt: skip


def test_files(root: Path) -> list[str]:
    found = sorted(path.relative_to(root).as_posix() for path in (root / "tests").rglob("test_*.py"))
    return [file for file in found if not file.startswith(NOT_FOR_THE_PRODUCT)]


def measure(copy: Copy, file: str) -> dict:
    """Run one test file, traced: {"tests": {node id: [seconds, {file: lines}]}, "shared": {file: lines}, ...}.

    shared: reached at import and in fixtures of the whole file. green: that every test passed.
    """
    answer = copy.run({file: []}, trace=True)
    lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for record in copy.trace.glob("*.lines"):
        test = ""
        for line in record.read_text().splitlines():
            if line.startswith("="):
                test = line[1:]
            else:
                name, _, number = line.rpartition(":")
                lines[test][name].add(int(number))
    found = {test: {name: sorted(numbers) for name, numbers in files.items()} for test, files in lines.items()}
    tests = {test: [seconds, found.pop(test, {})] for test, seconds in answer["seconds"].items()}
    return {
        "green": answer["verdict"] == "green",
        "why": f"{answer['test']}: {answer['why']}" if answer["verdict"] != "green" else "",
        "tests": tests,
        "shared": found.get(file, {}),
    }


class Reach:
    """What was measured, for the tree as it is now."""

    def __init__(self, sources: dict[str, str], measured: Iterable[dict]):
        """sources: {file: text} now. measured: what `measure` gave of each test file, with its "sources" of then."""
        self.bodies = {file: _body_lines(text) for file, text in sources.items()}
        self.old: dict[str, set[int]] = defaultdict(set)  # by file, lines of now that were there then
        self.by_line: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.importers: dict[str, set[str]] = defaultdict(set)  # by file, the tests of files that import it
        self.seconds: dict[str, float] = {}
        for module in measured:
            moved = {file: _moved(text, sources[file]) for file, text in module["sources"].items() if file in sources}
            for file, lines in moved.items():
                self.old[file].update(lines.values())
            every = list(module["tests"])
            self._add(every, module["shared"], moved)
            for file in module["shared"]:
                self.importers[file].update(every)
            for test, (seconds, files) in module["tests"].items():
                self.seconds[test] = seconds
                self._add([test], files, moved)

    def _add(self, tests: list[str], files: dict[str, list[int]], moved: dict[str, dict[int, int]]) -> None:
        for file in files.keys() & moved.keys():
            for line in files[file]:
                if line in moved[file]:
                    self.by_line[file][moved[file][line]].update(tests)

    def tests(self, edit: Edit) -> tuple[set[str], set[str]]:
        """Tests that reach an edit, and those that may see it beside them.

        At the top of a file, which an import runs, the first are those that run any function of it (of a default, that
        function), and the others those that only import it.
        """
        bodies, lines = self.bodies[edit.file], self.by_line[edit.file]
        here = set(edit.lines) & bodies
        if here:
            found = _union(lines, here)
            if not found and not here & self.old[edit.file]:  # new since it was measured
                found = _union(lines, edit.scope or bodies)
            return found, set()
        inside = _union(lines, bodies & set(edit.scope) if edit.scope else bodies)
        return inside, self.importers[edit.file] - inside


def _union(lines: dict[int, set[str]], numbers: Iterable[int]) -> set[str]:
    return set().union(*(lines[number] for number in numbers if number in lines))


def _body_lines(source: str) -> set[int]:
    """Lines that run when a function is called, and not at import."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {line for node in functions for line in range(node.body[0].lineno, node.end_lineno + 1)}


@functools.cache
def _moved(old: str, new: str) -> dict[int, int]:
    """Line numbers of an old text -> of the new one, for the lines that stayed."""
    blocks = difflib.SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False).get_matching_blocks()
    return {a + i + 1: b + i + 1 for a, b, size in blocks for i in range(size)}


class Measured:
    """The file in which measurements are kept."""

    def __init__(self, path: Path):
        self.path = path
        self.store = json.loads(path.read_text()) if path.exists() else {"texts": {}, "modules": {}}

    def fresh(self, file: str, text: str) -> bool:
        module = self.store["modules"].get(file)
        return module is not None and module["green"] and module["text"] == digest(text)

    def put(self, file: str, text: str, sources: dict[str, str], module: dict) -> None:
        """sources: the product's texts that it was measured with."""
        self.store["texts"] |= {digest(source): source for source in sources.values()}
        then = {name: digest(source) for name, source in sources.items()}
        self.store["modules"][file] = {**module, "text": digest(text), "sources": then}
        used = {key for kept in self.store["modules"].values() for key in kept["sources"].values()}
        self.store["texts"] = {key: text for key, text in self.store["texts"].items() if key in used}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.store))
        beside.replace(self.path)

    def modules(self, files: Iterable[str]) -> list[dict]:
        texts = self.store["texts"]
        kept = (self.store["modules"][file] for file in files if file in self.store["modules"])
        return [module | {"sources": {name: texts[key] for name, key in module["sources"].items()}} for module in kept]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
