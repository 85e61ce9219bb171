"""Imports go one way: train -> run -> model -> parallel; kernels, parallel, data stand alone; bench, tests see all."""

import ast
import graphlib
import importlib
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "parallel", "model", "data", "run", "offgpu", "bench")

# Folder -> the folders of ours that its files may import from.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "parallel": {"parallel"},
    "data": {"data"},
    "model": {"model", "parallel"},
    "run": {"run", "data", "model", "parallel", "kernels"},
    "offgpu": {*FOLDERS, "tests"},
    "bench": {*FOLDERS, "tests"},
}
SCRIPTS_MAY_IMPORT = set(FOLDERS) - {"bench", "offgpu"}


def imported_modules(source: str) -> list[str]:
    """Absolute names of everything that the source imports, `from heiretsu import kernels` as heiretsu.kernels."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                names.append("." * node.level + (node.module or ""))
            elif node.module == "heiretsu":
                names += [f"heiretsu.{alias.name}" for alias in node.names]
            else:
                names.append(node.module or "")
    return names


def faults(source: str, allowed: set[str]) -> list[str]:
    """What the source imports that it may not: our folders by their bare name, or outside `allowed`, or the tests."""
    found = []
    for name in imported_modules(source):
        top, _, rest = name.partition(".")
        if name.startswith("."):
            found.append(f"relative import {name}")
        elif top in FOLDERS or (top == "tests" and "tests" not in allowed):
            found.append(f"import {name} (write heiretsu.{name})")
        elif top == "heiretsu" and rest.partition(".")[0] not in allowed:
            found.append(f"import {name}")
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_imports_only_what_is_below_it(folder):
    files = sources(folder)
    assert files, f"{folder}/ has no Python file"
    found = {str(f.relative_to(ROOT)): faults(f.read_text(), MAY_IMPORT[folder]) for f in files}
    assert {name: bad for name, bad in found.items() if bad} == {}


def test_entry_scripts_import_neither_bench_nor_tests():
    scripts = sorted(set(ROOT.glob("*.py")) - {ROOT / "setup.py"})
    found = {f.name: faults(f.read_text(), SCRIPTS_MAY_IMPORT) for f in scripts}
    assert {name: bad for name, bad in found.items() if bad} == {}


def module_name(path: Path) -> str:
    return ".".join(("heiretsu", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def floors(programs: dict[str, str]) -> list[str]:
    """Names of modules, each after all that it imports, for types or late ones included. CycleError names a circle."""
    below = {}
    for name, source in programs.items():
        nodes = list(ast.walk(ast.parse(source)))
        froms = [
            (node.module or "", alias.name)
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        names = {f"{module}.{one}" if f"{module}.{one}" in programs else module for module, one in froms}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        below[name] = names & programs.keys()
    return list(graphlib.TopologicalSorter(below).static_order())


def test_no_module_comes_back_to_itself_through_its_imports():
    folders = ("kernels", "parallel", "model", "data", "run")
    programs = {module_name(path): path.read_text() for folder in folders for path in sources(folder)}
    assert set(floors(programs)) == set(programs)


def test_a_circle_is_seen():
    programs = {"heiretsu.a": "from heiretsu.b import x", "heiretsu.b": "def f():\n    from heiretsu import a"}
    with pytest.raises(graphlib.CycleError):
        floors(programs)


LISTING = [path for folder in FOLDERS for path in sources(folder) if "__all__ = " in path.read_text()]


@pytest.mark.parametrize("path", LISTING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_module_lists_as_its_own_is_there(path):
    module = importlib.import_module(module_name(path))
    assert [missing for missing in module.__all__ if not hasattr(module, missing)] == []


def test_tests_use_the_installed_names():
    for path in sources("tests"):
        bare = [n for n in imported_modules(path.read_text()) if n.partition(".")[0] in FOLDERS]
        assert bare == [], f"{path.relative_to(ROOT)}: {bare} (write heiretsu....)"
    assert set(FOLDERS) == set(MAY_IMPORT)


@pytest.mark.parametrize(
    "line",
    [
        "import kernels",
        "from parallel import mesh",
        "from heiretsu import data",
        "import heiretsu.model.gpt",
        "from heiretsu.bench.kernels import run",
        "def f():\n    from heiretsu.model import gpt",
        "from . import plain",
        "from tests.kernels import parity",
    ],
)
def test_a_forbidden_import_is_seen(line):
    assert faults(line, {"kernels"})


@pytest.mark.parametrize("file", ["sample.py", "data/tokenizer.py", "data/corpus.py"])
def test_who_only_names_tiktokens_types_does_not_import_it(file, monkeypatch):
    """Who reads token shards need not have it, and it takes a while."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    runpy.run_path(str(ROOT / file), run_name="imported")
