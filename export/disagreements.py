"""The worst disagreements of two models, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from facespec.agreement import Disagreement
from facespec.detections import Detections
from facespec.letterbox import Frame
from facespec.spec import DEFAULT_SCORE_THRESHOLD

_GREEN, _RED, _INK = (80, 220, 60), (60, 60, 255), (235, 235, 235)
_TILE_PX, _LABEL_PX, _GAP_PX, _COLUMNS, _TILES = 224, 40, 8, 3, 12


@dataclass(frozen=True)
class Sample:
    """An image that is read when it is needed."""

    name: str
    load: Callable[[], Frame]


def draw_disagreements(
    disagreements: list[Disagreement], samples: Sequence[Sample], faces: Sequence[Sequence[Detections]]
) -> Frame:
    """Return a picture of the worst: the reference in green on the left, the candidate in red on the right.

    Args:
        disagreements: Of all images; no more than two of each are shown.
        samples: The images.
        faces: What the reference and the candidate found on each.
    """
    worst: list[Disagreement] = []
    taken: Counter[int] = Counter()
    for item in sorted(disagreements, key=lambda item: -item.badness):
        if taken[item.image] < 2 and len(worst) < _TILES:
            taken[item.image] += 1
            worst.append(item)
    height, width = _TILE_PX + _LABEL_PX + _GAP_PX, 2 * _TILE_PX + 2 * _GAP_PX
    rows = max(1, -(-len(worst) // _COLUMNS))
    canvas = np.full((rows * height + _GAP_PX, _COLUMNS * width + _GAP_PX, 3), 32, np.uint8)
    for index, item in enumerate(worst):
        top, left = _GAP_PX + index // _COLUMNS * height, _GAP_PX + index % _COLUMNS * width
        sample = samples[item.image]
        for line, text in enumerate((sample.name[-52:], item.text)):
            _write(canvas, text, left, top + 14 + 17 * line)
        frame = sample.load()
        for side, colour in enumerate((_GREEN, _RED)):
            found = faces[side][item.image].with_min_score(DEFAULT_SCORE_THRESHOLD)
            tile = _tile(frame, found, item.box_xyxy, colour)
            start = left + side * _TILE_PX
            canvas[top + _LABEL_PX : top + _LABEL_PX + _TILE_PX, start : start + _TILE_PX] = tile
    return canvas


def _write(canvas: Frame, text: str, x: int, y: int) -> None:
    plain = text.encode("ascii", "replace").decode()
    cv2.putText(canvas, plain, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.42, _INK, 1, cv2.LINE_AA)


def _tile(frame: Frame, faces: Detections, box_xyxy: tuple[float, ...], colour: tuple[int, int, int]) -> Frame:
    """Return the surroundings of a box, with the faces that lie there."""
    x1, y1, x2, y2 = box_xyxy
    side = max(2.5 * max(x2 - x1, y2 - y1), 32.0)
    scale = _TILE_PX / side
    low = np.array([(x1 + x2 - side) / 2, (y1 + y2 - side) / 2])
    # pixel centres lie at +0.5 in our coordinates, at whole numbers in cv2's
    shift = -low * scale + (scale - 1) / 2
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    tile = cv2.warpAffine(frame, matrix, (_TILE_PX, _TILE_PX), flags=cv2.INTER_LINEAR, borderValue=(64, 64, 64))
    limit = 4 * _TILE_PX
    for box, points in zip(faces.boxes, faces.landmarks, strict=True):
        corners = np.clip(np.rint((box.reshape(2, 2) - low) * scale), -limit, limit).astype(int).tolist()
        cv2.rectangle(tile, corners[0], corners[1], colour, 1, cv2.LINE_AA)
        for point in np.clip(np.rint((points - low) * scale), -limit, limit).astype(int).tolist():
            cv2.circle(tile, point, 2, colour, -1, cv2.LINE_AA)
    return np.asarray(tile, np.uint8)
