"""Head maps decoded the slow way, from the contract: what the kernels must equal bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facespec.boxes import make_priors
from facespec.spec import AnchorSpec, DecodeSpec
from trt_runtime import kernels

Array = NDArray[np.float32]


def elementary(name: str, x: NDArray[Any], kind: type = np.float32) -> Array:
    """Return exp, sigmoid or half_to_float of every value, by the library: numpy's exp differs in the last bit."""
    x = np.ascontiguousarray(x, kind)
    y = np.empty(x.shape, np.float32)
    function = getattr(kernels.library(), f"retinaface_host_{name}")
    function(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(x.size))
    return y


def split_heads(heads: Sequence[NDArray[Any]], image: int, per_cell: int) -> tuple[Array, Array, Array]:
    """Return class logits (N, 2), box deltas (N, 4) and landmark deltas (N, 10) of one image, a row for each prior."""
    parts: list[list[Array]] = [[], [], []]
    for head in heads:
        maps = head[image].astype(np.float32)
        first = 0
        for part, values in zip(parts, (2, 4, 10), strict=True):
            block = maps[first : first + values * per_cell].reshape(per_cell, values, *maps.shape[1:])
            part.append(block.transpose(2, 3, 0, 1).reshape(-1, values))
            first += values * per_cell
    logits, boxes, landmarks = (np.concatenate(part) for part in parts)
    return logits, boxes, landmarks


def join_heads(
    logits: Array, boxes: Array, landmarks: Array, anchors: AnchorSpec, size_hw: tuple[int, int]
) -> list[Array]:
    """Return the head maps of a batch from arrays (B, N, 2), (B, N, 4), (B, N, 10); the inverse of `split_heads`."""
    heads, first = [], 0
    for rows, columns in anchors.grids_hw(size_hw):
        last = first + rows * columns * anchors.per_cell
        blocks = [
            part[:, first:last]
            .reshape(len(part), rows, columns, anchors.per_cell, part.shape[-1])
            .transpose(0, 3, 4, 1, 2)
            .reshape(len(part), anchors.per_cell * part.shape[-1], rows, columns)
            for part in (logits, boxes, landmarks)
        ]
        heads.append(np.concatenate(blocks, axis=1))
        first = last
    return heads


@dataclass(frozen=True)
class Image:
    """One image of a batch.

    Attributes:
        outputs: The five outputs, without the batch dimension.
        clear: No test of an overlap was so close that another exp could decide it otherwise.
    """

    outputs: dict[str, NDArray[Any]]
    clear: bool


def _boxes(deltas: Array, priors: Array, decode: DecodeSpec) -> Array:
    centre = priors[:, :2] + deltas[:, :2] * np.float32(decode.variances[0]) * priors[:, 2:]
    size = priors[:, 2:] * elementary("exp", deltas[:, 2:] * np.float32(decode.variances[1]))
    low = centre - size / np.float32(2)
    boxes = np.concatenate([low, low + size], axis=1)
    boxes[np.isnan(boxes)] = np.nan  # infinity less infinity, whose bits are not the same on every machine
    return boxes


def _reach(boxes: Array) -> Array:
    """Return (..., 2) the greatest |x| and |y| of boxes (..., 4)."""
    return np.maximum(np.abs(boxes[..., :2]), np.abs(boxes[..., 2:]))


def _greedy(boxes: Array, decode: DecodeSpec) -> tuple[NDArray[np.int64], bool]:
    """Return the indices kept, and whether all was clear: a box stays unless one that stays overlaps it too much."""
    limit = np.float32(decode.iou_threshold)
    extent = np.maximum(boxes[:, 2:] - boxes[:, :2], np.float32(0))
    areas, reach = extent[:, 0] * extent[:, 1], _reach(boxes)
    alive, doubtful = np.ones(len(boxes), bool), np.zeros(len(boxes), bool)
    kept: list[int] = []
    asked = 0  # boxes that were looked at before there were enough
    for index in range(len(boxes)):
        if len(kept) == decode.max_detections:
            break
        asked = index + 1
        if not alive[index]:
            continue
        kept.append(index)
        box, later = boxes[index], slice(index + 1, None)
        others = boxes[later]
        gap = np.maximum(others[:, :2], box[:2]) - np.minimum(others[:, 2:], box[2:])
        side = np.maximum(-gap, np.float32(0))
        inter = side[:, 0] * side[:, 1]
        union = areas[index] + areas[later] - inter
        alive[later] &= ~(inter > limit * union)
        # a coordinate may be off by some roundings of the greatest one
        error = np.float32(1e-6) * np.maximum(reach[later], reach[index])
        slack = (error[:, ::-1] * (extent[index] + extent[later] + error)).sum(axis=1)
        doubtful[later] |= (np.abs(inter - limit * union) <= slack) & (gap <= error).all(axis=1) & np.isfinite(union)
    return np.array(kept, np.int64), not doubtful[:asked].any()


def decode_image(
    heads: Sequence[NDArray[Any]], image: int, size_hw: tuple[int, int], anchors: AnchorSpec, decode: DecodeSpec
) -> Image:
    """Return what the kernels must report for one image of a batch."""
    outputs: dict[str, NDArray[Any]] = {
        name: np.zeros(shape, np.dtype(kind)) for name, (kind, shape) in decode.outputs.items()
    }
    logits, box_deltas, landmark_deltas = split_heads(heads, image, anchors.per_cell)
    if not all(np.isfinite(values).all() for values in (logits, box_deltas, landmark_deltas)):
        outputs["num_candidates"][...] = -1
        return Image(outputs, clear=True)
    priors = make_priors(anchors, size_hw)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        difference = (logits[:, 1] - logits[:, 0]) + np.float32(0)
        candidates = np.flatnonzero(difference >= np.float32(decode.logit_threshold))
        best = candidates[np.lexsort((candidates, -difference[candidates]))][: decode.top_k]
        boxes = _boxes(box_deltas[best], priors[best], decode)
        kept, clear = _greedy(boxes, decode)
        faces, found = best[kept], len(kept)
        points = landmark_deltas[faces].reshape(-1, 5, 2) * np.float32(decode.variances[0])
        outputs["landmarks"][:found] = priors[faces, None, :2] + points * priors[faces, None, 2:]
    outputs["num_detections"][...] = found
    outputs["num_candidates"][...] = len(candidates)
    outputs["boxes"][:found] = boxes[kept]
    outputs["scores"][:found] = elementary("sigmoid", difference[faces])
    return Image(outputs, clear)
