"""Priors, box and landmark coding, IoU, greedy NMS: the reference that every backend is tested against.

Boxes are x1, y1, x2, y2 in pixels, with area (x2 - x1) * (y2 - y1). Simple and vectorised; not tuned for speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facespec.spec import AnchorSpec, DecodeSpec

Array = NDArray[np.float32]


def make_priors(anchors: AnchorSpec, size_hw: tuple[int, int]) -> Array:
    """Return the priors of a network input as (N, 4) float32 rows (centre x, centre y, width, height) in pixels.

    Levels come in the order of `anchors.strides`, cells in row-major order, the priors of a cell next to each other.
    Cell (i, j) has its centre at ((j + 0.5) * stride, (i + 0.5) * stride). Every value is exact in float32.

    Source: the prior boxes of RetinaFace (Deng et al., CVPR 2020, section 3.3), in pixels instead of fractions.

    `size_hw` need not be multiples of the strides.
    """
    levels = []
    for (rows, columns), stride, sizes in zip(
        anchors.grids_hw(size_hw), anchors.strides, anchors.min_sizes, strict=True
    ):
        level = np.empty((rows, columns, len(sizes), 4), np.float32)
        level[..., 0] = ((np.arange(columns) + 0.5) * stride)[None, :, None]
        level[..., 1] = ((np.arange(rows) + 0.5) * stride)[:, None, None]
        level[..., 2] = level[..., 3] = np.asarray(sizes, np.float32)
        levels.append(level.reshape(-1, 4))
    return np.concatenate(levels)


def xyxy_to_cxcywh(boxes_xyxy: Array) -> Array:
    """Return (..., 4) centre x, centre y, width, height from (..., 4) x1, y1, x2, y2."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=-1)


def cxcywh_to_xyxy(boxes_cxcywh: Array) -> Array:
    """Return (..., 4) x1, y1, x2, y2 from (..., 4) centre x, centre y, width, height."""
    low = boxes_cxcywh[..., :2] - boxes_cxcywh[..., 2:] / 2
    return np.concatenate([low, low + boxes_cxcywh[..., 2:]], axis=-1)


def encode_boxes(boxes_xyxy: Array, priors_cxcywh: Array, variances: tuple[float, float]) -> Array:
    """Return (N, 4) regression targets of boxes (N, 4) in pixels against priors (N, 4).

    Source: the SSD box coding (Liu et al., ECCV 2016, equation 2) with variances.

    Raises:
        ValueError: A box has no width or no height: its logarithm would not be finite.
    """
    boxes = xyxy_to_cxcywh(boxes_xyxy)
    if not (boxes[..., 2:] > 0).all():
        raise ValueError("encode_boxes: every box needs a positive width and height")
    centre = (boxes[..., :2] - priors_cxcywh[..., :2]) / (variances[0] * priors_cxcywh[..., 2:])
    size = np.log(boxes[..., 2:] / priors_cxcywh[..., 2:]) / variances[1]
    return np.concatenate([centre, size], axis=-1)


def decode_boxes(deltas: Array, priors_cxcywh: Array, variances: tuple[float, float]) -> Array:
    """Return (..., 4) x1, y1, x2, y2 in pixels from network outputs (..., 4); the inverse of `encode_boxes`."""
    centre = priors_cxcywh[..., :2] + deltas[..., :2] * np.float32(variances[0]) * priors_cxcywh[..., 2:]
    size = priors_cxcywh[..., 2:] * np.exp(deltas[..., 2:] * np.float32(variances[1]))
    return cxcywh_to_xyxy(np.concatenate([centre, size], axis=-1))


def encode_landmarks(landmarks: Array, priors_cxcywh: Array, variances: tuple[float, float]) -> Array:
    """Return (N, 10) regression targets of points (N, 5, 2) in pixels against priors (N, 4)."""
    scale = np.float32(variances[0]) * priors_cxcywh[..., None, 2:]
    deltas = (landmarks - priors_cxcywh[..., None, :2]) / scale
    return deltas.reshape(*deltas.shape[:-2], 10)


def decode_landmarks(deltas: Array, priors_cxcywh: Array, variances: tuple[float, float]) -> Array:
    """Return (..., 5, 2) points x, y in pixels from network outputs (..., 10); the inverse of `encode_landmarks`."""
    points = deltas.reshape(*deltas.shape[:-1], 5, 2)
    return priors_cxcywh[..., None, :2] + points * np.float32(variances[0]) * priors_cxcywh[..., None, 2:]


def box_areas(boxes_xyxy: Array) -> Array:
    """Return (...,) areas of boxes (..., 4); an inverted box has area 0."""
    return np.prod(np.maximum(boxes_xyxy[..., 2:] - boxes_xyxy[..., :2], 0), axis=-1)


def _intersections(a_xyxy: Array, b_xyxy: Array) -> Array:
    low = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    return np.prod(np.maximum(high - low, 0), axis=-1)


def iou_matrix(a_xyxy: Array, b_xyxy: Array) -> Array:
    """Return (N, M) intersection over union of boxes (N, 4) and (M, 4); 0 where the union is empty."""
    inter = _intersections(a_xyxy, b_xyxy)
    union = box_areas(a_xyxy)[:, None] + box_areas(b_xyxy)[None, :] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def sigmoid(logits: Array) -> Array:
    """Return 1 / (1 + exp(-x)) without overflow, in the type of `logits`."""
    exp = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + exp), exp / (1 + exp)).astype(logits.dtype)


def nms(boxes_xyxy: Array, iou_threshold: float, max_detections: int | None = None) -> NDArray[np.int64]:
    """Return the indices kept by greedy non-maximum suppression of boxes that are sorted, the best first.

    A box is dropped if its IoU with a box already kept is greater than `iou_threshold`, tested without a division as
    intersection > threshold * union. The indices ascend, so the result for the first n boxes is a prefix of the result
    for all.
    """
    limit = np.float32(iou_threshold)
    areas = box_areas(boxes_xyxy)
    alive = np.ones(len(boxes_xyxy), bool)
    kept: list[int] = []
    for index in range(len(boxes_xyxy)):
        if max_detections is not None and len(kept) >= max_detections:
            break
        if not alive[index]:
            continue
        kept.append(index)
        rest = np.flatnonzero(alive[index + 1 :]) + index + 1
        inter = _intersections(boxes_xyxy[index : index + 1], boxes_xyxy[rest])[0]
        alive[rest[inter > limit * (areas[index] + areas[rest] - inter)]] = False
    return np.asarray(kept, np.int64)


@dataclass(frozen=True)
class Decoded:
    """Faces of one image in pixels of the network input, sorted by score, ties by the lower prior index.

    Attributes:
        boxes: (n, 4) float32 x1, y1, x2, y2.
        scores: (n,) float32 face probability.
        landmarks: (n, 5, 2) float32.
        prior_index: (n,) int64 index of the prior each face came from.
        num_candidates: Priors over the threshold before top-k; -1 if a head value was not finite.
    """

    boxes: Array
    scores: Array
    landmarks: Array
    prior_index: NDArray[np.int64]
    num_candidates: int


def decode_detections(
    box_deltas: Array, class_logits: Array, landmark_deltas: Array, priors_cxcywh: Array, decode: DecodeSpec
) -> Decoded:
    """Return the faces of one image: threshold, top-k, decode, NMS.

    Selection and order go by the difference of logits, face minus background: unlike a float32 softmax it does not
    saturate, so it has no false ties.

    The network's outputs are (N, 4), (N, 2) background and face, and (N, 10); the priors (N, 4).
    """
    heads: tuple[Any, ...] = (box_deltas, class_logits, landmark_deltas)
    if not all(np.isfinite(head).all() for head in heads):
        boxes, landmarks = np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32)
        return Decoded(boxes, np.zeros(0, np.float32), landmarks, np.zeros(0, np.int64), num_candidates=-1)
    with np.errstate(over="ignore", invalid="ignore"):  # a size that overflows is not finite: detectors report that
        difference = class_logits[:, 1] - class_logits[:, 0]
        candidates = np.flatnonzero(difference >= np.float32(decode.logit_threshold))
        best = candidates[np.argsort(-difference[candidates], kind="stable")[: decode.top_k]]
        boxes = decode_boxes(box_deltas[best], priors_cxcywh[best], decode.variances)
        kept = nms(boxes, decode.iou_threshold, decode.max_detections)
        index = best[kept]
        landmarks = decode_landmarks(landmark_deltas[index], priors_cxcywh[index], decode.variances)
    return Decoded(
        boxes=boxes[kept],
        scores=sigmoid(difference[index]),
        landmarks=landmarks,
        prior_index=index,
        num_candidates=len(candidates),
    )
