"""The log: silent in a library, lines on stderr in a command, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys, warnings
from facespec.cli import run
from facespec.log import get_logger

def tell():
    get_logger("video").debug("detail")
    get_logger("video").info("told")
    get_logger("video").warning("lost")
    warnings.warn("slow")
    print("result")
    return 0

{end}
"""


def _run(end: str) -> tuple[str, list[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", CODE.replace("{end}", end)]
    result = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60, check=True)
    return result.stdout, result.stderr.splitlines()


def test_a_library_is_silent() -> None:
    out, err = _run("tell()")
    assert out == "result\n"
    assert [line for line in err if "UserWarning" not in line and "warnings.warn" not in line] == []


def test_an_application_gets_what_it_asks_for() -> None:
    _, err = _run("import logging; logging.basicConfig(level=logging.INFO); tell()")
    assert err[:2] == ["INFO:retinaface_trt.video:told", "WARNING:retinaface_trt.video:lost"]


@pytest.mark.parametrize("end", ["run(tell)", "from facespec.log import tell_on_stderr; tell_on_stderr(); run(tell)"])
def test_a_command_tells_each_thing_once_on_stderr(end: str) -> None:
    out, err = _run(end)
    assert (out, err) == ("result\n", ["told", "lost", "warning: slow"])
