from __future__ import annotations

import pytest

from facespec.tables import text_table


def test_columns_are_as_wide_as_their_widest_text() -> None:
    rows = [["a long name", "1.25", "7"], ["b", "10.50", ""]]
    assert text_table(["", "ms", "faces"], rows).splitlines() == [
        "                ms  faces",
        "a long name   1.25      7",
        "b            10.50",
    ]
    assert text_table(["only", "a header"], []) == "only  a header"
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        text_table(["a", "b"], [["too few"]])
