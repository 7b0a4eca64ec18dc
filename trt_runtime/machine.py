"""What a measured time depends on, to be recorded with it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from facespec.cli import PROGRAM

BUSY_SHARE = 0.25
"""Share of the cores that others may use before a measurement is doubtful."""


def environment(*packages: str) -> dict[str, Any]:
    """Return date, command line, machine and versions of the named packages; what is not installed is None."""
    module = sys.modules["__main__"].__spec__
    program = sys.argv[0] if module is None or sys.argv[0].startswith(PROGRAM) else f"python -m {module.name}"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join([program, *sys.argv[1:]]),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def machine() -> dict[str, Any]:
    """Return processor, cores that may be used, vector extensions and system; a caller that uses a GPU sets `gpu`."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*: (.*)", cpuinfo)
    return {
        "cpu": cpu[1].strip() if cpu else platform.processor() or platform.machine(),
        "cores": cores(),
        "avx512": "avx512f" in cpuinfo,
        "amx": "amx_tile" in cpuinfo,
        "system": platform.system(),
        "gpu": None,
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """Return how many processes ran or waited to run, averaged over the last minute; None if unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busy(load: float | None, cores: int) -> bool:
    """Whether a load leaves too little of the machine for a measurement to be trusted."""
    return load is not None and load > BUSY_SHARE * cores


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
