from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from trt_runtime import machine


def test_the_environment_names_versions_and_what_is_missing() -> None:
    found = machine.environment("numpy", "no-such-package", "opencv-python")
    assert list(found["versions"]) == ["python", "numpy", "no-such-package", "opencv-python"]
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["opencv-python"] == importlib.metadata.version("opencv-python")
    assert found["versions"]["no-such-package"] is None
    assert found["machine"] == machine.machine()
    assert found["machine"]["cpu"]
    assert list(found) == ["date", "command", "machine", "versions"]


def test_the_day_is_that_of_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the far side of the date line, whichever half of the day it is."""
    days = set()
    for zone in ("UTC+14", "UTC-14"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        days.add(machine.environment()["date"])
    monkeypatch.undo()
    time.tzset()
    today = datetime.now(timezone.utc)
    assert len(days) == 1
    assert days <= {(today - timedelta(minutes=minutes)).strftime("%Y-%m-%d") for minutes in (0, 5)}


def test_the_command_can_be_typed_again(tmp_path: Path) -> None:
    (tmp_path / "asked.py").write_text("from trt_runtime import machine\nprint(machine.environment()['command'])\n")
    result = subprocess.run(
        [sys.executable, "-m", "asked", "--model", "m.onnx", "--batch", "1,4"], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True,
    )  # fmt: skip
    assert result.stdout == "python -m asked --model m.onnx --batch 1,4\n"


CPUINFO = """processor\t: 0
model name\t: AMD EPYC 9R14  
flags\t\t: fpu sse4_2 avx2 {flags}

processor\t: 1
model name\t: another
flags\t\t: fpu sse4_2 avx2 {flags}
"""


@pytest.mark.parametrize(
    ("flags", "avx512", "amx"),
    [("", False, False), ("avx512f avx512bw", True, False), ("avx512f amx_bf16 amx_tile", True, True)],
)
def test_the_processor_of_another_machine(
    flags: str, avx512: bool, amx: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(flags=flags))
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / Path(name).name)
    assert machine.machine() == {
        "cpu": "AMD EPYC 9R14", "cores": machine.cores(), "avx512": avx512, "amx": amx, "system": platform.system(),
        "gpu": None,
    }  # fmt: skip


@pytest.mark.parametrize("content", [None, "processor: 0\nBogoMIPS: 50.00\n"])
def test_a_processor_without_a_name(content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on ARM, and where there is no /proc."""
    if content:
        (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / Path(name).name)
    found = machine.machine()
    assert found["cpu"] == (platform.processor() or platform.machine())
    assert not found["avx512"]
    assert not found["amx"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_cores_are_those_that_may_be_used() -> None:
    code = (
        "import os\nfrom trt_runtime.machine import cores\nbefore = cores()\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(before, cores())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(len(os.sched_getaffinity(0))), "1"]


def test_cores_where_no_one_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for count, expected in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert machine.cores() == expected


def test_the_load_is_that_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 2.5, 3.5), raising=False)
    assert machine.load_average() == 1.5
    monkeypatch.delattr(os, "getloadavg")
    assert machine.load_average() is None


def test_a_machine_is_busy_when_more_than_a_quarter_of_its_cores_are() -> None:
    assert [machine.busy(load, 4) for load in (0.0, 1.0, 1.01, 4.0)] == [False, False, True, True]
    assert not machine.busy(None, 4)
    assert [machine.busy(1.5, cores) for cores in (2, 8)] == [True, False]
