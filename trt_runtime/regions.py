"""Parts of a frame that a detector runs on apart: a region of interest, and tiles of a frame that is large."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from facespec.boxes import nms
from facespec.detections import Detections
from facespec.errors import FrameError, SpecError

Region = tuple[int, int, int, int]
"""x, y, width, height in pixels."""

OVERLAP = 4
"""Tiles overlap by a part of so many of their side: faces up to that lie whole in one of them."""

_EXPECTED = "a region is X,Y,WIDTH,HEIGHT in pixels, got {!r}"

_EDGE_PX = 2.0  # a box that comes as near to where a tile is cut is part of a face


def check_region(region: object) -> Region | None:
    """Return a region if it is x, y, width, height, whole numbers, the first two not negative, the others positive.

    Raises:
        SpecError: It is something else.
    """
    if region is None:
        return None
    values = list(region) if isinstance(region, (list, tuple)) else []
    if [type(value) for value in values] != [int] * 4 or min(values) < 0 or min(values[2:]) < 1:
        raise SpecError(_EXPECTED.format(region))
    x, y, width, height = values
    return x, y, width, height


def parse_region(text: str) -> Region:
    """Return the region that a text like 100,50,640,480 names.

    Raises:
        SpecError: It names none.
    """
    found = re.fullmatch(r"(\d{1,6}),(\d{1,6}),0*([1-9]\d{0,5}),0*([1-9]\d{0,5})", text, re.ASCII)
    if not found:
        raise SpecError(_EXPECTED.format(text))
    x, y, width, height = map(int, found.groups())
    return x, y, width, height


def in_frame(region: Region | None, frame_hw: tuple[int, int]) -> Region:
    """Return the part of a region that lies in a frame; of None, the frame.

    Raises:
        FrameError: No part of it does.
    """
    height, width = frame_hw
    x, y, w, h = region or (0, 0, width, height)
    if x >= width or y >= height:
        raise FrameError(f"the region {x},{y},{w},{h} lies outside the frame of {width}x{height}")
    return x, y, min(w, width - x), min(h, height - y)


def tiles(region: Region, tile_hw: tuple[int, int]) -> list[Region]:
    """Return the parts of a region that are run: the region itself and, if it is larger than a tile, tiles over it."""
    x, y, width, height = region
    if height <= tile_hw[0] and width <= tile_hw[1]:
        return [region]
    rows, columns = _starts(height, tile_hw[0]), _starts(width, tile_hw[1])
    size = min(tile_hw[1], width), min(tile_hw[0], height)
    return [region, *((x + column, y + row, *size) for row in rows for column in columns)]


def _starts(length: int, tile: int) -> list[int]:
    if length <= tile:
        return [0]
    count = 1 + math.ceil((length - tile) / (tile - tile // OVERLAP))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def joined(
    parts: Sequence[tuple[Region, Detections]], frame_hw: tuple[int, int], iou_threshold: float, max_detections: int
) -> Detections:
    """Return the faces of a frame from those of its parts, the first of which holds all others.

    A box at the edge of a part that is inside the first is left out: it is half a face, which another part shows whole.
    One NMS over all parts, `facespec.boxes.nms`, leaves one box of a face that several show.
    """
    (x, y, w, h), whole = parts[0]
    found = [whole.moved(x, y, frame_hw)]
    limits = np.array([x, y, -(x + w), -(y + h)], np.float32)
    for (left, top, width, height), faces in parts[1:]:
        moved = faces.moved(left, top, frame_hw)
        # distances outwards: an edge that is one of the first part cuts nothing
        edges = np.array([left, top, -(left + width), -(top + height)], np.float32)
        sides = moved.boxes * np.array([1, 1, -1, -1], np.float32)
        cut = ((sides < edges + _EDGE_PX) & (edges > limits)).any(axis=1)
        found.append(moved[~cut])
    if len(found) == 1:
        return found[0]
    boxes, scores, landmarks = (
        np.concatenate([getattr(faces, name) for faces in found]) for name in ("boxes", "scores", "landmarks")
    )
    order = np.argsort(-scores, kind="stable")
    kept = order[nms(boxes[order], iou_threshold, max_detections)]
    truncated = any(faces.truncated for faces in found)
    return Detections(boxes[kept], scores[kept], landmarks[kept], frame_hw, truncated)
