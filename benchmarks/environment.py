"""What a result depends on, recorded with it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from facespec.files import write_text
from trt_runtime import machine


def environment(*packages: str) -> dict[str, Any]:
    """Return date, command line, machine, versions of the named packages, and commit."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        commit = ""
    return {**machine.environment(*packages), "commit": commit}


def write_result(path: Path, what: str, results: list[dict[str, Any]], *packages: str, **more: Any) -> None:
    """Write a result file: what was measured, the figures, and the environment they depend on."""
    record = {"what": what, **more, "results": results, **environment(*packages)}
    write_text(path, json.dumps(record, indent=2) + "\n")
