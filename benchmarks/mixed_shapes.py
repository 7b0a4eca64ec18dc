"""Images of many shapes, read once each: `size_hw=640` against the square that they are letterboxed to.

python -m benchmarks.mixed_shapes --data WIDERFACE [--before CHECKOUT] [--out benchmarks/results/mixed_shapes.json]

Each row is a process of its own that loads the published mobilenet0.25 and runs 60 images of different shapes once, as
a folder of photographs is run, so that whatever a new shape costs is in it. The rows take turns. With `--before` the
same is run by the code in another checkout of this project, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cpu_latency import export
from benchmarks.environment import benchmark_parser, parse, write_result
from facespec.cli import run, text_table
from facespec.errors import DataError

SIZES = {"640x640": (640, 640), "640": 640, "640, ONNX Runtime": 640}
"""By name: `size_hw`."""

ROOT = Path(__file__).parent.parent

TIMED = """
import json, sys, time
import cv2
from trt_runtime import load_detector

model, size, backend, *images = json.loads(sys.argv[1])
frames = [cv2.imread(image) for image in images]
with load_detector(model, size_hw=tuple(size) if isinstance(size, list) else size, backend=backend) as detector:
    start, used = time.perf_counter(), time.process_time()
    faces = sum(len(detector.detect(frame)) for frame in frames)
    times = time.perf_counter() - start, time.process_time() - used
print(json.dumps({"seconds": times[0], "cpu_seconds": times[1], "faces": faces}))
"""
"""What is run; it takes its arguments as JSON."""


def mixed_images(folder: Path, count: int) -> list[str]:
    """Return images of a folder, one of each shape before any shape comes again."""
    from PIL import Image

    by_shape: dict[tuple[int, int], list[str]] = {}
    for path in sorted(folder.glob("*/*.jpg")):
        with Image.open(path) as image:
            by_shape.setdefault(image.size, []).append(str(path))
    if len(by_shape) < 2:
        raise DataError(f"{folder}: expected images of several shapes in folders, found {len(by_shape)} shapes")
    longest = max(map(len, by_shape.values()))
    turns = [paths[turn] for turn in range(longest) for paths in by_shape.values() if turn < len(paths)]
    return turns[:count]


def timed(root: Path, model: Path, name: str, images: list[str]) -> dict[str, Any]:
    """Return the seconds and faces of one process that runs the code in `root`."""
    backend = "onnxruntime" if "ONNX" in name else "openvino"
    arguments = json.dumps([str(model), SIZES[name], backend, *images])
    done = subprocess.run(
        [sys.executable, "-c", TIMED, arguments], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DataError(f"{root}: {' '.join(done.stderr.split())[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Run all in turns, print the table and write the result."""
    parser = benchmark_parser("mixed_shapes", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder with val/images")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="older checkout of this project")
    parser.add_argument("--count", type=int, default=60, help="images")
    parser.add_argument("--rounds", type=int, default=5, help="times every row is run")
    args = parse(parser, count=6, rounds=1)
    images = mixed_images(args.data.resolve() / "val" / "images", args.count)
    cases = [("now", name, ROOT) for name in SIZES]
    if args.before:
        cases += [("before", name, args.before.resolve()) for name in SIZES]
    samples: list[list[dict[str, Any]]] = [[] for _ in cases]
    with tempfile.TemporaryDirectory() as folder:
        model = export(Path(folder) / "any_size.onnx", None, "fp32", None)
        for _ in range(args.rounds + 1):
            for found, (_, name, root) in zip(samples, cases, strict=True):
                found.append(timed(root, model, name, images))
    rows = []
    for (code, name, _), (_, *found) in zip(cases, samples, strict=True):  # the first round compiled libraries
        seconds = median(one["seconds"] for one in found)
        rows.append(
            {
                "code": code,
                "size": name,
                "frames_per_second": len(images) / seconds,
                "cpu_ms_per_frame": 1000 * median(one["cpu_seconds"] for one in found) / len(images),
                "faces": found[0]["faces"],
            }
        )
    square = {row["code"]: row["frames_per_second"] for row in rows if row["size"] == "640x640"}
    for row in rows:
        row["times_as_fast_as_640x640"] = row["frames_per_second"] / square[row["code"]]
    what = (
        f"{len(images)} images of WIDER FACE, each of them once, by size_hw: medians of {args.rounds} processes each; "
        "loading the model and reading the images are not in it, what a new shape costs is"
    )
    write_result(args, what, rows, "openvino", "onnxruntime", "numpy", "opencv-python")
    header = ["code", "size_hw", "frames/s", "CPU ms a frame", "times as fast as 640x640", "faces"]
    formats = "{code}|{size}|{frames_per_second:.1f}|{cpu_ms_per_frame:.1f}|{times_as_fast_as_640x640:.2f}|{faces}"
    print(text_table(header, [formats.format(**row).split("|") for row in rows]))
    return 0


if __name__ == "__main__":
    run(main)
