"""ATSS and SimOTA against plain loops as the papers have them, in float64; DIoU and CIoU against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import facespec.boxes as reference
from facespec.boxes import cxcywh_to_xyxy, make_priors
from facespec.spec import AnchorSpec, ModelSpec
from tests.trainer.test_losses import heads_for, plain_faces, targets_of
from tests.trainer.test_matching import SIZES, faces_of, random_faces
from trainer.data.dataset import Faces
from trainer.losses import LossSettings, MultiBoxLoss, decode_boxes, iou_loss
from trainer.matching import Matches, match_atss, match_simota

ANCHORS = AnchorSpec(min_sizes=((10, 28), (64, 128), (256, 512)))
CLOSE = 1e-5
"""Values that are nearer than this may come in either order: float32 is compared with float64."""

Undecided = set[int]
Slow = Callable[[int, np.ndarray], tuple[list[int], Undecided]]


def iou_of(a: np.ndarray, b: np.ndarray) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


def levels(size_hw: tuple[int, int]) -> list[range]:
    """Indices of the priors of each level."""
    starts = [0, *np.cumsum([2 * rows * columns for rows, columns in ANCHORS.grids_hw(size_hw)]).tolist()]
    return [range(*pair) for pair in pairwise(starts)]


def slow_atss(boxes: np.ndarray, size_hw: tuple[int, int]) -> tuple[list[int], Undecided]:
    """The face of each prior, -1 for background; and the priors for which rounding may decide."""
    priors = make_priors(ANCHORS, size_hw).astype(np.float64)
    corners, centres = cxcywh_to_xyxy(priors), priors[:, :2]
    claims: list[dict[int, float]] = []
    undecided: Undecided = set()
    for box in boxes.astype(np.float64):
        middle = (box[:2] + box[2:]) / 2
        candidates = []
        for level in levels(size_hw):
            distances = sorted((float(np.float32(((centres[p] - middle) ** 2).sum())), p) for p in level)
            nearest = distances[: 2 * 9]  # k for each of the two priors of a cell
            if len(distances) > 18 and distances[18][0] - nearest[-1][0] < 1e-3 * (1 + nearest[-1][0]):
                tied = {p for distance, p in distances if abs(distance - nearest[-1][0]) < 1e-3 * (1 + distance)}
                undecided |= tied if distances[18][0] != nearest[-1][0] else set()
            candidates += [p for _, p in nearest]
        overlaps = {p: iou_of(box, corners[p]) for p in candidates}
        values = list(overlaps.values())
        threshold = np.mean(values) + np.std(values, ddof=1)
        inside = {p for p in candidates if (centres[p] > box[:2]).all() and (centres[p] < box[2:]).all()}
        undecided |= {p for p in candidates if abs(overlaps[p] - threshold) < CLOSE}
        taken = {p: overlaps[p] for p in candidates if overlaps[p] >= threshold and overlaps[p] > 0 and p in inside}
        if not taken and max(values) > 0:
            best = max(candidates, key=lambda p: (overlaps[p], -candidates.index(p)))
            undecided |= {p for p in candidates if 0 < overlaps[best] - overlaps[p] < CLOSE}
            taken = {best: overlaps[best]}
        claims.append(taken)
    return resolve(claims, len(priors), boxes, undecided, highest=True)


def resolve(
    claims: list[dict[int, float]], priors: int, boxes: np.ndarray, undecided: Undecided, highest: bool
) -> tuple[list[int], Undecided]:
    """Give each prior to the claim of highest, or lowest, value; of equal ones to the first box by its coordinates."""
    result = [-1] * priors
    for prior in {p for taken in claims for p in taken}:
        claimants = [face for face, taken in enumerate(claims) if prior in taken]
        sign = -1 if highest else 1
        ranked = sorted(claimants, key=lambda f: (sign * claims[f][prior], *boxes[f], f))
        result[prior] = ranked[0]
        if any(0 < abs(claims[f][prior] - claims[ranked[0]][prior]) < CLOSE * 10 for f in ranked[1:]):
            undecided.add(prior)
    return result, undecided


def slow_simota(
    boxes: np.ndarray, size_hw: tuple[int, int], predicted: np.ndarray, difference: np.ndarray
) -> tuple[list[int], Undecided]:
    priors = make_priors(ANCHORS, size_hw).astype(np.float64)
    stride_of = np.concatenate([[s] * len(level) for s, level in zip(ANCHORS.strides, levels(size_hw), strict=True)])
    claims: list[dict[int, float]] = []
    undecided: Undecided = set()
    for box in boxes.astype(np.float64):
        middle = (box[:2] + box[2:]) / 2
        costs, overlaps = {}, {}
        for p, (x, y, _, _) in enumerate(priors):
            apart = max(abs(x - middle[0]), abs(y - middle[1])) / stride_of[p]
            if apart <= 2.5:
                overlaps[p] = iou_of(box, predicted[p].astype(np.float64))
                inside = box[0] < x < box[2] and box[1] < y < box[3]
                costs[p] = np.log1p(np.exp(-float(difference[p]))) - 3 * np.log(overlaps[p] + 1e-8)
                costs[p] += 0 if inside else 1e5
        total = sum(sorted(overlaps.values(), reverse=True)[:10])
        ranked = sorted(costs, key=lambda p: (np.float32(costs[p]), list(costs).index(p)))
        count = max(int(total), 1)
        if abs(total - round(total)) < CLOSE * 10:
            undecided |= set(ranked[max(count - 1, 0) : count + 1])
        if len(ranked) > count:
            edge = costs[ranked[count - 1]]
            near = {p for p in ranked if abs(costs[p] - edge) < max(1e-4, 2e-7 * edge)}
            undecided |= near if len(near) > 1 else set()
        claims.append({p: costs[p] for p in ranked[:count]})
    taken, more = resolve(claims, len(priors), boxes, undecided, highest=False)
    for prior in {p for each in claims for p in each}:  # costs beyond 1e5 are known to 0.01 in float32
        values = sorted(each[prior] for each in claims if prior in each)
        if len(values) > 1 and values[1] - values[0] < 1e-4 + 2e-7 * values[0]:
            more.add(prior)
    return taken, more


def batch_of(*images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Padded boxes and which are valid; the padding would match if it were looked at."""
    most = max((len(boxes) for boxes in images), default=0)
    padded = np.tile(np.array([0, 0, 16, 16], np.float32), (len(images), most, 1))
    valid = np.zeros((len(images), most), bool)
    for row, boxes in enumerate(images):
        padded[row, : len(boxes)], valid[row, : len(boxes)] = boxes, True
    return torch.from_numpy(padded), torch.from_numpy(valid)


def predictions(seed: int, batch: int, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes somewhat off their priors, and logits."""
    generator = torch.Generator().manual_seed(seed)
    priors = torch.from_numpy(make_priors(ANCHORS, size_hw))
    deltas = torch.randn(batch, len(priors), 4, generator=generator) * 2
    return decode_boxes(deltas, priors, (0.1, 0.2)), torch.randn(batch, len(priors), generator=generator) * 3


def compare(found: Matches, slow: Slow, *images: np.ndarray) -> None:
    seen = 0
    for row, (boxes, got) in enumerate(zip(images, faces_of(found), strict=True)):
        expected, undecided = slow(row, boxes)
        decided = [p for p in range(len(got)) if p not in undecided]
        assert [got[p] for p in decided] == [expected[p] for p in decided]
        seen += sum(got[p] >= 0 for p in decided)
    assert seen or not any(map(len, images))


@given(seed=st.integers(0, 2**32 - 1), size_hw=st.sampled_from([(96, 128), *SIZES[2:]]), whole=st.booleans())
@settings(max_examples=25, deadline=None)
def test_atss_equals_plain_loops(seed: int, size_hw: tuple[int, int], whole: bool) -> None:
    rng = np.random.default_rng(seed)
    images = [random_faces(rng, count, size_hw, whole) for count in (rng.integers(0, 4), rng.integers(1, 12))]
    images = [boxes[inside(boxes, size_hw)] for boxes in images]
    found = match_atss(*batch_of(*images), ANCHORS, size_hw)
    compare(found, lambda _, boxes: slow_atss(boxes, size_hw), *images)
    assert found.dropped == 0


@given(seed=st.integers(0, 2**32 - 1), size_hw=st.sampled_from([(96, 128), *SIZES[2:]]), whole=st.booleans())
@settings(max_examples=25, deadline=None)
def test_simota_equals_plain_loops(seed: int, size_hw: tuple[int, int], whole: bool) -> None:
    rng = np.random.default_rng(seed)
    images = [random_faces(rng, count, size_hw, whole) for count in (rng.integers(0, 4), rng.integers(1, 12))]
    images = [boxes[inside(boxes, size_hw)] for boxes in images]
    predicted, difference = predictions(seed % 1000, 2, size_hw)
    found = match_simota(*batch_of(*images), ANCHORS, size_hw, predicted, difference)

    def slow(row: int, boxes: np.ndarray) -> tuple[list[int], Undecided]:
        return slow_simota(boxes, size_hw, predicted[row].numpy(), difference[row].numpy())

    compare(found, slow, *images)


def inside(boxes: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Whether the centres of faces lie in the image, as those of all crops do."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centre > 0) & (centre < size_hw[::-1])).all(axis=1)


def run(kind: str, images: list[np.ndarray], size_hw: tuple[int, int]) -> Matches:
    arguments = *batch_of(*images), ANCHORS, size_hw
    return match_atss(*arguments) if kind == "atss" else match_simota(*arguments, *predictions(1, len(images), size_hw))


@pytest.mark.parametrize("kind", ["atss", "simota"])
def test_the_order_of_faces_does_not_matter(kind: str) -> None:
    rng = np.random.default_rng(3)
    boxes = random_faces(rng, 40, (320, 320), whole=True)
    boxes = boxes[inside(boxes, (320, 320))]
    order = rng.permutation(len(boxes))
    (first,), (second,) = (faces_of(run(kind, [each], (320, 320))) for each in (boxes, boxes[order]))
    assert max(first) > 0
    same = [-1 if face < 0 else int(order[face]) for face in second]
    apart = [prior for prior, (a, b) in enumerate(zip(first, same, strict=True)) if a != b]
    assert all((boxes[first[p]] == boxes[same[p]]).all() for p in apart)  # the same box, labelled twice


@pytest.mark.parametrize("kind", ["atss", "simota"])
def test_every_face_is_trained_however_small(kind: str) -> None:
    """Between the cells no prior's centre lies in them: by the paper's ATSS they would be background."""
    boxes = np.array([[x, x, x + 3, x + 3] for x in (6.5, 70.5, 150.5)], np.float32)
    (found,) = faces_of(run(kind, [boxes], (192, 192)))
    assert {face for face in found if face >= 0} == {0, 1, 2}


@pytest.mark.parametrize("kind", ["atss", "simota"])
def test_images_without_faces_and_impossible_boxes(kind: str) -> None:
    good = plain_faces(0, 6, (128, 128)).boxes
    bad = np.array([[50, 50, 50, 80], [np.nan, 0, 9, 9], [0, 0, np.inf, 9]], np.float32)
    none = np.zeros((0, 4), np.float32)
    found = run(kind, [none, np.concatenate([bad, good]), good], (128, 128))
    rows = faces_of(found)
    assert found.dropped == 3
    assert set(rows[0]) == {-1}
    assert {face for face in rows[1] if face >= 0} <= {3, 4, 5, 6, 7, 8}
    if kind == "atss":  # it asks for nothing that is another in the other image
        assert [face - 3 if face >= 0 else -1 for face in rows[1]] == rows[2]
    empty = run(kind, [none, none], (64, 64))
    assert not empty.positive.any()
    assert empty.positive.shape == (2, ANCHORS.count((64, 64)))


def test_a_prediction_that_is_not_finite_breaks_no_matching() -> None:
    predicted, difference = predictions(0, 1, (128, 128))
    predicted[0, ::3], difference[0, ::5] = torch.nan, torch.nan
    boxes = plain_faces(0, 9, (128, 128)).boxes
    found = match_simota(*batch_of(boxes), ANCHORS, (128, 128), predicted, difference)
    assert found.positive.any()
    assert found.face.max() < len(boxes)


@pytest.mark.parametrize("size_hw", [(32, 32), (640, 32)])
@pytest.mark.parametrize("kind", ["atss", "simota"])
def test_grids_smaller_than_the_region(kind: str, size_hw: tuple[int, int]) -> None:
    boxes = np.array([[3, 4, 20, 25]], np.float32)
    (found,) = faces_of(run(kind, [boxes], size_hw))
    assert set(found) == {-1, 0}


def test_decoding_is_that_of_the_reference() -> None:
    priors = make_priors(ANCHORS, (64, 64))
    deltas = np.random.default_rng(0).normal(0, 3, (len(priors), 4)).astype(np.float32)
    found = decode_boxes(torch.from_numpy(deltas), torch.from_numpy(priors), (0.1, 0.2))
    np.testing.assert_allclose(found, reference.decode_boxes(deltas, priors, (0.1, 0.2)), rtol=1e-5, atol=1e-3)
    huge = decode_boxes(torch.full((len(priors), 4), 1e6), torch.from_numpy(priors), (0.1, 0.2))
    assert huge.isfinite().all()


def slow_iou_loss(a: np.ndarray, b: np.ndarray, complete: bool) -> float:
    """As torchvision.ops.distance_box_iou_loss and complete_box_iou_loss compute it, without their epsilon."""
    iou = iou_of(a, b)
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    apart = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    loss = 1 - iou + apart / diagonal
    if complete:
        shapes = [math.atan((box[2] - box[0]) / (box[3] - box[1])) for box in (b, a)]
        v = 4 / math.pi**2 * (shapes[0] - shapes[1]) ** 2
        loss += v * v / (1 - iou + v) if v else 0
    return loss


@given(seed=st.integers(0, 2**32 - 1), complete=st.booleans())
@settings(max_examples=40, deadline=None)
def test_iou_losses_are_those_of_the_paper(seed: int, complete: bool) -> None:
    rng = np.random.default_rng(seed)
    low = rng.uniform(-50, 50, (2, 20, 2))
    size = np.exp(rng.uniform(0, 4, (2, 20, 2)))
    found, wanted = np.concatenate([low, low + size], axis=2)
    got = iou_loss(torch.from_numpy(found), torch.from_numpy(wanted), complete)
    expected = [slow_iou_loss(a, b, complete) for a, b in zip(found, wanted, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    assert iou_loss(torch.from_numpy(wanted), torch.from_numpy(wanted), complete).abs().max() < 1e-12


def test_gradients_of_the_iou_losses() -> None:
    rng = np.random.default_rng(1)
    found = torch.tensor([[0, 0, 10, 12], [3, 4, 9, 30]], dtype=torch.float64, requires_grad=True)
    wanted = torch.from_numpy(np.array([[2, 1, 11, 11], [40, 4, 60, 20]]) + rng.random((2, 4)))
    assert torch.autograd.gradcheck(lambda boxes: iou_loss(boxes, wanted), found)
    # of CIoU the share is a constant: its gradient is that of DIoU and share times that of the shape
    (complete,) = torch.autograd.grad(iou_loss(found, wanted, complete=True).sum(), found)
    (distance,) = torch.autograd.grad(iou_loss(found, wanted).sum(), found)
    size, other = found[:, 2:] - found[:, :2], wanted[:, 2:] - wanted[:, :2]
    shape = 4 / math.pi**2 * ((other[:, 0] / other[:, 1]).atan() - (size[:, 0] / size[:, 1]).atan()).square()
    iou = torch.tensor([iou_of(a, b) for a, b in zip(found.tolist(), wanted.tolist(), strict=True)])
    share = (shape / (1 - iou + shape)).detach()
    (of_shape,) = torch.autograd.grad((share * shape).sum(), found)
    torch.testing.assert_close(complete, distance + of_shape)


@pytest.mark.parametrize("assign", ["match", "atss", "simota"])
@pytest.mark.parametrize("box", ["smooth_l1", "diou", "ciou"])
def test_every_loss_falls_by_its_own_gradient(assign: str, box: str) -> None:
    spec, size_hw = ModelSpec(anchors=ANCHORS), (128, 160)
    loss = MultiBoxLoss(spec, LossSettings(assign=assign, box=box))
    targets = targets_of(plain_faces(0, 20, size_hw), Faces.none(), plain_faces(1, 3, size_hw))
    heads = heads_for(3, size_hw)
    before = loss(heads, targets, size_hw)
    assert before.total.isfinite()
    gradients = torch.autograd.grad(before.total, heads)
    assert all(each.isfinite().all() and each.any() for each in gradients)
    moved = tuple((head - 0.05 * each).detach() for head, each in zip(heads, gradients, strict=True))
    after = loss(moved, targets, size_hw)  # type: ignore[arg-type]
    assert after.total < before.total
    again = loss(heads, targets, size_hw)
    assert torch.equal(again.total, before.total)


def test_box_terms_are_sums_over_the_positives() -> None:
    spec, size_hw = ModelSpec(), (128, 160)
    targets, heads = targets_of(plain_faces(0, 20, size_hw)), heads_for(1, size_hw)
    priors = make_priors(spec.anchors, size_hw)
    for complete in (False, True):
        loss = MultiBoxLoss(spec, LossSettings(box="ciou" if complete else "diou"))
        matches = loss._match(heads, targets, size_hw)
        boxes = reference.decode_boxes(heads[0][0].detach().numpy(), priors, (0.1, 0.2)).astype(np.float64)
        faces = targets.boxes[0].double().numpy()
        rows = np.flatnonzero(matches.positive[0].numpy())
        expected = sum(slow_iou_loss(boxes[p], faces[matches.face[0, p]], complete) for p in rows) / len(rows)
        assert loss(heads, targets, size_hw).box.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("box", ["smooth_l1", "diou"])
def test_scores_of_faces_are_what_is_trained(box: str) -> None:
    """A face of score s: the cross-entropy is least where the network says s, and box and landmarks count s."""
    spec, size_hw = ModelSpec(), (128, 160)
    faces = plain_faces(0, 8, size_hw)
    halves = Faces(faces.boxes, faces.landmarks, faces.has_landmarks, np.full(len(faces), 0.5, np.float32))
    heads = heads_for(1, size_hw)
    loss = MultiBoxLoss(spec, LossSettings(box=box))
    whole, half = loss(heads, targets_of(faces), size_hw), loss(heads, targets_of(halves), size_hw)
    assert half.box.item() == pytest.approx(whole.box.item() / 2)
    assert half.landmark.item() == pytest.approx(whole.landmark.item() / 2)
    positive = loss._match(heads, targets_of(faces), size_hw).positive
    for difference, sign in ((0.5, 1), (-0.5, -1)):
        logits = torch.zeros_like(heads[1])
        logits[..., 1] = difference
        logits.requires_grad_()
        (gradient,) = torch.autograd.grad(loss((heads[0], logits, heads[2]), targets_of(halves), size_hw).total, logits)
        assert (gradient[positive][:, 1] * sign > 0).all()
    ones = Faces(faces.boxes, faces.landmarks, faces.has_landmarks, np.ones(len(faces), np.float32))
    assert torch.equal(loss(heads, targets_of(ones), size_hw).total, whole.total)
