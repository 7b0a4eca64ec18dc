"""Which prior is trained towards which face: by fixed thresholds of the IoU, by ATSS, or by SimOTA.

For the thresholds, a face overlaps only the few priors near it that have about its size, so only those pairs are
visited: an IoU of at least t bounds from below the overlap of both boxes and so, along either axis, the distance of
their centres. Every IoU is rounded as `facespec.boxes.iou_matrix` rounds it, and the result equals that of the full
matrix. For the others, a face has as many candidates as any other face, near its centre, so that all go in one tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from facespec.spec import AnchorSpec

ATSS_CELLS = 9
"""Cells of each level, nearest to a face, whose priors may be trained towards it: k of ATSS, which is robust to it."""

SIMOTA_REGION = 5
"""Cells of each level, along each axis around a face, whose priors may be trained towards it (radius 2.5 in YOLOX)."""

SIMOTA_TOP = 10
"""Predictions whose IoU is added up to tell how many priors a face gets; no face gets more."""

SIMOTA_IOU_COST, OUTSIDE_COST = 3.0, 1e5
"""What -log(IoU) counts beside the cross-entropy, and what is added where the prior's centre is outside the face."""

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
    image, slot, boxes, dropped = _usable(boxes_xyxy, valid)
    overlaps = overlapping_priors(boxes, anchors, size_hw, ignore_iou)
    # one row of priors for the whole batch, so that an image's faces meet its own priors only
    overlaps = overlaps._replace(prior=overlaps.prior + image[overlaps.face] * priors)
    positive, face, ignored = assign(overlaps, boxes, batch * priors, positive_iou, ignore_iou)
    return _matches(positive, face, slot, batch, dropped, ignored)


@torch.no_grad()
def match_atss(boxes_xyxy: Tensor, valid: Tensor, anchors: AnchorSpec, size_hw: tuple[int, int]) -> Matches:
    """Match the faces of a batch with its priors by ATSS: the threshold of each face follows from its own overlaps.

    - The candidates of a face are the priors of the `ATSS_CELLS` cells of each level whose centres are nearest to its
      own; of equally near ones the lowest index.
    - Those are trained towards it whose IoU is at least the mean of its candidates' plus their standard deviation, and
      whose centre lies inside it. A face without such a prior gets the candidate of the highest IoU, of equals the
      first: in the paper it would go untrained, which many a face smaller than a cell would.
    - A prior that several faces claim is trained towards the one of highest IoU; of equals the first by x1, y1, x2, y2.

    A face that overlaps none of its candidates is ignored. Arguments are those of `match_faces`, and so is where it
    should run.

    Source: Zhang et al., Bridging the Gap Between Anchor-based and Anchor-free Detection, CVPR 2020, algorithm 1.
    """
    batch, priors = len(valid), anchors.count(size_hw)
    image, slot, boxes, dropped = _usable(boxes_xyxy, valid)
    order = _lexicographic(boxes)  # one order for all: the order of the faces does not matter
    image, slot, boxes = image[order], slot[order], boxes[order]
    if not len(boxes):
        none = torch.zeros(batch * priors, dtype=torch.int64, device=valid.device)
        return _matches(none.bool(), none, slot, batch, dropped, dropped.new_zeros(()))
    prior, centre, side = _nearest(boxes, anchors, size_hw)
    iou = _iou_with_squares(boxes, centre, side)
    threshold = iou.mean(dim=1) + iou.std(dim=1)
    inside = ((centre > boxes[:, None, :2]) & (centre < boxes[:, None, 2:])).all(dim=2)
    claimed = (iou >= threshold[:, None]) & inside & (iou > 0)
    best_iou, best = iou.max(dim=1)
    alone = ~claimed.any(dim=1) & (best_iou > 0)
    claimed |= alone[:, None] & (torch.arange(prior.shape[1], device=best.device) == best[:, None])
    face, place = claimed.nonzero(as_tuple=True)
    of = prior[face, place] + image[face] * priors
    face, won_iou = _best(iou[face, place], of=of, count=batch * priors, among=face)
    return _matches(won_iou > 0, face, slot, batch, dropped, (best_iou <= 0).sum())


@torch.no_grad()
def match_simota(
    boxes_xyxy: Tensor,
    valid: Tensor,
    anchors: AnchorSpec,
    size_hw: tuple[int, int],
    predicted_xyxy: Tensor,
    difference: Tensor,
) -> Matches:
    """Match the faces of a batch with its priors by SimOTA: what the network predicts decides.

    - The candidates of a face are the priors of the cells of each level whose centres are at most
      `SIMOTA_REGION` / 2 cells from its own, along either axis.
    - A candidate costs its cross-entropy as a face, `SIMOTA_IOU_COST` times -log of the IoU of the box it predicts,
      and `OUTSIDE_COST` where its centre is outside the face.
    - A face gets the cheapest k candidates, of equals the first; k is the sum of the `SIMOTA_TOP` highest IoUs among
      them, rounded down, and at least 1.
    - A prior that several faces get is trained towards the one for which it is cheapest; of equals the first by x1,
      y1, x2, y2.

    No face is ignored, but one whose region holds no cell. It runs where the predictions are.

    Args:
        boxes_xyxy: As in `match_faces`.
        valid: As in `match_faces`.
        anchors: As in `match_faces`.
        size_hw: As in `match_faces`.
        predicted_xyxy: (B, N, 4) float32 boxes of all priors, in pixels.
        difference: (B, N) float32 logit of face minus that of background.

    Source: Ge et al., YOLOX, arXiv 2107.08430, section 2.3; the numbers are those of its code.
    """
    batch, priors = len(valid), anchors.count(size_hw)
    image, slot, boxes, dropped = _usable(boxes_xyxy, valid)
    order = _lexicographic(boxes)
    image, slot, boxes = image[order], slot[order], boxes[order]
    if not len(boxes):
        none = torch.zeros(batch * priors, dtype=torch.int64, device=valid.device)
        return _matches(none.bool(), none, slot, batch, dropped, dropped.new_zeros(()))
    prior, centre, there = _region(boxes, anchors, size_hw)
    row = prior + image[:, None] * priors
    predicted = predicted_xyxy.reshape(-1, 4)[row]
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    overlap = (torch.minimum(high, predicted[..., 2:]) - torch.maximum(low, predicted[..., :2])).clamp(min=0).prod(2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)[:, None] + (predicted[..., 2:] - predicted[..., :2]).prod(dim=2)
    iou = torch.where(there, (overlap / (areas - overlap)).nan_to_num(0), 0)
    inside = ((centre > low) & (centre < high)).all(dim=2)
    cost = F.softplus(-difference.reshape(-1)[row]) - SIMOTA_IOU_COST * (iou + 1e-8).log() + OUTSIDE_COST * ~inside
    cost = torch.where(there, cost.clamp(min=0).nan_to_num(OUTSIDE_COST), torch.inf)
    # bits of positive floats are in the order of their values; with the place below them no two are equal
    place = torch.arange(prior.shape[1], device=cost.device)
    key = (cost.view(torch.int32).long() << 32) | place
    top = min(SIMOTA_TOP, prior.shape[1])
    cheapest = key.topk(top, largest=False).values & _LOW
    wanted = iou.topk(top).values.sum(dim=1).int().clamp(min=1)
    taken = (torch.arange(top, device=cost.device) < wanted[:, None]) & there.gather(1, cheapest)
    face, rank = taken.nonzero(as_tuple=True)
    chosen = cheapest[face, rank]
    claim = (key[face, chosen] & ~_LOW) | face
    nobody = torch.iinfo(torch.int64).max
    winner = claim.new_full((batch * priors,), nobody).scatter_reduce_(0, row[face, chosen], claim, "amin")
    positive = winner != nobody
    return _matches(positive, (winner & _LOW) * positive, slot, batch, dropped, (~there.any(dim=1)).sum())


def _usable(boxes_xyxy: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return image, place in it and box of each of F faces with a finite area, and the number of those without."""
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    usable = valid & (size > 0).all(dim=-1) & size.prod(dim=-1).isfinite()
    image, slot = usable.nonzero(as_tuple=True)
    return image, slot, boxes_xyxy[image, slot], (valid & ~usable).sum()


def _matches(positive: Tensor, face: Tensor, slot: Tensor, batch: int, dropped: Tensor, ignored: Tensor) -> Matches:
    """Return the matches of a batch from those of its priors in one row; `slot` is where a face is in its image."""
    index = torch.where(positive, slot[face], 0) if len(slot) else face
    return Matches(positive.view(batch, -1), index.view(batch, -1), dropped, ignored)


def _nearest(boxes_xyxy: Tensor, anchors: AnchorSpec, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the candidates of ATSS: (F, C) index of the prior, (F, C, 2) its centre in pixels, (F, C) its side."""
    centre = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    found, first = [], 0
    for stride, sizes, (rows, columns) in zip(
        anchors.strides, anchors.min_sizes, anchors.grids_hw(size_hw), strict=True
    ):
        x, y = (_around(centre[:, axis], stride, cells, ATSS_CELLS) for axis, cells in ((0, columns), (1, rows)))
        dx, dy = ((cells + 0.5) * stride - centre[:, axis, None] for axis, cells in ((0, x), (1, y)))
        distance = (dx.square()[:, None] + dy.square()[:, :, None]).flatten(1)
        cell = (y[:, :, None] * columns + x[:, None]).flatten(1)
        key = (distance.view(torch.int32).long() << 32) | cell
        cell = key.topk(min(ATSS_CELLS, key.shape[1]), largest=False).values & _LOW
        found.append(_priors_of(cell, stride, sizes, columns, first))
        first += rows * columns * len(sizes)
    prior, centres, side = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return prior, centres, side


def _region(boxes_xyxy: Tensor, anchors: AnchorSpec, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the candidates of SimOTA as `_nearest` does, but instead of sides whether they are there at all."""
    middle = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    found, first = [], 0
    for stride, sizes, (rows, columns) in zip(
        anchors.strides, anchors.min_sizes, anchors.grids_hw(size_hw), strict=True
    ):
        x, y = (_around(middle[:, axis], stride, cells, SIMOTA_REGION + 1) for axis, cells in ((0, columns), (1, rows)))
        cell = (y[:, :, None] * columns + x[:, None]).flatten(1)
        prior, centre, _ = _priors_of(cell, stride, sizes, columns, first)
        there = ((centre - middle[:, None]).abs() <= SIMOTA_REGION / 2 * stride).all(dim=2)
        found.append((prior, centre, there))
        first += rows * columns * len(sizes)
    prior, centre, there = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return prior, centre, there


def _around(centre: Tensor, stride: int, cells: int, count: int) -> Tensor:
    """Return (F, count) consecutive cells of an axis around points of it (F,), all of them if there are fewer."""
    count = min(count, cells)
    start = (centre / stride).clamp(-1e6, 1e6).floor().long() - count // 2
    return start.clamp(0, cells - count)[:, None] + torch.arange(count, device=centre.device)


def _priors_of(
    cell: Tensor, stride: int, sizes: tuple[float, ...], columns: int, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return index, centre and side of the priors of cells (F, C) of a level, those of a cell side by side."""
    count = len(sizes)
    prior = (cell[..., None] * count + torch.arange(count, device=cell.device)).flatten(1) + first
    centre = (torch.stack([cell % columns, cell // columns], dim=2) + 0.5) * stride
    side = torch.tensor(sizes, dtype=torch.float32, device=cell.device).expand(*cell.shape, count)
    return prior, centre.repeat_interleave(count, dim=1), side.flatten(1)


def _iou_with_squares(boxes_xyxy: Tensor, centre: Tensor, side: Tensor) -> Tensor:
    """Return (F, C) IoU of each of F boxes with squares of its own."""
    low, high = centre - side[..., None] / 2, centre + side[..., None] / 2
    boxes = boxes_xyxy[:, None]
    overlap = (torch.minimum(boxes[..., 2:], high) - torch.maximum(boxes[..., :2], low)).clamp(min=0).prod(dim=2)
    return overlap / ((boxes[..., 2:] - boxes[..., :2]).prod(dim=2) + side.square() - overlap)


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
