"""What a result depends on, recorded with it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def environment(*packages: str) -> dict[str, Any]:
    """Return machine, versions of the named packages, date, commit and command line."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
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
            "cpu": cpu,
            "cores": len(os.sched_getaffinity(0)),
            "avx512": "avx512f" in flags,
            "amx": "amx_tile" in flags,
            "system": platform.system(),
            "gpu": None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }
