"""The table that these tests print: each named fault once, failed ones marked."""

from types import SimpleNamespace

from tests.faults.conftest import fault_rows, markdown


def report(name, line, **said):
    return SimpleNamespace(
        when="call", location=("faults/test_x.py", line, name), nodeid=name, user_properties=list(said.items())
    )


def test_the_table_holds_every_named_fault_in_the_files_order():
    stats = {
        "passed": [report("b", 20, fault="disk | full", outcome="one line\nand on"), report("unnamed", 5)],
        "failed": [report("a", 10, fault="SIGKILL")],
    }
    rows = fault_rows(stats)
    assert rows == [
        ("SIGKILL", "the test ended before it could say", "FAILED"),
        ("disk | full", "one line\nand on", "ok"),
    ]
    assert markdown(rows).splitlines()[2:] == [
        "| SIGKILL | **FAILED**: the test ended before it could say |",
        "| disk \\| full | one line and on |",
    ]
