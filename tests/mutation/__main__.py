"""Edit the product at random, a bit at a time, and see whether a test notices: the mutation score.

    python -m tests.mutation --seed 1 --count 200                      # make mutate ARGS="--seed 1 --count 200"
    python -m tests.mutation --seed 1 --count 50 --files 'parallel/*'  # a part of the product
    python -m tests.mutation --edits parallel/mesh.py:97               # every edit of one line

Each edit is tried alone in a copy of the tree, on the tests that reach it, up to --budget seconds of them: those of its
own test file first, then the quickest files and those that speak of what is edited. One that no test notices survives,
and is printed. Edits that are listed in equal.txt, because they change nothing that a user can see, are not drawn.
Triton's kernels have a list of their own: tests/kernels/mutation_runner.py. See docs/mutation-score.md.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import queue
import random
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutation.copies import SLOW_IMPORTS, Copy
from tests.mutation.edits import Edit, edits_of
from tests.mutation.equal import read_equal
from tests.mutation.reach import Measured, Reach, measure, test_files, test_functions

PRODUCT = [
    "train.py", "sample.py", "convert.py", "modal_train.py", "model/**/*.py",
    "parallel/**/*.py", "data/*.py", "run/**/*.py",
    "kernels/*.py", "kernels/cpu/*.py",
]  # fmt: skip
NAME = re.compile(r"[A-Za-z_]\w+")
IMPORT = "its import alone"  # no test has this name: the file is collected, and nothing is run
FIRST_BUNDLE_S = 3.0  # most edits are seen by the first few tests: no need to import the files of all the others


@dataclass
class Verdict:
    edit: Edit
    caught: bool
    by: str  # the test, or why none could
    why: str = ""
    seconds: float = 0.0


@dataclass
class Session:
    """What the workers share."""

    root: Path
    sources: dict[str, str]
    reach: Reach
    words: dict[str, set[str]]  # of the test files
    budget_s: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    green: dict[str, bool] = field(default_factory=dict)  # tests -> they pass without any edit
    red: set[str] = field(default_factory=set)  # tests, and files, that do not


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    root = Path(options.root)
    sources = {
        path.relative_to(root).as_posix(): path.read_text()
        for pattern in PRODUCT
        for path in sorted(root.glob(pattern))
    }
    edits = [edit for file, text in sources.items() for edit in edits_of(file, text)]
    equal, unused = read_equal(root / "tests/mutation/equal.txt", edits)
    for entry in unused:
        print(f"equal.txt: no edit is {entry} any more")
    with contextlib.ExitStack() as stack:
        copies = [
            stack.enter_context(Copy(root, options.patience, imports=options.imports)) for _ in range(options.jobs)
        ]
        files = [f for f in test_files(root) if any(fnmatch.fnmatch(f, glob) for glob in options.tests)]
        measured = Measured(root / "build" / "mutation" / "reach.json")
        _measure_all(copies, measured, root, files, sources, options.measure)
        words = {file: set(NAME.findall((root / file).read_text())) for file in files}
        session = Session(root, sources, Reach(sources, measured.parts(files)), words, options.budget)
        chosen, skipped = draw_edits(edits, equal, sources, options)
        print(f"{len(edits)} edits of {len(sources)} files, {len(equal)} of them listed as equal; {len(chosen)} to try")
        verdicts = _try_all(copies, session, chosen)
    _summarise(verdicts, skipped, options)
    return 0


def _parse(arguments):
    parser = argparse.ArgumentParser(prog="mutate", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seed", type=int, default=1, help="of the draw")
    add("--count", type=int, default=200, help="how many edits are drawn")
    add("--files", nargs="+", default=["*"], metavar="GLOB", help="draw from these files only")
    add("--edits", nargs="+", metavar="FILE[:LINE]", help="try every edit there instead of drawing")
    add("--tests", nargs="+", default=["*"], metavar="GLOB", help="judge by these test files only")
    add("--budget", type=float, default=60.0, metavar="S", help="seconds of tests for each edit, as measured")
    add("--patience", type=float, default=20.0, metavar="S", help="beyond ten times its time, until a test hangs")
    add("--jobs", type=int, default=os.cpu_count(), help="edits at a time")
    add("--measure", action="store_true", help="measure again which test reaches what")
    add("--json", metavar="FILE", help="write the verdicts there")
    add("--imports", nargs="*", default=SLOW_IMPORTS, help=argparse.SUPPRESS)
    add("--root", default=str(Path(__file__).parents[2]), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _measure_all(copies, measured: Measured, root: Path, files: list[str], sources, again: bool) -> None:
    texts = {file: (root / file).read_text() for file in files}
    every = {file: set(test_functions(text)) for file, text in texts.items()}
    due = {file: every[file] if again else measured.due(file, text) for file, text in texts.items()}
    lock = threading.Lock()

    def one(copy: Copy, file: str) -> None:
        began = time.monotonic()
        part = measure(copy, file, due[file])
        with lock:
            print(f"measured {file}: {len(part['tests'])} tests, {time.monotonic() - began:.0f} s", flush=True)
            for test, why in part["failed"].items():
                print(f"    NOT GREEN without an edit: {test}: {why}", flush=True)
            measured.put(file, texts[file], due[file], sources, part)

    _share(copies, [file for file in files if due[file]], one)


def _share(copies: list[Copy], work: list, do) -> None:
    """do(copy, item) for each item, on all copies at a time."""
    items: queue.SimpleQueue = queue.SimpleQueue()
    for item in work:
        items.put(item)
    errors: list[BaseException] = []

    def serve(copy: Copy) -> None:
        try:
            while not errors:
                do(copy, items.get_nowait())
        except queue.Empty:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(copy,), daemon=True) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def draw_edits(edits: list[Edit], equal: set[Edit], sources: dict[str, str], options) -> tuple[list[Edit], int]:
    """The edits to try, and how many were passed over because they are listed as equal."""
    if options.edits:
        edits = [edit for edit in edits if {edit.file, f"{edit.file}:{edit.line}"} & set(options.edits)]
        wanted = len(edits)
    else:
        edits = [edit for edit in edits if any(fnmatch.fnmatch(edit.file, glob) for glob in options.files)]
        random.Random(options.seed).shuffle(edits)
        wanted = options.count
    chosen: list[Edit] = []
    skipped = 0
    for edit in edits:
        if len(chosen) == wanted:
            break
        if edit in equal:
            skipped += 1
        elif edit.is_edit(sources[edit.file]):
            chosen.append(edit)
    return chosen, skipped


def _try_all(copies: list[Copy], session: Session, edits: list[Edit]) -> list[Verdict]:
    verdicts: list[Verdict] = []

    def one(copy: Copy, edit: Edit) -> None:
        began = time.monotonic()
        verdict = try_edit(copy, session, edit)
        verdict.seconds = time.monotonic() - began
        with session.lock:
            verdicts.append(verdict)
            outcome = f"caught by {verdict.by} ({verdict.why[:90]})" if verdict.caught else f"SURVIVED {verdict.by}"
            print(f"[{len(verdicts)}/{len(edits)}] {edit}\n    {outcome}, {verdict.seconds:.1f} s", flush=True)

    _share(copies, edits, one)
    return verdicts


def try_edit(copy: Copy, session: Session, edit: Edit) -> Verdict:
    """Run the tests that reach an edit until one notices it."""
    tests, beside = session.reach.tests(edit)
    if not tests | beside:
        return Verdict(edit, False, "as no test reaches it")
    files = {edit.file: edit.apply(session.sources[edit.file])}
    bundles, left_out = _bundles(edit, tests, beside, session)
    for bundle in bundles:
        while bundle:
            answer = copy.run(bundle, files, session.reach.seconds)
            if answer["verdict"] == "green":
                break
            if answer["verdict"] == "broken":
                raise RuntimeError(f"{edit}: {answer['why']}\n{copy.output()}")
            blamed = blamed_for(answer["test"], bundle)
            if answer["verdict"] == "hung" and IMPORT not in str(blamed):  # or only slow, with others at work beside it
                answer = copy.run(blamed, files, session.reach.seconds, patience=3.0) | {"test": answer["test"]}
            if answer["verdict"] != "green" and _is_green(copy, session, blamed):
                return Verdict(edit, True, answer["test"], answer["why"])
            bundle = without(bundle, blamed)
    note = f" within the budget, {left_out} more reach it" if left_out else ""
    return Verdict(edit, False, f"{len(tests | beside) - left_out} tests{note}")


def blamed_for(test: str, bundle: dict[str, list[str]]) -> dict[str, list[str]]:
    """What to run to see whether it fails without any edit: the test, its file's import, or, of a process that died
    elsewhere, all."""
    if "::" in test:
        return {test.partition("::")[0]: [test]}
    if test == "collection":
        return {file: [IMPORT] for file in bundle}
    return {test: [IMPORT]} if test in bundle else bundle


def without(bundle: dict[str, list[str]], blamed: dict[str, list[str]]) -> dict[str, list[str]]:
    gone = {name for names in blamed.values() for name in names}
    left = {file: [name for name in names if name not in gone] for file, names in bundle.items()}
    imports = {file for file, names in blamed.items() if not set(names) & set(bundle[file])}
    return {file: names for file, names in left.items() if names and file not in imports}


def _is_green(copy: Copy, session: Session, tests: dict[str, list[str]]) -> bool:
    """That tests pass without any edit, seen once."""
    key = json.dumps(tests)
    if key not in session.green:
        answer = copy.run(tests, seconds=session.reach.seconds)
        session.green[key] = answer["verdict"] == "green"
        if not session.green[key]:
            print(f"fails without any edit, and judges none: {answer['test']}: {answer['why']}", flush=True)
            session.red |= {answer["test"], *tests} if "::" not in answer["test"] else {answer["test"]}
    return session.green[key]


def _bundles(edit: Edit, tests: set[str], beside: set[str], session: Session) -> tuple[list[dict[str, list[str]]], int]:
    """{file: tests} to run one after the other, and how many tests are too slow for the budget."""
    seconds = session.reach.seconds
    by_file: dict[str, list[str]] = {}
    for test in sorted(tests | beside, key=lambda test: (seconds[test], test)):
        file = test.partition("::")[0]
        if not session.red & {test, file}:
            by_file.setdefault(file, []).append(test)
    path = Path(edit.file)
    own = Path("tests", path.parent, f"test_{path.name}").as_posix()
    speak_of = {name: [file for file in by_file if name in session.words[file]] for name in NAME.findall(edit.before)}

    def place(file):
        """The edited file's own tests first, then the quickest; those that run what is edited, and files that have rare
        names of the edited lines in them, may take longer."""
        cost = sum(seconds[name] for name in by_file[file])
        kinship = 0.1 + 0.4 * (not tests.isdisjoint(by_file[file]))
        kinship += sum(1 / len(files) for files in speak_of.values() if file in files)
        return file != own, cost / kinship, file

    order = sorted(by_file, key=place)
    bundles: list[dict[str, list[str]]] = [{}, {}]
    spent, left_out = 0.0, 0
    for file in order:
        for test in by_file[file]:
            if spent + seconds[test] > session.budget_s:
                left_out += 1
                continue
            bundle = bundles[spent > FIRST_BUNDLE_S]
            spent += seconds[test]
            bundle.setdefault(file, []).append(test)
    return [bundle for bundle in bundles if bundle], left_out


def _summarise(verdicts: list[Verdict], skipped: int, options) -> None:
    survivors = sorted((v for v in verdicts if not v.caught), key=lambda v: (v.edit.file, v.edit.start))
    if options.json:
        rows = [{**vars(v), "edit": str(v.edit), "file": v.edit.file, "line": v.edit.line} for v in verdicts]
        Path(options.json).write_text(json.dumps(rows, indent=1))
    kinds = Counter(v.edit.kind for v in verdicts)
    lost = Counter(v.edit.kind for v in survivors)
    print("\n" + "\n".join(f"{kind}: {kinds[kind] - lost[kind]} of {kinds[kind]}" for kind in sorted(kinds)))
    if survivors:
        print("\nSurvivors:")
    for verdict in survivors:
        print(f"{verdict.edit}    (survived {verdict.by})")
    slow = sum(v.caught and v.why == "time limit" for v in verdicts)
    caught, total = len(verdicts) - len(survivors), len(verdicts)
    what = "the edits asked for" if options.edits else f"seed {options.seed}"
    print(
        f"\n{what}: {caught} of {total} caught ({caught / max(1, total):.1%}), {slow} of them by the time limit; "
        f"{skipped} were passed over as listed in equal.txt"
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
