"""What all benchmarks share: their options, and what a result depends on, recorded with it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from facespec.cli import ArgumentParser
from facespec.files import check_outputs, write_text
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


def benchmark_parser(name: str, description: str | None) -> ArgumentParser:
    """Return a parser with the options that all benchmarks have: --out and --quick."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"result (default: benchmarks/results/{name}.json)")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs; --out is in build/quick")
    return parser


def parse(parser: ArgumentParser, **quick: Any) -> argparse.Namespace:
    """Return the arguments of the command line.

    Args:
        parser: From `benchmark_parser`.
        quick: Defaults of other options with --quick.

    Raises:
        OutputError: The result cannot be written.
    """
    if "--quick" in sys.argv:
        parser.set_defaults(**quick)
    args = parser.parse_args()
    if args.out is None:
        folder = Path("build/quick" if args.quick else "benchmarks/results")
        args.out = folder / f"{parser.prog.rpartition('.')[2]}.json"
    check_outputs([("--out", args.out)], [])
    return args
