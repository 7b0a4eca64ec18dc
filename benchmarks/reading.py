"""What the checks of image files cost: frames per second of read and detect, with them and with OpenCV alone.

python -m benchmarks.reading --data FOLDER --model retinaface.onnx [--out benchmarks/results/reading.json]

Ordinary photographs of a folder, one after the other; each is read both ways, in turns, and the network runs on it both
times. With fewer than `--count` they come again.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from benchmarks.environment import benchmark_parser, parse, write_result
from facespec.cli import run, text_table
from facespec.images import find_images, read_image
from facespec.letterbox import Frame
from trt_runtime.load import load_detector


def read_alone(path: Path) -> Frame:
    """Read an image as applications do that trust it."""
    return np.asarray(cv2.imread(str(path)), np.uint8)


def main() -> int:
    """Run the benchmark, print a table and write the result."""
    parser = benchmark_parser("reading", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--model", type=Path, required=True, help="detector")
    parser.add_argument("--count", type=int, default=1000, help="number of photographs")
    args = parse(parser, count=20)
    cv2.setNumThreads(1)
    ways = {"checked": read_image, "OpenCV alone": read_alone}
    read_ms: dict[str, list[float]] = {name: [] for name in ways}
    detect_ms: dict[str, list[float]] = {name: [] for name in ways}
    found = find_images(args.data)
    with load_detector(args.model, threads=1) as detector:
        detector.detect(read_image(found[0]))
        for number, path in enumerate(itertools.islice(itertools.cycle(found), args.count)):
            path.read_bytes()  # from the disk for neither
            for name in sorted(ways, reverse=bool(number % 2)):
                start = time.perf_counter()
                frame = ways[name](path)
                read = time.perf_counter()
                detector.detect(frame)
                read_ms[name].append(1e3 * (read - start))
                detect_ms[name].append(1e3 * (time.perf_counter() - read))
    detecting = float(np.mean([*detect_ms.values()]))  # the same for both
    results = [
        {
            "reading": name,
            "read_ms": round(float(np.mean(times)), 4),
            "detect_ms": round(detecting, 4),
            "frames_per_second": round(1e3 / (float(np.mean(times)) + detecting), 3),
        }
        for name, times in read_ms.items()
    ]
    difference = np.subtract(read_ms["checked"], read_ms["OpenCV alone"])
    cost = 100 * float(np.median(difference)) / (float(np.mean(read_ms["OpenCV alone"])) + detecting)
    rows = [[str(value) for value in row.values()] for row in results]
    print(text_table(("reading", "read ms", "detect ms", "frames/s"), rows))
    print(f"the checks cost {cost:.2f} % of the time of a frame (median of the differences)")
    what = "ms a photograph on one core, mean; the cost of the checks is the median difference, over read and detect"
    data = {"photographs": args.count, "different": min(len(found), args.count), "cost_percent": round(cost, 3)}
    write_result(args, what, results, "opencv-python", "numpy", **data)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
