"""The result of a detector for one frame, and what a detector is."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from facespec.cli import counted
from facespec.errors import FrameError, MissingPackageError, NonFiniteError
from facespec.letterbox import Frame, Letterbox, check_frame
from facespec.spec import DecodeSpec

LANDMARK_NAMES = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
"""Order of the landmarks; left and right as seen in the image."""

ARCFACE_LANDMARKS_112 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
"""(5, 2) x, y of the landmarks in an aligned 112x112 crop. Source: ArcFace (Deng et al., CVPR 2019) and insightface."""


_falling = np.minimum.accumulate


@dataclass(frozen=True, eq=False)
class Detections:
    """Faces of one frame, sorted by score. Arrays are the caller's own: no later call changes them.

    Attributes:
        boxes: (n, 4) float32 x1, y1, x2, y2 in pixels of the frame; a box may reach past its edges.
        scores: (n,) float32 face probability.
        landmarks: (n, 5, 2) float32 x, y in pixels of the frame, in the order of `LANDMARK_NAMES`.
        frame_hw: Height and width of the frame in pixels.
        truncated: The model's limits cut the result off: faces over the score threshold may be missing.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    frame_hw: tuple[int, int]
    truncated: bool = False

    def __post_init__(self) -> None:
        count = len(self.scores)
        shapes = self.boxes.shape, self.scores.shape, self.landmarks.shape
        if shapes != ((count, 4), (count,), (count, 5, 2)):
            raise ValueError(f"Detections: boxes, scores and landmarks have shapes {shapes}")

    @classmethod
    def empty(cls, frame_hw: tuple[int, int]) -> Detections:
        """Return the result for a frame without faces."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 5, 2), np.float32), frame_hw)

    def __repr__(self) -> str:
        height, width = self.frame_hw
        return (
            f"Detections({counted(len(self), 'face')} in a frame of {width}x{height}{', truncated' * self.truncated})"
        )

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: Any) -> Detections:
        """Return the chosen faces: by slice, by boolean mask, by list of indices, or one by an integer."""
        if isinstance(index, (int, np.integer)):
            index = [index]
        boxes, scores, landmarks = self.boxes[index].copy(), self.scores[index].copy(), self.landmarks[index].copy()
        return Detections(boxes, scores, landmarks, self.frame_hw, self.truncated)

    def with_min_score(self, score: float) -> Detections:
        """Return the faces with at least this score."""
        return self[self.scores >= score]

    def clip(self) -> Detections:
        """Return the faces with their boxes cut at the edges of the frame; landmarks stay where they are."""
        height, width = self.frame_hw
        limits = np.array([width, height, width, height], np.float32)
        return replace(self, boxes=np.clip(self.boxes, 0, limits))

    def expand(self, margin: float) -> Detections:
        """Return the faces with boxes that are larger by `margin` of their width and height on each side.

        A negative margin shrinks them. They may reach past the frame: `expand(0.2).clip()` gives boxes to cut out.

        Raises:
            FrameError: The margin is -0.5 or less, which leaves nothing, or not finite.
        """
        if not -0.5 < margin < np.inf:
            raise FrameError(f"the margin of a box is a fraction of its size above -0.5, got {margin!r}")
        grow = np.float32(margin) * (self.boxes[:, 2:] - self.boxes[:, :2])
        return replace(self, boxes=np.concatenate([self.boxes[:, :2] - grow, self.boxes[:, 2:] + grow], axis=1))

    def moved(self, x: float, y: float, frame_hw: tuple[int, int]) -> Detections:
        """Return the faces in the pixels of a frame in which this frame's top left corner lies at x, y."""
        boxes = self.boxes + np.array([x, y, x, y], np.float32)
        landmarks = self.landmarks + np.array([x, y], np.float32)
        return Detections(boxes, self.scores.copy(), landmarks, frame_hw, self.truncated)

    def draw(self, frame: Frame, labels: bool = True, copy: bool = True) -> Frame:
        """Return a frame with these faces drawn on it; see `facespec.draw.draw_detections`."""
        draw: Any = importlib.import_module("facespec.draw")  # it imports this module, and OpenCV
        drawn: Frame = draw.draw_detections(frame, self, labels, copy)
        return drawn

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON: pixels to 1/100, scores to 1e-6."""
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.landmarks.tolist(), strict=True)
        return {
            "width": self.frame_hw[1],
            "height": self.frame_hw[0],
            "truncated": self.truncated,
            "faces": [
                {
                    "box": [round(value, 2) for value in box],
                    "score": round(score, 6),
                    "landmarks": [[round(x, 2), round(y, 2)] for x, y in points],
                }
                for box, score, points in rows
            ],
        }

    def to_supervision(self) -> Any:
        """Return a `supervision.Detections` (class 0 named "face").

        `.data["landmarks_in_box"]`, (n, 5, 2), holds the landmarks as fractions of the box, so that they stay right
        where supervision moves boxes, as its InferenceSlicer does; `from_supervision` gives them back in pixels.

        Raises:
            MissingPackageError: supervision is not installed.
        """
        corner, size = self.boxes[:, None, :2], self.boxes[:, None, 2:] - self.boxes[:, None, :2]
        fractions = (self.landmarks - corner) / np.where(size > 0, size, 1)
        return _supervision("to_supervision()").Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=np.zeros(len(self), int),
            data={"class_name": np.full(len(self), "face"), "landmarks_in_box": fractions},
        )

    def to_keypoints(self) -> Any:
        """Return the landmarks as `supervision.KeyPoints`, in pixels of the frame, one row a face.

        Raises:
            MissingPackageError: supervision is not installed.
        """
        return _supervision("to_keypoints()").KeyPoints(xy=self.landmarks.copy(), class_id=np.zeros(len(self), int))

    @classmethod
    def from_supervision(cls, found: Any, frame_hw: tuple[int, int]) -> Detections:
        """Return the faces of a `supervision.Detections` that `to_supervision` has made, wherever they were moved.

        They are in pixels of the frame, of height and width `frame_hw`, that supervision's boxes are in.
        """
        if not len(found):
            return cls.empty(frame_hw)
        order = np.argsort(-np.asarray(found.confidence), kind="stable")
        boxes = np.asarray(found.xyxy, np.float32)[order]
        corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
        fractions = np.asarray(found.data["landmarks_in_box"], np.float32)[order]
        landmarks = corner + fractions * np.where(size > 0, size, 1)
        return cls(boxes, np.asarray(found.confidence, np.float32)[order], landmarks, frame_hw)

    @property
    def alignable(self) -> NDArray[np.bool_]:
        """(n,): whether the landmarks of a face can be brought into place, which they cannot if they all coincide."""
        return np.ptp(self.landmarks, axis=1).max(axis=1, initial=0) > 0

    def aligned_crops(self, frame: Frame, size: int = 112) -> NDArray[np.uint8]:
        """Return (n, size, size, 3) uint8 crops with the eyes level and in the place ArcFace models expect.

        Crop i is that of face i; it is black where that face is not `alignable`.

        Args:
            frame: The frame these faces were found in.
            size: Side of a crop in pixels, 1 to 4096; the standard positions scale with it.

        Raises:
            FrameError: The frame has another size than the one the faces were found in, or `size` is impossible.
        """
        from facespec.opencv import cv2  # a GPU needs it for nothing else

        if check_frame(frame).shape[:2] != self.frame_hw:
            raise FrameError(f"the faces were found in a frame of {self.frame_hw}, this one is {frame.shape[:2]}")
        if not isinstance(size, (int, np.integer)) or not 1 <= size <= 4096:
            raise FrameError(f"the side of a crop is a number of pixels from 1 to 4096, got {size!r}")
        crops = np.zeros((len(self), size, size, 3), np.uint8)
        target = ARCFACE_LANDMARKS_112 * np.float32(size / 112)
        good = np.flatnonzero(self.alignable)
        for index, matrix in zip(good, similarity_transforms(self.landmarks[good], target), strict=True):
            crops[index] = cv2.warpAffine(frame, matrix, (size, size), flags=cv2.INTER_LINEAR)
        return crops


def _supervision(why: str) -> Any:
    try:
        import supervision
    except ImportError as error:
        raise MissingPackageError(f"{why} needs the package supervision: pip install supervision") from error
    return supervision


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


def to_detections(
    box: Letterbox,
    decode: DecodeSpec,
    score_threshold: float,
    num_detections: int,
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    landmarks: NDArray[np.float32],
    num_candidates: int,
) -> Detections:
    """Turn one image's outputs of a detector graph into faces in pixels of its frame; copies, never views.

    Boxes (K, 4) and landmarks (K, 5, 2) are in pixels of the network input, scores (K,) fall; the first
    `num_detections` rows are valid. `num_candidates` counts the priors over the floor before top-k; it is -1 where the
    network gave a value that is not finite.

    Raises:
        NonFiniteError: The network gave NaN or infinity.
    """
    # sorted by logits; the sigmoid of neighbours may differ from that order by a rounding
    scores = _falling(scores[:num_detections])
    count = num_detections
    if count and not scores[-1] >= score_threshold:
        # greedy NMS: what passes a higher threshold is a prefix of what passed the model's own
        count = int(np.count_nonzero(scores >= score_threshold))
        scores = scores[:count].copy()
    corners, points = 4 * count, 10 * count
    scales = box.scales
    if points > len(scales):
        scales = np.resize(scales, points)
    boxes, landmarks = boxes.ravel()[:corners] * scales[:corners], landmarks.ravel()[:points] * scales[:points]
    # bytes are searched in a fifth of the time that `all` takes
    if num_candidates < 0 or 0 in np.isfinite(boxes).tobytes() or 0 in np.isfinite(landmarks).tobytes():
        raise NonFiniteError("the network gave values that are not finite: its weights or its file are damaged")
    cut = num_candidates > decode.top_k or num_detections >= decode.max_detections
    found = object.__new__(Detections)  # its own __init__ checks the shapes, which takes as long as all of this
    vars(found).update(
        boxes=boxes.reshape(count, 4),
        scores=scores,
        landmarks=landmarks.reshape(count, 5, 2),
        frame_hw=box.frame_hw,
        truncated=cut and count == num_detections,  # a cut below the threshold loses nothing
    )
    return found


class Detector(Protocol):
    """What every backend offers."""

    def detect(self, frame: Frame) -> Detections:
        """Return the faces of one frame, uint8 (H, W, 3) BGR, in its own pixels."""
        ...

    def detect_batch(self, frames: Iterable[Frame]) -> list[Detections]:
        """Return the faces of several frames, which may differ in size, in their order."""
        ...
