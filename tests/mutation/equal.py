"""Edits that change nothing a user can see, as listed and judged in equal.txt."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.mutation.edits import Edit


def read_equal(path: Path, edits: Iterable[Edit]) -> tuple[set[Edit], list[str]]:
    """The edits that the file lists, and its entries that are none of them (any more).

    An entry is a reason (`# ...`), the file, the lines before (`- `) and after (`+ `) as a survivor is printed. Several
    may follow each other under one reason and file. After one line before, each line after is an edit of its own; an
    edit of several lines has as many after them as it has.
    """
    by_text: dict[tuple[str, str, str], list[Edit]] = {}
    for edit in edits:
        by_text.setdefault((edit.file, edit.before, edit.after), []).append(edit)
    found: set[Edit] = set()
    unused = []
    for entry in _entries(path.read_text().splitlines() if path.exists() else []):
        if entry in by_text:
            found.update(by_text[entry])
        else:
            unused.append(": ".join(entry))
    return found, unused


def _entries(lines: list[str]) -> Iterable[tuple[str, str, str]]:
    file, reason = "", False
    before: list[str] = []
    after: list[str] = []
    for line in [*lines, ""]:
        mark, text = line[:2], line[2:]
        if after and mark != "+ ":
            if not reason:
                raise ValueError(f"equal.txt: {file}: {before[0]} has no reason")
            for one in after if len(before) == 1 else ["\n".join(after)]:
                yield file, "\n".join(before), one
            before, after = [], []
        if mark == "# ":
            reason = True
        elif mark == "- ":
            before.append(text)
        elif mark == "+ ":
            after.append(text)
        elif line.strip():
            file = line.strip()
        else:
            reason = False  # an empty line ends what a reason is for
