"""What a result depends on, recorded with it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from facespec.files import write_text


def environment(*packages: str) -> dict[str, Any]:
    """Return machine, versions of the named packages, date, commit and command line."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*: (.*)", cpuinfo)
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        commit = ""
    module = sys.modules["__main__"].__spec__
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python -m", module.name if module else sys.argv[0], *sys.argv[1:]]),
        "commit": commit,
        "machine": {
            "cpu": cpu[1].strip() if cpu else platform.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "avx512": "avx512f" in cpuinfo,
            "amx": "amx_tile" in cpuinfo,
            "system": platform.system(),
            "gpu": None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def write_result(path: Path, what: str, results: list[dict[str, Any]], *packages: str, **more: Any) -> None:
    """Write a result file: what was measured, the figures, and the environment they depend on."""
    record = {"what": what, **more, "results": results, **environment(*packages)}
    write_text(path, json.dumps(record, indent=2) + "\n")
