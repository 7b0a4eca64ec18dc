"""How far two sides agree on faces, what they may differ by, and a picture of where they differ most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from facespec.boxes import box_areas, iou_matrix
from facespec.detections import Detections
from facespec.errors import SpecError
from facespec.letterbox import Frame
from facespec.opencv import cv2
from facespec.spec import DEFAULT_SCORE_THRESHOLD

MATCH_IOU = 0.5
"""Least overlap of two boxes that are one face."""

_GREEN, _RED, _INK = (80, 220, 60), (60, 60, 255), (235, 235, 235)
_TILE_PX, _LABEL_PX, _GAP_PX, _COLUMNS, _TILES = 224, 40, 8, 3, 12


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
    """Return (n,) mean distances of landmarks (n, 5, 2), in percent of the face size: sqrt(w * h) of its box (n, 4)."""
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

    @classmethod
    def of(
        cls, reference: Sequence[Detections], candidate: Sequence[Detections], images: Iterable[int] | None = None
    ) -> Agreement:
        """Return how far two sides agree on images, given by their indices; None takes all."""
        agreement = cls()
        for index in range(len(reference)) if images is None else images:
            agreement.add(reference[index], candidate[index], index)
        return agreement

    @property
    def recall(self) -> float | None:
        """Percent of the reference's faces that the candidate has."""
        return 100 * len(self.iou) / self.faces if self.faces else None

    @property
    def precision(self) -> float | None:
        """Percent of the candidate's faces that the reference has."""
        return 100 * len(self.iou) / self.candidate_faces if self.candidate_faces else None

    @property
    def mean_iou(self) -> float | None:
        """Mean overlap of the faces that both have."""
        return float(np.mean(self.iou)) if self.iou else None

    @property
    def landmark_error(self) -> float | None:
        """Mean distance of their landmarks, in percent of the face size."""
        return float(np.mean(self.landmarks)) if self.landmarks else None


@dataclass(frozen=True)
class Budget:
    """How much worse than its reference a model may be; the defaults are what INT8 may cost.

    Attributes:
        recall: Least share of the reference's faces that it finds, in percent.
        landmark_error: Largest mean distance of landmarks, in percent of the face size.
        precision: Least share of its faces that the reference has, too, in percent.
        score_drift: Largest mean difference of the scores of a face.
        case_recall: Least recall of a special case (a size, crowds): of few images, so it has to be wider.
        case_precision: Least precision of a special case; its landmark error may be twice the other.
        ap_loss: Largest loss of average precision in points: easy, medium, hard.
    """

    recall: float = 98.5
    landmark_error: float = 1.0
    precision: float = 97.5
    score_drift: float = 0.02
    case_recall: float = 95.0
    case_precision: float = 93.0
    ap_loss: tuple[float, float, float] = (0.5, 0.5, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.recall <= 100:
            raise SpecError(f"--recall {self.recall:g}: recall is a percentage from 0 to 100")
        if not 0 <= self.landmark_error < math.inf:
            raise SpecError(f"--landmark-error {self.landmark_error:g}: give a percentage of the face size from 0 on")


@dataclass(frozen=True)
class Sample:
    """An image that is read when it is needed."""

    name: str
    load: Callable[[], Frame]


def draw_disagreements(
    disagreements: list[Disagreement], samples: Sequence[Sample], faces: Sequence[Sequence[Detections]]
) -> Frame:
    """Return a picture of the worst: the reference in green on the left, the candidate in red on the right.

    No more than two of an image are shown. `faces` is what the reference and what the candidate found on each.
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
