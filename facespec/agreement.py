"""How far two sides agree on faces."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from facespec.boxes import box_areas, iou_matrix
from facespec.detections import Detections
from facespec.spec import DEFAULT_SCORE_THRESHOLD

MATCH_IOU = 0.5
"""Least overlap of two boxes that are one face."""

INT8_RECALL, INT8_LANDMARK_ERROR = 98.5, 1.0
"""What INT8 may cost against FP32: least share of faces found again, and largest mean distance of landmarks in percent
of the face size."""


@dataclass(frozen=True)
class Matches:
    """Faces of two sides that are one: (n,) indices into each, and their overlap."""

    reference: NDArray[np.int64]
    candidate: NDArray[np.int64]
    iou: NDArray[np.float32]


def match_faces(reference_xyxy: NDArray[np.float32], candidate_xyxy: NDArray[np.float32]) -> Matches:
    """Pair boxes (N, 4) and (M, 4) with an IoU of at least `MATCH_IOU`, each once, the greatest overlap first."""
    iou = iou_matrix(reference_xyxy, candidate_xyxy)
    left, right = np.nonzero(iou >= MATCH_IOU)
    pairs: list[tuple[int, int]] = []
    free_left, free_right = np.ones(iou.shape[0], bool), np.ones(iou.shape[1], bool)
    for index in np.argsort(-iou[left, right], kind="stable"):
        i, j = int(left[index]), int(right[index])
        if free_left[i] and free_right[j]:
            free_left[i] = free_right[j] = False
            pairs.append((i, j))
    found = np.array(sorted(pairs), np.int64).reshape(-1, 2)
    return Matches(found[:, 0], found[:, 1], iou[found[:, 0], found[:, 1]])


def landmark_errors(
    boxes_xyxy: NDArray[np.float32], reference: NDArray[np.float32], candidate: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return (n,) mean distances of the five landmarks in percent of the face size, sqrt(w * h) of its box.

    Args:
        boxes_xyxy: (n, 4) boxes of the reference.
        reference: (n, 5, 2) its landmarks.
        candidate: (n, 5, 2) those of the same faces on the other side.
    """
    size = np.sqrt(box_areas(boxes_xyxy))
    distance = np.linalg.norm(reference - candidate, axis=2).mean(axis=1)
    return np.asarray(100 * distance / np.maximum(size, 1e-6), np.float32)


@dataclass(frozen=True)
class Disagreement:
    """A face the two sides do not agree on; the greater `badness`, the worse."""

    image: int
    badness: float
    text: str
    box_xyxy: tuple[float, ...]


@dataclass
class Agreement:
    """How far two sides agree on faces, added up over images.

    A face counts for recall where the reference's score is at least `score`, and for precision where the candidate's
    is; the other side must have it at that score, too.
    """

    score: float = DEFAULT_SCORE_THRESHOLD
    images: int = 0
    faces: int = 0
    candidate_faces: int = 0
    iou: list[float] = field(default_factory=list)
    landmarks: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)
    unmatched: list[float] = field(default_factory=list)  # scores of faces that one side has alone

    def add(self, reference: Detections, candidate: Detections, image: int = 0) -> None:
        """Add the faces of one image; what is below `score` is left out."""
        left, right = (side.with_min_score(self.score) for side in (reference, candidate))
        matches = match_faces(left.boxes, right.boxes)
        same = matches.reference
        errors = landmark_errors(left.boxes[same], left.landmarks[same], right.landmarks[matches.candidate])
        self.images += 1
        self.faces += len(left)
        self.candidate_faces += len(right)
        self.iou += matches.iou.tolist()
        self.landmarks += errors.tolist()
        self.scores += np.abs(left.scores[matches.reference] - right.scores[matches.candidate]).tolist()
        for side, other, taken, base, word in (
            (left, candidate, matches.reference, 2.0, "missed"),
            (right, reference, matches.candidate, 1.0, "extra"),
        ):
            alone = np.setdiff1d(np.arange(len(side)), taken)
            near = iou_matrix(side.boxes[alone], other.boxes) >= MATCH_IOU
            weaker = np.where(near, other.scores[None], 0).max(axis=1, initial=0)  # its score on the other side
            for i, rest in zip(alone, weaker.tolist(), strict=True):
                score = float(side.scores[i])
                self.unmatched.append(score)
                text = f"{word}: score {score:.2f}, {f'{rest:.2f}' if rest else 'not there'} on the other side"
                box = tuple(side.boxes[i].tolist())
                self.disagreements.append(Disagreement(image, 1000 * base + score - rest, text, box))
        for i, overlap, error in zip(matches.reference, matches.iou, errors, strict=True):
            text = f"landmarks {error:.1f} %, IoU {overlap:.2f}"
            badness = float(error) + 100 * (1 - float(overlap))
            self.disagreements.append(Disagreement(image, badness, text, tuple(left.boxes[i].tolist())))

    @property
    def recall(self) -> float | None:
        """Percent of the reference's faces that the candidate has."""
        return 100 * len(self.iou) / self.faces if self.faces else None

    @property
    def precision(self) -> float | None:
        """Percent of the candidate's faces that the reference has."""
        return 100 * len(self.iou) / self.candidate_faces if self.candidate_faces else None
