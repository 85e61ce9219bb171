"""The list of wrong edits can be made in the tree as it is. That each is seen: `python -m tests.oracle.edits`."""

import pytest

from tests.oracle.edits import EDITS, ROOT, apply


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_the_edit_can_be_made_and_its_test_is_there(edit):
    compile(apply(edit, (ROOT / edit.file).read_text()), edit.file, "exec")
    file, _, test = edit.seen_by.partition("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text()
