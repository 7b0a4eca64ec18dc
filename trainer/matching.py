"""Which prior is trained towards which face.

A face overlaps only the few priors near it that have about its size, so only those pairs are visited: an IoU of at
least t bounds from below the overlap of both boxes and so, along either axis, the distance of their centres. Every IoU
is rounded as `facespec.boxes.iou_matrix` rounds it, and the result equals that of the full matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from facespec.spec import AnchorSpec

_LOW = 0xFFFFFFFF
"""The lower half of a key of `_best`."""


class Matches(NamedTuple):
    """What the priors of a batch are trained towards.

    Attributes:
        positive: (B, N) bool, whether a prior is trained towards a face; the others are background.
        face: (B, N) int64 index of that face in its image; 0 for background.
        dropped: () int64, number of faces left out because their boxes have no area or are not finite.
        ignored: () int64, number of faces left out because no prior overlaps them enough.
    """

    positive: Tensor
    face: Tensor
    dropped: Tensor
    ignored: Tensor


class Overlaps(NamedTuple):
    """Pairs of a face and a prior, in any order: (P,) int64 indices of both, (P,) float32 and positive IoU."""

    face: Tensor
    prior: Tensor
    iou: Tensor


@torch.no_grad()
def match_faces(
    boxes_xyxy: Tensor,
    valid: Tensor,
    anchors: AnchorSpec,
    size_hw: tuple[int, int],
    positive_iou: float = 0.35,
    ignore_iou: float = 0.2,
) -> Matches:
    """Match the faces of a batch with its priors; `assign` has the rules.

    It runs where the boxes are, and how many pairs there are decides the shapes of tensors. So leave them on the CPU:
    there it takes a few milliseconds, while a GPU is busy with the forward pass. On a GPU it waits for that to end.

    Args:
        boxes_xyxy: (B, G, 4) float32 in pixels of the network input.
        valid: (B, G) bool; False for padding.
        anchors: Strides and sizes of the priors.
        size_hw: Height and width of the network input; need not be multiples of the strides.
        positive_iou: Least IoU of a prior that is trained towards a face without being the face's best one.
        ignore_iou: Faces whose best IoU is less are left out; positive and not over `positive_iou`.
    """
    batch, priors = len(valid), anchors.count(size_hw)
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    usable = valid & (size > 0).all(dim=-1) & size.prod(dim=-1).isfinite()
    image, slot = usable.nonzero(as_tuple=True)
    boxes = boxes_xyxy[image, slot]
    overlaps = overlapping_priors(boxes, anchors, size_hw, ignore_iou)
    # one row of priors for the whole batch, so that an image's faces meet its own priors only
    overlaps = overlaps._replace(prior=overlaps.prior + image[overlaps.face] * priors)
    positive, face, ignored = assign(overlaps, boxes, batch * priors, positive_iou, ignore_iou)
    index = torch.where(positive, slot[face], 0) if len(slot) else face
    return Matches(positive.view(batch, priors), index.view(batch, priors), (valid & ~usable).sum(), ignored)


def assign(
    overlaps: Overlaps, boxes_xyxy: Tensor, priors: int, positive_iou: float, ignore_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return positive (N,) bool, face (N,) int64 (0 for background) and the number of ignored faces.

    - A face whose best IoU is less than `ignore_iou` is ignored.
    - Any other face forces its best prior to be trained towards it; of equally good ones the lowest index. Of several
      faces that force one prior, the one with the highest IoU has it and the others force none. Of equally good ones
      it is the first by x1, then y1, x2, y2: the order of the faces does not matter.
    - Any other prior is trained towards its best face if their IoU is at least `positive_iou`; of equally good ones
      the lowest index.

    Source: the matching strategy of SSD (Liu et al., ECCV 2016, section 2.2), with the thresholds of RetinaFace.

    Args:
        overlaps: All pairs whose IoU is at least `ignore_iou`; it may hold others.
        boxes_xyxy: (F, 4) float32 the faces.
        priors: N.
        positive_iou: As in `match_faces`.
        ignore_iou: As in `match_faces`.
    """
    best_prior, best_iou = _best(overlaps.iou, of=overlaps.face, count=len(boxes_xyxy), among=overlaps.prior)
    forcing = best_iou >= ignore_iou
    order = _lexicographic(boxes_xyxy)
    forcing_in_order = order[forcing[order]]
    winner, forced_iou = _best(
        best_iou[forcing_in_order],
        of=best_prior[forcing_in_order],
        count=priors,
        among=torch.arange(len(forcing_in_order), device=order.device),
    )
    near = overlaps.iou >= positive_iou
    face, face_iou = _best(overlaps.iou[near], of=overlaps.prior[near], count=priors, among=overlaps.face[near])
    forced = forced_iou > 0
    if len(forcing_in_order):  # there is nothing to index otherwise
        face = torch.where(forced, forcing_in_order[winner], face)
    return forced | (face_iou > 0), face, (~forcing).sum()


def overlapping_priors(boxes_xyxy: Tensor, anchors: AnchorSpec, size_hw: tuple[int, int], iou: float) -> Overlaps:
    """Return every pair of a face and a prior whose IoU is at least `iou`, and a few others.

    An intersection I over a union A + S - I is at least t where I >= (A + S) * t / (1 + t): this bounds the overlap of
    a face and a prior along an axis by their overlap along the other. So rows of cells are found first, for the widest
    overlap there can be, and then the cells in each row. The faces are (F, 4) float32 with a finite, positive area, and
    `iou` is positive.
    """
    stride, side, rows, columns, first, per_row = _kinds(anchors, size_hw, boxes_xyxy)
    x1, y1, x2, y2 = boxes_xyxy.T[..., None]
    width, height = x2 - x1, y2 - y1
    bound = 0.99 * iou  # looser than asked for by more than rounding can be wrong
    least = (width * height + side * side) * (bound / (1 + bound))  # intersection: (F, kinds)

    reach = (height + side) / 2 - least / torch.minimum(width, side)
    start, count = _cells(y1 + height / 2, reach, stride, rows)
    pair, row = _runs(start.flatten(), count.flatten())
    face, kind = pair // len(side), pair % len(side)
    stride, side, columns = stride[kind], side[kind], columns[kind]
    x1, y1, x2, y2 = boxes_xyxy[face].T
    width, area = x2 - x1, (x2 - x1) * (y2 - y1)
    low = (row + 0.5) * stride - side / 2
    overlap_y = (torch.minimum(y2, low + side) - torch.maximum(y1, low)).clamp(min=0)

    reach = (width + side) / 2 - least.flatten()[pair] / overlap_y
    start, count = _cells(x1 + width / 2, reach, stride, columns)
    pair, column = _runs(start, count)
    side = side[pair]
    low = (column + 0.5) * stride[pair] - side / 2
    overlap_x = (torch.minimum(x2[pair], low + side) - torch.maximum(x1[pair], low)).clamp(min=0)

    intersection = overlap_x * overlap_y[pair]
    overlap = intersection / (area[pair] + side * side - intersection)
    prior = (first[kind] + per_row[kind] * row)[pair] + anchors.per_cell * column
    return Overlaps(face[pair], prior, overlap)


def _kinds(anchors: AnchorSpec, size_hw: tuple[int, int], like: Tensor) -> tuple[Tensor, ...]:
    """Describe the kinds of priors, a kind being one size of one level, by one (kinds,) tensor each.

    They are stride, side, rows, columns, the index of the first prior, and the number of priors in a row of cells.
    """
    table, start = [], 0
    levels = zip(anchors.strides, anchors.min_sizes, anchors.grids_hw(size_hw), strict=True)
    for stride, sizes, (rows, columns) in levels:
        per_row = columns * anchors.per_cell
        table += [(stride, side, rows, columns, start + slot, per_row) for slot, side in enumerate(sizes)]
        start += rows * per_row
    lengths = torch.tensor([row[:2] for row in table], dtype=like.dtype, device=like.device)
    counts = torch.tensor([row[2:] for row in table], device=like.device)
    return *lengths.T, *counts.T


def _cells(centre: Tensor, reach: Tensor, stride: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first cell whose centre is within `reach` of a point of an axis, and how many there are."""
    start = ((centre - reach) / stride - 0.5).ceil().clamp(min=0).minimum(cells)
    stop = ((centre + reach) / stride - 0.5).floor().clamp(min=-1).minimum(cells - 1) + 1
    return start.long(), (stop - start).clamp(min=0).long()


def _runs(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for runs of `count` consecutive numbers each, which run an item is of, and its number."""
    run = torch.repeat_interleave(count)
    return run, torch.arange(len(run), device=run.device) + (start - count.cumsum(0) + count)[run]


def _best(iou: Tensor, of: Tensor, count: int, among: Tensor) -> tuple[Tensor, Tensor]:
    """Return the partner of highest IoU of each of `count` boxes, the lowest of equals, and that IoU; 0 and 0 for none.

    Bits of positive floats are in the order of their values: with the inverted index below them they make one integer,
    whose maximum is the same in whatever order a device takes it. Of P pairs, `iou` is float32 and not negative, `of`
    the index of the box and `among` that of its partner, less than 2**32, both int64.
    """
    key = (iou.view(torch.int32).long() << 32) | (_LOW - among)
    best = key.new_full((count,), _LOW).scatter_reduce_(0, of, key, "amax")
    return _LOW - (best & _LOW), (best >> 32).int().view(torch.float32)


def _lexicographic(boxes: Tensor) -> Tensor:
    """Return the indices (F,) that sort boxes (F, 4) by their first value, then the second, and so on."""
    order = torch.arange(len(boxes), device=boxes.device)
    for values in boxes.T.flip(0):
        order = order[values[order].argsort(stable=True)]
    return order
