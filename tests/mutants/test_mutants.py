"""The lists of faults fit the code, and the runner tells a fault that is noticed from one that is not."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.mutants.faults import LISTS, ROOT, Fault, read_faults


@functools.cache
def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", LISTS, ids=[path.stem for path in LISTS])
def test_every_fault_fits_the_code(path: Path) -> None:
    faults = read_faults([path])
    assert faults
    for fault in faults:
        text = fault.changed(_text(fault.file))
        if fault.file.endswith(".py"):
            compile(text, fault.file, "exec", ast.PyCF_ONLY_AST)
        assert fault.fault.endswith("."), fault
        assert fault.tests, fault
        for test in fault.tests:
            place, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in _text(f"tests/{place}"), fault


def test_the_lists_cover_all_packages() -> None:
    faults = read_faults()
    assert len({(fault.file, fault.old, fault.new) for fault in faults}) == len(faults) >= 120
    packages = Counter(fault.file.split("/")[0] for fault in faults)
    assert all(packages[name] >= 20 for name in ("facespec", "plugins", "export", "trainer", "trt_runtime"))
    assert sum(fault.is_native for fault in faults) >= 20


@pytest.mark.slow
def test_the_runner_tells_noticed_from_survived_and_broken(tmp_path: Path) -> None:
    name = "facespec/test_boxes.py::test_iou_equals_counting_pixels"
    line = "    union = box_areas(a_xyxy)[:, None] + box_areas(b_xyxy)[None, :] - inter\n"
    path = tmp_path / "three.yaml"
    faults = [
        {"old": line, "new": line.replace("- inter", "- inter + 1"), "fault": "The union is one too large."},
        {"old": line, "new": line + "\n", "fault": "A line is empty."},
        {"old": "no such text", "new": "", "fault": "It does not fit."},
    ]
    entries = [{"file": "facespec/boxes.py", "tests": [name], **fault} for fault in faults]
    path.write_text(yaml.safe_dump(entries), encoding="utf-8")
    command = [sys.executable, "-m", "tests.mutants", "--list", str(path), "--jobs", "1"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    rows = result.stdout.splitlines()
    assert [row.split()[1] for row in rows[1:4]] == ["noticed", "survived", "broken"], result.stdout + result.stderr
    assert rows[1].endswith(f"[{name}]")
    assert rows[4] == "1 of 3 noticed, 1 survived, 1 broken"
    assert result.returncode == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_fault_without_tests_goes_to_its_mirror() -> None:
    def places(file: str) -> list[str]:
        return Fault(file, "", "", "").places()

    assert places("facespec/boxes.py") == ["tests/facespec/test_boxes.py"]
    assert places("facespec/__init__.py") == ["tests/facespec"]
    assert places("plugins/src/plugin.cpp") == ["tests/plugins"]
    assert places("trainer/data/nothing.py") == ["tests/trainer/data"]
