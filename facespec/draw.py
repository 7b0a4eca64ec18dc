"""Draw detections on a frame."""

from __future__ import annotations

import numpy as np

from facespec.detections import Detections
from facespec.letterbox import Frame
from facespec.opencv import cv2

BOX_COLOUR = (80, 220, 60)
LANDMARK_COLOURS = ((60, 60, 255), (0, 200, 255), (255, 80, 255), (255, 160, 40), (60, 255, 180))
MIN_LABELLED_PX = 40
"""Faces less high than this get no label: it would hide more than it says."""

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FAR = 30_000  # far outside the frame cv2's integers overflow, and nothing would be seen anyway


def draw_detections(frame: Frame, detections: Detections, labels: bool = True, copy: bool = True) -> Frame:
    """Return a copy of a frame, or the frame itself, with boxes, landmarks and scores.

    Lines and points follow the size of the face, and lines that of the picture. Better faces are drawn over weaker
    ones; a label that would cover another face or label is left out.

    Args:
        frame: uint8 (H, W, 3).
        detections: In pixels of the frame.
        labels: Whether to write scores.
        copy: False draws on the frame itself where that can be written to.
    """
    canvas = np.ascontiguousarray(frame).copy() if copy else np.require(frame, requirements=["C", "W"])
    boxes = np.clip(np.rint(detections.boxes), -_FAR, _FAR).astype(int)
    points = np.clip(np.rint(detections.landmarks), -_FAR, _FAR).astype(int)
    for box, face in zip(boxes[::-1].tolist(), points[::-1].tolist(), strict=True):
        height = box[3] - box[1]
        cv2.rectangle(canvas, box[:2], box[2:], BOX_COLOUR, _line(height, canvas), cv2.LINE_AA)
        for point, colour in zip(face, LANDMARK_COLOURS, strict=True):
            if height < MIN_LABELLED_PX:  # one pixel a point: a disc would hide the face
                if 0 <= point[0] < canvas.shape[1] and 0 <= point[1] < canvas.shape[0]:
                    canvas[point[1], point[0]] = colour
            else:
                cv2.circle(canvas, point, max(1, height // 50), colour, -1, cv2.LINE_AA)
    if labels:
        _draw_labels(canvas, boxes, detections.scores)
    return canvas


def _line(height: int, canvas: Frame) -> int:
    """Return the width of a line around a face of a height: it is seen when the whole picture is looked at."""
    least = round(min(canvas.shape[:2]) / 540)
    return max(1, least, min(height // 80, 4))


def _draw_labels(canvas: Frame, boxes: np.ndarray, scores: np.ndarray) -> None:
    """Write scores above the boxes, the best first, where they cover no face and no other label."""
    taken = [*boxes]
    for index, (box, score) in enumerate(zip(boxes, scores, strict=True)):
        height = int(box[3] - box[1])
        if height < MIN_LABELLED_PX:
            continue
        text, line = f"{score:.2f}", max(1, _line(height, canvas) // 2)
        scale = min(max(height / 260, 0.35), 2.0)
        (width, rise), _ = cv2.getTextSize(text, _FONT, scale, line)
        plate_width, plate_height = width + 4, rise + 6
        left = min(max(int(box[0]), 0), max(canvas.shape[1] - plate_width, 0))
        top = int(box[1]) - plate_height
        own = top < 0  # no room above: inside the box
        top = max(top, 0)
        plate = np.array([left, top, left + plate_width, top + plate_height])
        others = np.array([other for position, other in enumerate(taken) if not (own and position == index)])
        others = others.reshape(-1, 4)
        overlap = (np.minimum(plate[2:], others[:, 2:]) > np.maximum(plate[:2], others[:, :2])).all(axis=1)
        if overlap.any():
            continue
        taken.append(plate)
        cv2.rectangle(canvas, plate[:2].tolist(), plate[2:].tolist(), BOX_COLOUR, -1)
        cv2.putText(canvas, text, (left + 2, top + plate_height - 4), _FONT, scale, (0, 0, 0), line, cv2.LINE_AA)
