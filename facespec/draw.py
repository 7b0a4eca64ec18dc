"""Draw detections on a frame."""

from __future__ import annotations

import cv2
import numpy as np

from facespec.detections import Detections
from facespec.letterbox import Frame

BOX_COLOUR = (80, 220, 60)
LANDMARK_COLOURS = ((60, 60, 255), (0, 200, 255), (255, 80, 255), (255, 160, 40), (60, 255, 180))


def draw_detections(frame: Frame, detections: Detections, labels: bool = True) -> Frame:
    """Return a copy of a frame with boxes, landmarks and, if wanted, scores; line widths follow the frame's size."""
    canvas = np.ascontiguousarray(frame).copy()
    line = max(1, round(min(frame.shape[:2]) / 320))
    for box, score, points in zip(detections.boxes, detections.scores, detections.landmarks, strict=True):
        # far outside the frame cv2's integers overflow, and nothing would be seen anyway
        x1, y1, x2, y2 = (int(value) for value in np.clip(np.rint(box), -30000, 30000))
        cv2.rectangle(canvas, (x1, y1), (x2, y2), BOX_COLOUR, line, cv2.LINE_AA)
        radius = max(1, round(max(x2 - x1, 1) / 40))
        for (x, y), colour in zip(np.clip(points, -30000, 30000), LANDMARK_COLOURS, strict=True):
            cv2.circle(canvas, (round(float(x)), round(float(y))), radius, colour, -1, cv2.LINE_AA)
        if labels and y2 - y1 >= 24:
            scale = min(max((y2 - y1) / 220, 0.35), 1.0 * line)
            (width, height), _ = cv2.getTextSize(f"{score:.2f}", cv2.FONT_HERSHEY_SIMPLEX, scale, line)
            top = y1 if y1 >= height + 6 else y1 + height + 6
            cv2.rectangle(canvas, (x1, top - height - 6), (x1 + width + 4, top), BOX_COLOUR, -1)
            cv2.putText(canvas, f"{score:.2f}", (x1 + 2, top - 4), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), line)
    return canvas
