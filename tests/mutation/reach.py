"""Which test reaches which line of the product, and how long it takes: measured once, kept in build/mutation/.

A test function is measured again when its text changes. When the product changes, what was measured moves along with
the lines that stayed; a line that is new counts as reached by what reaches its function.
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
    "tests/offgpu", "tests/bench", "tests/packaging", "tests/mutation", "tests/kernels/interpreter",
    "tests/kernels/test_interpreted.py", "tests/kernels/test_mutations.py", "tests/kernels/test_emulated.py",
    "tests/kernels/test_autotune.py", "tests/kernels/test_stages_on_gpu.py", "tests/kernels/test_launch.py",
)  # fmt: skip


def test_files(root: Path) -> list[str]:
    found = sorted(path.relative_to(root).as_posix() for path in (root / "tests").rglob("test_*.py"))
    return [file for file in found if not file.startswith(NOT_FOR_THE_PRODUCT)]


def measure(copy: Copy, file: str, functions: Iterable[str]) -> dict:
    """Run test functions of one file, traced: {"tests": {node id: [seconds, {file: lines}]}, "shared": {file: lines},
    "failed": {node id: why}}. shared: reached at import and in fixtures of the whole file.
    """
    answer = copy.run({file: []}, trace=True, functions=list(functions))
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
    green = {test: seconds for test, seconds in answer["seconds"].items() if test not in answer["failed"]}
    tests = {test: [seconds, found.pop(test, {})] for test, seconds in green.items()}
    return {"tests": tests, "shared": found.get(file, {}), "failed": answer["failed"]}


class Reach:
    """What was measured, for the tree as it is now."""

    def __init__(self, sources: dict[str, str], measured: Iterable[dict]):
        """sources: {file: text} now. measured: what `measure` gave, with the "sources" of then."""
        self.bodies = {file: _body_lines(text) for file, text in sources.items()}
        self.by_line: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.importers: dict[str, set[str]] = defaultdict(set)  # by file, the tests whose files, or who, import it
        self.seconds: dict[str, float] = {}
        for module in measured:
            moved = {file: _moved(text, sources[file]) for file, text in module["sources"].items() if file in sources}
            every = list(module["tests"])
            self._add(every, module["shared"], moved)
            for file in module["shared"]:
                self.importers[file].update(every)
            for test, (seconds, files) in module["tests"].items():
                self.seconds[test] = seconds
                for file in files:
                    self.importers[file].add(test)
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
            # A line may be new since it was measured, or one that only torch.compile reads.
            return found, set() if found else _union(lines, bodies & set(edit.scope))
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
    """The file in which measurements are kept: by test file, what was measured of its functions, and when that was all
    at different times, in parts."""

    def __init__(self, path: Path):
        self.path = path
        self.store = json.loads(path.read_text()) if path.exists() else {"texts": {}, "modules": {}}

    def due(self, file: str, text: str) -> set[str]:
        """The test functions that are new or were changed since they passed."""
        known = self.store["modules"].get(file, {"functions": {}})["functions"]
        return {name for name, mark in test_functions(text).items() if known.get(name) != mark}

    def put(self, file: str, text: str, functions: set[str], sources: dict[str, str], part: dict) -> None:
        """part: what `measure` gave of these functions, with these texts of the product."""
        now = test_functions(text)
        module = self.store["modules"].setdefault(file, {"functions": {}, "parts": []})
        gone = functions | (module["functions"].keys() - now.keys())
        for old in module["parts"]:
            old["tests"] = {test: found for test, found in old["tests"].items() if function_of(test) not in gone}
        module["parts"] = [old for old in module["parts"] if old["tests"]]
        failed = {function_of(test) for test in part.pop("failed")}
        module["functions"] = {name: mark for name, mark in module["functions"].items() if name not in gone}
        module["functions"] |= {name: now[name] for name in functions - failed}
        self.store["texts"] |= {digest(source): source for source in sources.values()}
        module["parts"].append({**part, "sources": {name: digest(source) for name, source in sources.items()}})
        used = {key for kept in self._parts() for key in kept["sources"].values()}
        self.store["texts"] = {key: source for key, source in self.store["texts"].items() if key in used}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.store))
        beside.replace(self.path)

    def _parts(self) -> list[dict]:
        return [part for module in self.store["modules"].values() for part in module["parts"]]

    def parts(self, files: Iterable[str]) -> list[dict]:
        texts = self.store["texts"]
        kept = [part for file in files for part in self.store["modules"].get(file, {"parts": []})["parts"]]
        return [part | {"sources": {name: texts[key] for name, key in part["sources"].items()}} for part in kept]


def test_functions(text: str) -> dict[str, str]:
    """{name: digest} of the test functions of a file."""
    lines = text.splitlines()
    return {
        node.name: digest("\n".join(lines[min(n.lineno for n in [node, *node.decorator_list]) - 1 : node.end_lineno]))
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    }


def function_of(test: str) -> str:
    """`test_x` of tests/test_file.py::test_x[parameters]."""
    return test.partition("::")[2].partition("[")[0]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
