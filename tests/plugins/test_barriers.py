"""Every barrier of the kernels is needed, and no other is: ThreadSanitizer watches real threads play a block."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from plugins.build import ROOT, find_compiler

KERNELS = ROOT / "src" / "decode_nms.cuh"
PROGRAM = Path(__file__).parent / "tsan_main.cpp"
BARRIERS = [
    number for number, line in enumerate(KERNELS.read_text(encoding="utf-8").splitlines(), 1) if ".sync()" in line
]
RACE = 66  # what ThreadSanitizer exits with
TIMEOUT_S = 20  # a run that is clean takes half a second

Program = list[str]


def _run(program: Program, skipped_line: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, str(skipped_line)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE}"},
    )


def _compile(source: Path, out: Path, *more: object) -> str:
    """Compile with ThreadSanitizer; return what the compiler complained about, or ""."""
    flags = ("-std=c++17", "-O1", "-g", "-fsanitize=thread", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread")
    command = [find_compiler(), *flags, source, *more, "-o", out]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return result.stderr if result.returncode or result.stderr else ""


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """What stands before a program with ThreadSanitizer here: nothing, or a command that fixes its addresses.

    Kernels that spread addresses widely are too much for older versions of it.
    """
    folder = tmp_path_factory.mktemp("tsan")
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    problem = _compile(source, folder / "probe")
    if problem:
        pytest.skip(f"no ThreadSanitizer in this compiler: {problem.splitlines()[0]}")
    for prefix in ([], ["setarch", "-R"]):
        try:
            result = _run([*prefix, str(folder / "probe")], 0)
        except FileNotFoundError:
            continue
        if result.returncode == 0:
            return prefix
    pytest.skip(f"ThreadSanitizer does not start on this machine: {result.stderr.strip()[:200]}")


@pytest.fixture(scope="session")
def program(prefix: Program, tmp_path_factory: pytest.TempPathFactory) -> Program:
    out = tmp_path_factory.mktemp("barriers") / "tsan_main"
    sources = ROOT / "src"
    assert _compile(PROGRAM, out, sources / "check.cpp", f"-I{ROOT / 'include'}", f"-I{sources}") == ""
    return [*prefix, str(out)]


def test_threads_do_not_race_and_equal_the_forward_order(program: Program) -> None:
    for _ in range(3):
        result = _run(program, 0)
        assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"kept (\d+) (\d+) (\d+) of (\d+) (-?\d+) (\d+)", result.stdout)
    assert len(rows) == 5
    for kept, broken, last, found, broken_found, _ in ([int(number) for number in row] for row in rows):
        assert broken == 0
        assert broken_found == -1
        assert 0 < kept <= found
        assert 0 < last <= found


def test_the_barriers_threads_wait_at_are_those_of_the_source(program: Program) -> None:
    """So each of them is left out below, and none stands where the cases do not come."""
    said = _run(program, 0).stdout.splitlines()[-1].split()
    assert said[0] == "barriers"
    assert [int(number) for number in said[1:]] == BARRIERS
    assert sum("warp.sync()" in line for line in KERNELS.read_text(encoding="utf-8").splitlines()) == 4
    # of a line that has none nothing is left out
    assert 1 not in BARRIERS
    assert _run(program, 1).returncode == 0


@pytest.mark.parametrize("line", BARRIERS)
def test_without_a_barrier_two_threads_race(program: Program, line: int) -> None:
    assert _run(program, line).returncode == RACE, KERNELS.read_text(encoding="utf-8").splitlines()[line - 1]
