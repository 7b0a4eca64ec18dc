"""The main job on real photographs, on any machine: weights -> ONNX and engine -> faces in pictures and video.

python -m export.demo --out build/demo    (or: make demo)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.inspect import inspect
from export.to_onnx import ExportOptions, export_onnx
from export.to_trt import EngineOptions, Profile, build_engine, engine_line
from facespec.cli import ArgumentParser, run
from facespec.detections import Detections
from facespec.draw import draw_detections
from facespec.errors import DataError, MissingPackageError, MissingToolError, RetinaFaceError
from facespec.files import work_folder, write_text
from facespec.images import read_image, write_image
from facespec.letterbox import Frame
from facespec.opencv import cv2
from facespec.samples import sample_photographs
from facespec.spec import DEFAULT_WEIGHTS
from trt_runtime import TRTRetinaFace, load_detector
from trt_runtime.detect import DetectOptions, detect
from trt_runtime.gpu.flavor import RTX
from trt_runtime.measure import StageTimer
from trt_runtime.media.files import VideoWriter

NETWORK_HW = (640, 640)
VIDEO_HW = (480, 640)
VIDEO_RATE = 25
SECONDS_PER_PHOTOGRAPH = 3
PICTURE_HEIGHT = 560


def render_video(photographs: Sequence[Frame], path: Path) -> None:
    """Write a video that pans over and zooms into photographs, one after the other."""
    height, width = VIDEO_HW
    with VideoWriter(path, VIDEO_RATE) as writer:
        for photograph in photographs:
            rows, columns = photograph.shape[:2]
            cover = max(height / rows, width / columns)  # the photograph fills the frame
            for t in np.linspace(0, 1, VIDEO_RATE * SECONDS_PER_PHOTOGRAPH):
                ease = (1 - np.cos(np.pi * t)) / 2
                scale = cover * (1 + 0.6 * ease)
                # from the upper middle to the left third: faces are there in portraits
                centre = np.array([columns * (0.5 - 0.08 * ease), rows * (0.4 - 0.05 * ease)])
                half = np.array([width, height]) / (2 * scale)
                centre = np.clip(centre, half, np.array([columns, rows]) - half)
                shift = np.array([width, height]) / 2 - scale * centre
                matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
                frame = cv2.warpAffine(photograph, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
                writer.write(np.asarray(frame, np.uint8))


def contact_sheet(photographs: Sequence[Frame], found: Sequence[Detections]) -> Frame:
    """Return one picture: the annotated photographs side by side, and below each its aligned face crops."""
    columns = []
    for photograph, faces in zip(photographs, found, strict=True):
        annotated = draw_detections(photograph, faces)
        width = round(photograph.shape[1] * PICTURE_HEIGHT / photograph.shape[0])
        picture = cv2.resize(annotated, (width, PICTURE_HEIGHT), interpolation=cv2.INTER_AREA)
        strip = np.full((112, width, 3), 255, np.uint8)
        for index, crop in enumerate(faces.aligned_crops(photograph)[: width // 120]):
            strip[:, 120 * index : 120 * index + 112] = crop
        columns.append(np.vstack([picture, np.full((8, width, 3), 255, np.uint8), strip]))
    gap = np.full((PICTURE_HEIGHT + 120, 8, 3), 255, np.uint8)
    return np.hstack([part for column in columns for part in (gap, column)][1:])


def demo_engine(out: Path, photographs: Sequence[Frame]) -> str:
    """Build an engine ahead of time, run what it was built from on the CPU, and return what to do with it.

    Raises:
        RetinaFaceError: The build fails, or its plugin form does not find the faces. A missing TensorRT-RTX or compiler
            is printed instead, and nothing is built.
    """
    path = out / "retinaface.engine"
    profile = Profile(batch=(1, 1, 4), sizes_hw=((320, 320), NETWORK_HW, (1088, 1920)))
    options = EngineOptions(DEFAULT_WEIGHTS, path, profile, precision="fp16", flavor=RTX.name)
    try:
        sidecar = build_engine(options)
    except (MissingPackageError, MissingToolError) as error:
        print(f"   not built: {error}")
        return ""
    with TRTRetinaFace(options.plugin_form, size_hw=NETWORK_HW, device="cpu") as detector:
        faces = [len(detector.detect(photograph)) for photograph in photographs]
    found = inspect(path)
    if sidecar is None or not found.valid:
        raise RetinaFaceError(f"{path}: {found.problems}")
    print(engine_line(path, sidecar))
    print(f"   {options.plugin_form.name}, through TRTRetinaFace with the CPU as its device: {sum(faces)} faces")
    if 0 in faces:
        raise RetinaFaceError(f"{options.plugin_form} does not find the face in a photograph")
    return f"""
An engine for GPUs of your own, and what is inside:
  {options.command()}
  python -m export.inspect {path}
and on a machine with such a GPU:
  from trt_runtime import TRTRetinaFace
  faces = TRTRetinaFace("{path}").detect(frame)"""


def demo(out: Path) -> None:
    """Export the default weights, find faces in sample photographs and in a video, and write what was found to `out`.

    Raises:
        RetinaFaceError: A step fails, or the faces in the photographs are not found.
    """
    samples = sample_photographs()
    if not samples:
        raise DataError("no sample photographs: pip install -e '.[demo]'")
    out.mkdir(parents=True, exist_ok=True)
    model = out / "retinaface.onnx"

    start = time.perf_counter()
    export_onnx(ExportOptions(DEFAULT_WEIGHTS, model, NETWORK_HW))
    print(f"1. exported {DEFAULT_WEIGHTS} to {model} in {time.perf_counter() - start:.1f} s\n")

    detector = load_detector(model)
    photographs = [read_image(path) for path in samples]
    detector.detect(photographs[0])  # the first call allocates
    timer = StageTimer()
    found = [detector.detect(photograph, timer) for photograph in photographs]
    lines = [json.dumps({"source": path.name, **faces.to_dict()}) for path, faces in zip(samples, found, strict=True)]
    write_image(out / "faces.png", contact_sheet(photographs, found))
    print("2. photographs")
    for (path, expected), faces in zip(samples.items(), found, strict=True):
        scores = ", ".join(f"{score:.3f}" for score in faces.scores)
        print(f"   {path.name}: {len(faces)} face(s), score {scores or '-'}")
        if len(faces) != expected:
            raise RetinaFaceError(f"{path.name} shows {expected} face(s), found {len(faces)}: see {out / 'faces.png'}")
    stages = ", ".join(f"{name} {total / len(found):.1f}" for name, total in timer.total_ms.items())
    print(f"   ms per photograph: {stages}\n")

    render_video(photographs, out / "sample.mp4")
    with work_folder() as folder:
        video_lines = folder / "video.json"
        summary = detect(DetectOptions(str(out / "sample.mp4"), model, out=out / "faces.mp4", json=str(video_lines)))
        lines += video_lines.read_text(encoding="utf-8").splitlines()
    write_text(out / "faces.json", "\n".join(lines) + "\n")
    print("3. video\n   " + str(summary).replace("\n", "\n   ") + "\n")

    print("4. TensorRT engine")
    engine = demo_engine(out, photographs)
    print(
        f"""
Look at {out / "faces.png"} and {out / "faces.mp4"}; {out / "faces.json"} holds boxes and landmarks.

Next, with your own pictures (activate the environment first: source .venv/bin/activate):
  python -m trt_runtime.detect photo.jpg --model {model} --out faces.jpg
  python -m trt_runtime.detect video.mp4 --model {model} --out faces.mp4 --json faces.json
  python -m trt_runtime.detect 0 --model {model} --show
or in Python:
  from trt_runtime import load_detector
  faces = load_detector("{model}").detect(frame)   # uint8 BGR, as cv2.imread gives
{engine}"""
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = ArgumentParser(prog="python -m export.demo", description="Find faces in sample photographs and a video.")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder to write to")
    demo(parser.parse_args(argv).out)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
