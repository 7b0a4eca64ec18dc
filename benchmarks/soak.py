"""Detectors on the CPU under load and over time: the same bits from every thread, and no memory that grows.

python -m benchmarks.soak [--frames 10000] [--threads 8] [--reopens 1000] [--detectors NAME ...]

Each part runs in a process of its own, on frames of 30 to 1300 pixels a side, cut from sample photographs, with faces
and without:

frames   Threads share one detector. Every result is compared bit for bit with the one a single thread got of the same
         frame before. Growth is that of the resident memory since the first `--settle` frames.
reopens  A detector is opened, detects one frame and is closed, again and again; growth since the first 50.

Memory is read at `READINGS` points: a leak climbs all the way, an allocator takes a step and stays there, as the one of
TBB in OpenVINO does, by some MB, when threads meet as they have not met before.

Exit code 1 if a result differs, or memory grows by `LIMIT_MB`.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.environment import benchmark_parser, parse, write_result
from export.to_trt import EngineOptions, Profile, build_engine
from facespec.cli import run
from facespec.detections import Detections
from facespec.errors import DataError
from facespec.letterbox import Frame
from facespec.samples import sample_frames
from trt_runtime import OpenVinoRetinaFace, OrtRetinaFace, RetinaFaceDetector, TRTRetinaFace

SIZE = (160, 160)
SIDES = (30, 1300)
DISTINCT = 60
LIMIT_MB = 20
READINGS = 10
SETTLE_REOPENS = 50

Opener = Callable[[], RetinaFaceDetector]


DETECTORS: dict[str, Callable[[Path], RetinaFaceDetector]] = {
    "TRTRetinaFace": partial(TRTRetinaFace, size_hw=SIZE, device="cpu"),
    "OpenVinoRetinaFace": partial(OpenVinoRetinaFace, size_hw=SIZE, threads=2),
    "OrtRetinaFace": partial(OrtRetinaFace, size_hw=SIZE, threads=2),
}
"""What opens a plugin form at `SIZE`, on at most 2 threads of its own, by the name of the class."""


def make_frames() -> list[Frame]:
    """Return `DISTINCT` frames of sides within `SIDES`: whole photographs, squeezed a little, and corners of them.

    Raises:
        DataError: There are no sample photographs.
    """
    photographs = list(sample_frames().values())
    if not photographs:
        raise DataError("there are no sample photographs: pip install -e '.[export]'")
    random = np.random.default_rng(0)
    frames = []
    for index in range(DISTINCT):
        image = photographs[index % len(photographs)]
        if index % 3 == 2:
            image = image[: random.integers(20, 90), : random.integers(20, 90)]  # there is no face in either
        side = np.exp(random.uniform(*np.log(SIDES)))
        height, width = np.clip([side, side * random.uniform(0.75, 1.33)], *SIDES).astype(int)
        frames.append(np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8))
    return frames


def resident_mb() -> float:
    """Return how much of this process lies in memory, in MB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def identical(found: Detections, expected: Detections) -> bool:
    """Whether two results are the same to the bit."""
    pairs = zip(vars(found).values(), vars(expected).values(), strict=True)
    return all(np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in pairs)


def soak_frames(opener: Opener, frames: list[Frame], calls: int, settle: int, threads: int) -> dict[str, Any]:
    """Detect frames from many threads that share a detector, each in an order of its own."""
    start = time.perf_counter()
    with opener() as detector, ThreadPoolExecutor(threads) as pool:
        expected = [detector.detect(frame) for frame in frames]

        def detect_some(order: Iterable[int]) -> int:
            return sum(identical(detector.detect(frames[i]), expected[i]) for i in order)

        # every lane makes room for the largest frame now, not when it happens to meet it
        largest = max(range(len(frames)), key=lambda i: frames[i].size)
        list(pool.map(detect_some, [[largest] * 10] * threads))
        random = np.random.default_rng(0)

        def detect_all(count: int) -> int:
            return sum(pool.map(detect_some, np.array_split(random.integers(0, len(frames), count), threads)))

        return _soak(detect_all, calls, settle, start)


def soak_reopens(opener: Opener, frames: list[Frame], calls: int, settle: int) -> dict[str, Any]:
    """Open a detector, detect the first frame and close it, many times."""
    start = time.perf_counter()
    with opener() as detector:
        expected = detector.detect(frames[0])

    def reopen(times: int) -> int:
        right = 0
        for _ in range(times):
            with opener() as detector:
                right += identical(detector.detect(frames[0]), expected)
        return right

    return _soak(reopen, calls, settle, start)


def _soak(work: Callable[[int], int], calls: int, settle: int, start: float) -> dict[str, Any]:
    """Settle, then do calls in parts, and read memory after each; return a row of the result file.

    `work` makes a number of calls, and returns how many of them gave the expected bits.
    """
    right = work(settle)
    resident = [resident_mb()]
    for part in range(READINGS):
        right += work(calls * (part + 1) // READINGS - calls * part // READINGS)
        resident.append(resident_mb())
    growth = round(resident[-1] - resident[0], 2)
    return {
        "calls": settle + calls,
        "identical": right,
        "resident_mb": [round(value, 2) for value in resident],
        "seconds": round(time.perf_counter() - start, 1),
        "growth_mb": growth,
        "passed": right == settle + calls and growth < LIMIT_MB,
    }


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"frames": soak_frames, "reopens": soak_reopens}


def soak(name: str, part: str, plugin_form: Path, *numbers: int) -> dict[str, Any]:
    """Run one of `PARTS` for one of `DETECTORS` in this process, with the numbers that the part takes."""
    return PARTS[part](partial(DETECTORS[name], plugin_form), make_frames(), *numbers)


def soak_apart(*arguments: Any) -> dict[str, Any]:
    """Run `soak` in a process of its own, whose memory nothing else disturbs."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(soak, *arguments).result()


def main() -> int:
    """Run every part for every detector, print a line for each and write the result; exit code 1 if one fails."""
    parser = benchmark_parser("soak", __doc__)
    parser.add_argument("--frames", type=int, default=10_000, help="frames detected after the first ones")
    parser.add_argument("--threads", type=int, default=8, help="threads that share a detector")
    parser.add_argument("--reopens", type=int, default=1000, help="times it is opened after the first 50")
    parser.add_argument("--settle", type=int, default=1000, help="frames until memory is first read")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS), help="which detectors")
    args = parse(parser, frames=50, reopens=5, settle=20)
    options = {name: getattr(args, name) for name in ("frames", "threads", "reopens", "settle")}
    for name, number in options.items():
        if number < 1:
            parser.error(f"--{name} {number}: give at least 1")
    numbers = {"frames": (args.frames, args.settle, args.threads), "reopens": (args.reopens, SETTLE_REOPENS)}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        form = Path(folder) / "retinaface.plugin.onnx"
        build_engine(EngineOptions("mobilenet0.25", form, Profile(sizes_hw=(SIZE, SIZE, (640, 640))), onnx_only=True))
        for name in args.detectors:
            for part in PARTS:
                row = {"detector": name, "part": part, **soak_apart(name, part, form, *numbers[part])}
                results.append(row)
                memory = f"grew by {row['growth_mb']:.1f} to {row['resident_mb'][-1]:.0f} MB"
                text = f"{row['identical']} of {row['calls']} identical, {memory}, {row['seconds']:.0f} s"
                print(f"{name:19} {part:8} {text}{'' if row['passed'] else '  FAILED'}", flush=True)
    what = (
        f"{DISTINCT} frames of {SIDES[0]} to {SIDES[1]} pixels a side, network {SIZE[0]}x{SIZE[1]}, plugin form of the "
        f"published mobilenet0.25; frames: {args.threads} threads share one detector; reopens: open, detect, close; "
        f"growth of the resident memory after the first {args.settle} frames or {SETTLE_REOPENS} times, "
        f"which must stay below {LIMIT_MB} MB"
    )
    packages = "onnxruntime", "openvino", "numpy", "opencv-python"
    write_result(args, what, results, *packages, options=options | {"settle_reopens": SETTLE_REOPENS})
    return 0 if all(row["passed"] for row in results) else 1


if __name__ == "__main__":
    run(main)
