"""What all benchmarks share: their options, calls in turns, and results with what they depend on."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from facespec.cli import ArgumentParser
from facespec.files import check_outputs, write_text
from trt_runtime import measure
from trt_runtime.measure import Samples, take_turns


def write_result(
    args: argparse.Namespace, what: str, results: list[dict[str, Any]], *packages: str, **more: Any
) -> None:
    """Write the result file and say so: what was measured, in which units, a row for each case, `more`, the origin."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:
        commit = ""
    origin = {"load_average": args.load_average, **measure.environment(*packages), "commit": commit}
    write_text(args.out, json.dumps({"what": what, **more, "results": results, **origin}, indent=2) + "\n")
    print(f"wrote {args.out}")


def benchmark_parser(name: str, description: str | None) -> ArgumentParser:
    """Return a parser with the options that all benchmarks have: --out and --quick."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"result (default: benchmarks/results/{name}.json)")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs; --out is in build/quick")
    return parser


def parse(parser: ArgumentParser, **quick: Any) -> argparse.Namespace:
    """Return the arguments of the command line, and `load_average` of the machine; warn where it is busy.

    With --quick other options have the defaults of `quick`.

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
    args.load_average = measure.load_average()
    if measure.busy(args.load_average, measure.cores()):
        print(f"warning: the machine is busy (load average {args.load_average:.1f})", file=sys.stderr)
    return args


def in_turns(work: Sequence[tuple[Callable[[Any], object], Sequence[Any]]], repeats: int) -> list[Samples]:
    """Return the times of some callables as `take_turns` does, (rounds, calls) in ms each.

    Each comes with the items it is called with, one after the other and again from the first.
    """

    def numbered(call: Callable[[Any], object], items: Sequence[Any]) -> Callable[[int], object]:
        return lambda index: call(items[index % len(items)])

    from tqdm import tqdm  # where only kernels are timed, it need not be installed

    with tqdm(total=repeats * len(work), unit="call", leave=False, disable=None) as progress:
        return take_turns([numbered(*each) for each in work], repeats, progress=progress.update)
