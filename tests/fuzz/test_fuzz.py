"""The fuzzer notices what goes wrong, names it, keeps the case, and goes on. What it finds is for `make fuzz`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz.kinds import SEEDS, case


@pytest.mark.slow
def test_a_case_that_goes_wrong_is_named_and_kept_and_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "OUT", tmp_path)
    monkeypatch.setattr(fuzz, "SECONDS", 5)
    found = fuzz.run("fault", 0, 9, float("inf"))
    said = [re.sub(r"\d+ MiB", "N MiB", line.partition(";")[0]) for line in found]
    assert said == [
        "fault, seed 0, case 1: it ended the process (-11)",
        "fault, seed 0, case 2: ZeroDivisionError: 'not an error of ours'",
        "fault, seed 0, case 3: not done after 5 s",
        "fault, seed 0, case 4: N MiB of memory",
        "fault, seed 0, case 5: a message of several lines, or a long one: 'several\\nlines'",
    ]
    assert (tmp_path / "fault-0-3").read_bytes() == b"hang"
    assert fuzz.run("fault", 0, 9, 0) == []  # its time is over


def test_cases_depend_on_their_numbers_alone() -> None:
    for name in ("image", "text", "sidecar"):
        again = [case(name, 4, number) for number in range(20)]
        assert again == [case(name, 4, number) for number in range(20)]
        assert len(set(again)) > 15
        assert again != [case(name, 5, number) for number in range(20)]


def test_what_crashed_once_is_tried_first() -> None:
    kept = sorted((SEEDS / "image").iterdir())
    assert [case("image", 0, number) for number in range(len(kept))] == [path.read_bytes() for path in kept]
