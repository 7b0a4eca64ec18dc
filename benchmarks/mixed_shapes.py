"""A folder of photographs of many shapes: `trt_runtime.detect --size 640` against `--size 640x640`.

python -m benchmarks.mixed_shapes --data WIDERFACE [--before CHECKOUT] [--out benchmarks/results/mixed_shapes.json]

Each command runs the published mobilenet0.25 on 60 images of different shapes once, so that whatever a new shape costs
is in it. The commands take turns. With `--before` the same are run by the code in another checkout, too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.cpu_latency import export
from benchmarks.environment import benchmark_parser, parse, write_result
from facespec.cli import run, text_table
from facespec.errors import DataError

COMMANDS = ("--size 640x640", "--size 640", "--size 640 --backend onnxruntime")
ROW = ("code", "options", "frames_per_second", "times_as_fast_as_640x640", "faces")
SUMMARY = re.compile(r"(\d+) frames?, (\d+) faces?, .*\(([\d.]+) frames/s\)")

ROOT = Path(__file__).parent.parent


def mixed_images(folder: Path, count: int) -> list[Path]:
    """Return images of a folder, one of each shape before any shape comes again."""
    from PIL import Image

    by_shape: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(folder.glob("*/*.jpg")):
        with Image.open(path) as image:
            by_shape.setdefault(image.size, []).append(path)
    if len(by_shape) < 2:
        raise DataError(f"{folder}: expected images of several shapes in folders, found {len(by_shape)} shapes")
    longest = max(map(len, by_shape.values()))
    turns = [paths[turn] for turn in range(longest) for paths in by_shape.values() if turn < len(paths)]
    return turns[:count]


def timed(root: Path, model: Path, options: str, images: Path) -> tuple[float, int]:
    """Return frames a second and faces of `trt_runtime.detect` by the code in `root`."""
    command: list[Any] = [sys.executable, "-m", "trt_runtime.detect", images, "--model", model, *options.split()]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    said = SUMMARY.search(done.stdout + done.stderr)
    if done.returncode or said is None:
        raise DataError(f"{root}: {' '.join(done.stderr.split())[-300:]}")
    return float(said[3]), int(said[2])


def main() -> int:
    """Run all in turns, print the table and write the result."""
    parser = benchmark_parser("mixed_shapes", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder with val/images")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="older checkout of this project")
    parser.add_argument("--count", type=int, default=60, help="images")
    parser.add_argument("--rounds", type=int, default=5, help="times every row is run")
    args = parse(parser, count=6, rounds=1)
    images = mixed_images(args.data.resolve() / "val" / "images", args.count)
    roots = {"now": ROOT, **({"before": args.before.resolve()} if args.before else {})}
    cases = [(code, options) for code in roots for options in COMMANDS]
    found: list[list[tuple[float, int]]] = [[] for _ in cases]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        folder.mkdir()
        for index, path in enumerate(images):
            (folder / f"{index}{path.suffix}").symlink_to(path)
        model = export(Path(name) / "any_size.onnx", None, "fp32", None)
        for _ in tqdm(range(args.rounds + 1), unit="round", disable=None):  # the first compiles libraries
            for each, (code, options) in zip(found, cases, strict=True):
                each.append(timed(roots[code], model, options, folder))
    rows: list[dict[str, Any]] = []
    for (code, options), (_, *each) in zip(cases, found, strict=True):
        speeds = [speed for speed, _ in each]
        squares = [speed for speed, _ in found[cases.index((code, COMMANDS[0]))][1:]]
        ratio = median(speed / square for speed, square in zip(speeds, squares, strict=True))
        row = {"code": code, "options": options, "frames_per_second": median(speeds), "faces": each[0][1]}
        rows.append({**row, "times_as_fast_as_640x640": round(ratio, 3)})
    what = (
        f"python -m trt_runtime.detect on {len(images)} images of WIDER FACE of different shapes: medians of "
        f"{args.rounds} runs that take turns, ratios within a turn; reading images is in it, loading the model is not"
    )
    write_result(args, what, rows, "openvino", "onnxruntime", "numpy", "opencv-python")
    header = ["code", "options", "frames/s", "times as fast as 640x640", "faces"]
    print(text_table(header, [[str(row[key]) for key in ROW] for row in rows]))
    return 0


if __name__ == "__main__":
    run(main)
