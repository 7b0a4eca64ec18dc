"""From a frame to its faces: our detectors against other packages, in one run.

python -m benchmarks.latency --ours retinaface.onnx@onnxruntime retinaface.onnx@openvino int8.plugin.onnx@openvino
    [--frames DIR] [--repeats 200] [--out benchmarks/results/latency.json]

Run it in the environment of `benchmarks.peers`; peers that are not installed are left out and named. All get the same
frames, letterboxed to 640x640 beforehand, and as many threads as they take by themselves. They take turns, so that all
see the same states of the machine; a pause before each turn lets the worker threads of the one before go to sleep.

Every other network finds other faces. So beside the times stands how many each finds and how many of these agree with
a face of our first detector (IoU of at least 0.5): speed without the faces is worth little.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.environment import benchmark_parser, by_index, parse, write_result
from benchmarks.peers import SCORE, SIZE, Contender, frames_origin, load_frames, open_peers
from facespec.agreement import match_faces
from facespec.cli import quiet_libraries, run, text_table
from facespec.files import check_outputs
from facespec.letterbox import Frame
from trt_runtime.load import load_detector
from trt_runtime.measure import Latency, Ratio, Samples, speed_ratio, take_turns

COUNT = 32
"""Frames."""


def agreeing(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> int:
    """Return how many faces both found.

    Args:
        ours: (n, 4) x1, y1, x2, y2.
        theirs: (m, 4) likewise.
    """
    return len(match_faces(ours, theirs).iou)


def split_ours(text: str) -> tuple[str, str]:
    """Return file and backend of FILE or FILE@BACKEND."""
    file, at, backend = text.rpartition("@")
    return (file, backend) if at and not Path(text).exists() else (text, "auto")


def our_contender(text: str, stack: ExitStack) -> Contender:
    """Open one of our detectors, given as FILE or FILE@BACKEND."""
    file, backend = split_ours(text)
    detector = stack.enter_context(load_detector(file, size_hw=SIZE, score_threshold=SCORE, backend=backend))
    return Contender(f"{Path(file).name}, {detector.backend}", detector.detect, {"detector": detector.environment()})


def figures(times_ms: Samples, **ratios: Ratio) -> dict[str, Any]:
    """Return times and ratios, ready for JSON."""
    rounded = {name: {key: round(value, 3) for key, value in ratio._asdict().items()} for name, ratio in ratios.items()}
    return {"calls": times_ms.size, "ms": Latency.of(times_ms).to_dict(), **rounded}


def measure(contenders: list[Contender], frames: list[Frame], repeats: int) -> list[dict[str, Any]]:
    """Return times, faces and agreement of each; the first is what the others are compared with."""
    found = [[contender.detect(frame).boxes for frame in frames] for contender in contenders]
    calls = [by_index(contender.detect, frames) for contender in contenders]
    with tqdm(total=repeats * len(contenders), unit="call", leave=False, disable=None) as progress:
        samples = take_turns(calls, repeats, progress=progress.update)
    return [
        {
            "name": contender.name,
            **contender.origin,
            **figures(times, first_is_times_as_fast=speed_ratio(times, samples[0])),
            "faces": sum(map(len, boxes)),
            "agree": sum(map(agreeing, found[0], boxes)),
        }
        for contender, times, boxes in zip(contenders, samples, found, strict=True)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results for a terminal."""
    header = ["", "p50 ms", "p95 ms", "the first is times as fast", "faces"]
    lines = []
    for row in rows:
        ratio = "{times:.2f} [{low:.2f}, {high:.2f}]".format(**row["first_is_times_as_fast"])
        times = (f"{row['ms'][name]:.2f}" for name in ("p50", "p95"))
        lines.append([row["name"], *times, ratio, f"{row['faces']}", f"{row['agree']}"])
    return text_table([*header, f"agree with the {rows[0]['faces']} of the first"], lines)


def main() -> int:
    """Run the benchmark, print a table and write the result."""
    parser = benchmark_parser("latency", __doc__)
    parser.add_argument("--ours", nargs="+", required=True, metavar="FILE[@BACKEND]", help="the first is compared with")
    parser.add_argument("--frames", type=Path, help="folder of images (default: sample photographs)")
    parser.add_argument("--peers", nargs="*", metavar="PACKAGE", help="only these packages (default: all; none: ours)")
    parser.add_argument("--repeats", type=int, default=200, help="recorded calls of each")
    args = parse(parser, repeats=5)
    check_outputs([("--out", args.out)], [split_ours(text)[0] for text in args.ours])
    with quiet_libraries():
        frames = load_frames(args.frames, COUNT)
    peers, left_out = open_peers(args.peers)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    with ExitStack() as stack:
        contenders = [*(our_contender(text, stack) for text in args.ours), *peers]
        rows = measure(contenders, frames, args.repeats)
    print(table(rows))
    what = "uint8 640x640 frame in, faces out, score 0.5 where a detector has one; default threads of each"
    which = f"{len(frames)} {frames_origin(args.frames)}, letterboxed beforehand"
    packages = "numpy", "opencv-python", "onnxruntime", "openvino"
    write_result(args, what, rows, *packages, frames=which, left_out=left_out)
    return 0


if __name__ == "__main__":
    run(main)
