"""The table of faults: what was done to a run, and what became of it.

Each test here names both, `record_property("fault", "...")` and `record_property("outcome", "...")`; they travel with
its report, from xdist's workers too, and are printed at the end. `--fault_table FILE` writes them as Markdown, which is
what docs/faults.md holds.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--fault_table", metavar="FILE", help="write the table of faults and outcomes there, as Markdown")


def pytest_terminal_summary(terminalreporter, config):
    rows = fault_rows(terminalreporter.stats)
    if not rows:
        return
    terminalreporter.section(f"{len(rows)} faults and what happened")
    for fault, outcome, verdict in rows:
        terminalreporter.write_line(f"{verdict:<6} {fault}")
        terminalreporter.write_line(f"       {outcome}")
    if path := config.getoption("fault_table", None):
        Path(path).write_text(markdown(rows), encoding="utf-8")


def fault_rows(stats: dict[str, list]) -> list[tuple[str, str, str]]:
    """(fault, outcome, ok or FAILED) of every test that named a fault, by file and in the order of the file's tests."""
    rows = []
    for verdict, reports in stats.items():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            said = dict(report.user_properties)
            if "fault" in said:
                outcome = said.get("outcome", "the test ended before it could say")
                place = (report.location[0], report.location[1] or 0, report.nodeid)
                rows.append((place, (said["fault"], outcome, "ok" if verdict == "passed" else "FAILED")))
    return [row for _, row in sorted(rows)]


def markdown(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| fault | what happened |", "| --- | --- |"]
    for fault, outcome, verdict in rows:
        said = outcome if verdict == "ok" else f"**{verdict}**: {outcome}"
        lines.append(f"| {_cell(fault)} | {_cell(said)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """On one line, without what is of this machine and this time: its name and the tests' folders."""
    text = re.sub(r"/\S*/pytest-of-\w+/pytest-\d+(/popen-gw\d+)?/[^/\s]+", "DIR", " ".join(text.split()))
    return re.sub(rf"\b{re.escape(socket.gethostname())}\b", "HOST", text).replace("|", "\\|")
