"""Face crops aligned by the five landmarks, as face-recognition networks expect them."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from facespec.errors import FrameError
from facespec.letterbox import check_frame

ARCFACE_LANDMARKS_112 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
"""(5, 2) x, y of the landmarks in an aligned 112x112 crop. Source: ArcFace (Deng et al., CVPR 2019) and insightface."""


def similarity_transforms(landmarks: NDArray[np.float32], target: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return (N, 2, 3) matrices of the similarity transforms that map points (N, 5, 2) closest to `target` (5, 2).

    Rotation, one scale and translation, least squares without reflection: Umeyama's solution, which in the plane is
    one division of complex numbers.

    Raises:
        FrameError: All points of a face coincide.
    """
    source = landmarks[..., 0].astype(np.float64) + 1j * landmarks[..., 1]
    goal = target[:, 0].astype(np.float64) + 1j * target[:, 1]
    source_mean, goal_mean = source.mean(axis=1), goal.mean()
    centred = source - source_mean[:, None]
    spread = (np.abs(centred) ** 2).sum(axis=1)
    if not (spread > 0).all():
        raise FrameError("cannot align a face whose landmarks all lie on one point")
    factor = (centred.conj() * (goal - goal_mean)).sum(axis=1) / spread
    shift = goal_mean - factor * source_mean
    rows = [[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]]
    return np.moveaxis(np.array(rows), -1, 0)


def aligned_crops(frame: NDArray[np.uint8], landmarks: NDArray[np.float32], size: int = 112) -> NDArray[np.uint8]:
    """Return (N, size, size, 3) uint8 crops of a frame, eyes level and in the place ArcFace models expect.

    Args:
        frame: uint8 (H, W, 3).
        landmarks: (N, 5, 2) in pixels of the frame, in the order of `Detections.landmarks`.
        size: Side of a crop; the standard positions scale with it.

    Raises:
        FrameError: Not such a frame, or all landmarks of a face coincide.
    """
    frame = check_frame(frame)
    crops = np.empty((len(landmarks), size, size, 3), np.uint8)
    target = ARCFACE_LANDMARKS_112 * np.float32(size / 112)
    for crop, matrix in zip(crops, similarity_transforms(landmarks, target), strict=True):
        crop[:] = cv2.warpAffine(frame, matrix, (size, size), flags=cv2.INTER_LINEAR)
    return crops
