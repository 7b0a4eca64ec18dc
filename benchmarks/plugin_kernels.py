"""Registers, spills and shared memory of the plugin's kernels, as the CUDA compiler reports them.

python -m benchmarks.plugin_kernels [--out benchmarks/results/plugin_kernels.json]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.environment import benchmark_parser, parse, write_result
from facespec.cli import run
from plugins.build import build

WHAT = (
    "Resources of the decode + NMS kernels, from ptxas. scan: 512 threads a block, a block for 128 priors (256, 512 "
    "... in images of more than 131,072 priors); finish: 1024 threads, one block an image; its shared memory sorts up "
    "to 4096 candidates, more are sorted in the workspace; up to 1024 go through NMS in registers and shared memory."
)


def main() -> int:
    """Build, write the table, print it."""
    parser = benchmark_parser("plugin_kernels", __doc__)
    args = parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        report = build("plugin", folder=Path(folder))
    more = {"sources_sha256": report.sources_sha256, "compiler": report.compiler_version}
    write_result(args, WHAT, [dict(row) for row in report.kernels], "numpy", **more)
    for row in report.kernels:
        print(*(f"{name} {value}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    run(main)
