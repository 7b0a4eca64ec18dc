from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from facespec.boxes import cxcywh_to_xyxy, iou_matrix, make_priors
from facespec.spec import AnchorSpec
from trainer.matching import Matches, Overlaps, assign, match_faces, overlapping_priors

ANCHORS = AnchorSpec()
SIZES = [(640, 640), (320, 512), (97, 131), (33, 640), (8, 8)]


def iou_with_priors(boxes: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """(F, N) by the reference of the project."""
    return iou_matrix(boxes, cxcywh_to_xyxy(make_priors(ANCHORS, size_hw)))


def slow_assign(iou: np.ndarray, boxes: np.ndarray, positive_iou: float = 0.35, ignore_iou: float = 0.2) -> list[int]:
    """The rules in plain loops: the face of each prior, -1 for background."""
    faces, priors = iou.shape
    result = []
    for prior in range(priors):
        best = max(range(faces), key=lambda f: (iou[f, prior], -f), default=-1)
        result.append(best if faces and iou[best, prior] >= np.float32(positive_iou) else -1)
    claims: dict[int, list[int]] = {}
    for face in range(faces):
        best = max(range(priors), key=lambda p: (iou[face, p], -p))
        if iou[face, best] >= np.float32(ignore_iou):
            claims.setdefault(best, []).append(face)
    for prior, claimants in claims.items():
        result[prior] = min(claimants, key=lambda f: (-iou[f, prior], *boxes[f], f))
    return result


def pairs_of(iou: np.ndarray) -> Overlaps:
    face, prior = np.nonzero(iou)
    return Overlaps(torch.from_numpy(face), torch.from_numpy(prior), torch.from_numpy(iou[face, prior]))


def faces_of(matches: Matches) -> list[list[int]]:
    """The face of each prior, -1 for background."""
    return torch.where(matches.positive, matches.face, -1).tolist()


def random_faces(rng: np.random.Generator, count: int, size_hw: tuple[int, int], whole: bool) -> np.ndarray:
    """Faces of all sizes and shapes, some partly or wholly outside the image; whole pixels make many IoUs equal."""
    side = np.exp(rng.uniform(np.log(3), np.log(900), (count, 1)))
    size = side * np.exp(rng.normal(0, rng.choice([0.0, 0.2, 0.7]), (count, 2)))
    centre = rng.uniform(-0.2, 1.2, (count, 2)) * size_hw[::-1]
    if count > 2 and rng.random() < 0.5:  # a crowd on one spot competes for the same priors
        crowd = count // 2
        centre[:crowd] = centre[0] + rng.normal(0, 3, (crowd, 2))
        size[:crowd] = size[0] * rng.uniform(0.8, 1.2, (crowd, 2))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    boxes = (np.round(boxes / 4) * 4 + [0, 0, 4, 4]) if whole else boxes
    return boxes.astype(np.float32)


def match(*images: np.ndarray, size_hw: tuple[int, int] = (640, 640)) -> Matches:
    """Match images of any numbers of faces, padded with boxes that would match if they were looked at."""
    most = max(len(boxes) for boxes in images)
    padded = np.tile(np.array([0, 0, 16, 16], np.float32), (len(images), most, 1))
    valid = np.zeros((len(images), most), bool)
    for row, boxes in enumerate(images):
        padded[row, : len(boxes)], valid[row, : len(boxes)] = boxes, True
    return match_faces(torch.from_numpy(padded), torch.from_numpy(valid), ANCHORS, size_hw)


def box_around(prior: int, size_hw: tuple[int, int] = (640, 640), scale: float = 1.0) -> np.ndarray:
    cx, cy, width, height = make_priors(ANCHORS, size_hw)[prior]
    half = np.array([width, height]) * scale / 2
    return np.array([cx - half[0], cy - half[1], cx + half[0], cy + half[1]], np.float32)


def test_worked_example() -> None:
    iou = np.array(
        [
            [0.81, 0.63, 0.24, 0.10, 0.26, 0.26, 0.98, 0.18, 0.41, 0.44],
            [0.15, 0.80, 0.93, 0.85, 0.91, 0.13, 0.06, 0.69, 0.95, 0.19],
            [0.31, 0.84, 0.12, 0.86, 0.90, 0.14, 0.84, 0.80, 0.85, 0.45],
        ],
        np.float32,
    )
    boxes = np.zeros((3, 4), np.float32)
    positive, face, ignored = assign(pairs_of(iou), torch.from_numpy(boxes), 10, 0.35, 0.2)
    assert torch.where(positive, face, -1).tolist() == [0, 2, 1, 2, 2, -1, 0, 2, 1, 2] == slow_assign(iou, boxes)
    assert ignored == 0


def test_a_prior_at_the_threshold_is_positive() -> None:
    iou = np.array([[0.9, 0.35, 0.349]], np.float32)
    positive, _, _ = assign(pairs_of(iou), torch.zeros(1, 4), 3, 0.35, 0.2)
    assert positive.tolist() == [True, True, False]


@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(2, 30))
@settings(max_examples=120, deadline=None)
def test_rules_equal_plain_loops(seed: int, levels: int) -> None:
    """Few distinct values make ties of every kind."""
    rng = np.random.default_rng(seed)
    faces, priors = rng.integers(0, 7), rng.integers(1, 12)
    iou = (rng.integers(0, levels, (faces, priors)) / np.float32(levels)).astype(np.float32)
    boxes = rng.integers(0, 3, (faces, 4)).astype(np.float32)
    positive, face, ignored = assign(pairs_of(iou), torch.from_numpy(boxes), priors, 0.35, 0.2)
    assert torch.where(positive, face, -1).tolist() == slow_assign(iou, boxes)
    assert ignored == (iou.max(axis=1, initial=0) < np.float32(0.2)).sum()


@pytest.mark.parametrize("size_hw", SIZES)
@pytest.mark.parametrize("iou", [0.05, 0.2, 0.7])
def test_windows_hold_every_pair_and_its_very_iou(size_hw: tuple[int, int], iou: float) -> None:
    rng = np.random.default_rng(0)
    for whole in (False, True):
        boxes = random_faces(rng, 300, size_hw, whole)
        expected = iou_with_priors(boxes, size_hw)
        face, prior, found = (
            part.numpy() for part in overlapping_priors(torch.from_numpy(boxes), ANCHORS, size_hw, iou)
        )
        assert len({*zip(face.tolist(), prior.tolist(), strict=True)}) == len(face)
        np.testing.assert_array_equal(found, expected[face, prior])  # to the bit
        assert (found >= np.float32(iou)).sum() == (expected >= np.float32(iou)).sum()
        assert (found >= np.float32(iou)).mean() > 0.5  # the others cost no more than these


@given(seed=st.integers(0, 2**32 - 1), size_hw=st.sampled_from(SIZES), whole=st.booleans())
@settings(max_examples=25, deadline=None)
def test_matching_equals_the_full_matrix(seed: int, size_hw: tuple[int, int], whole: bool) -> None:
    rng = np.random.default_rng(seed)
    images = [random_faces(rng, count, size_hw, whole) for count in (rng.integers(0, 12), rng.integers(1, 40))]
    matches = match(*images, size_hw=size_hw)
    for boxes, found in zip(images, faces_of(matches), strict=True):
        iou = iou_with_priors(boxes, size_hw)
        # the loops of the rules, where a prior touches a face at all
        touched = np.flatnonzero(iou.max(axis=0, initial=0) > 0)
        expected = np.full(iou.shape[1], -1)
        if len(touched):
            expected[touched] = slow_assign(iou[:, touched], boxes)
        assert found == expected.tolist()
    assert matches.dropped == 0


@pytest.mark.parametrize("stretch", [1.0, 2.0, 4.0])
def test_extreme_shapes_and_places(stretch: float) -> None:
    """The longest boxes an IoU of 0.2 admits, at the edges, corners and between the cells of each level."""
    sides = [16, 32, 64, 128, 256, 512]
    boxes = np.array(
        [
            (x - side * stretch / 2, y - side / 2, x + side * stretch / 2, y + side / 2)
            for side in sides
            for x in (0, 4, 8, 320, 639.5, 640, 700)
            for y in (0, 8.0001, 304, 640)
        ],
        np.float32,
    )
    boxes = np.concatenate([boxes, boxes[:, [1, 0, 3, 2]]])
    iou = iou_with_priors(boxes, (640, 640))
    best = iou.max(axis=1)
    for row, found in enumerate(faces_of(match(*boxes[:, None]))):
        positives = np.flatnonzero(np.array(found) == 0)
        expected = set(np.flatnonzero(iou[row] >= np.float32(0.35)))
        assert set(positives) == (expected | {iou[row].argmax()} if best[row] >= np.float32(0.2) else set())


def test_an_ignored_face_steals_no_prior() -> None:
    """Trap 1: the usual loop gives the prior of a valid face to a tiny one, whose best prior it also is."""
    face = box_around(3000)
    tiny = np.array([*face[:2] + 5, *face[:2] + 9], np.float32)
    iou = iou_with_priors(np.stack([face, tiny]), (640, 640))
    assert iou[1].max() < 0.2
    assert iou[1, 3000] > 0
    matches = match(np.stack([face, tiny]))
    assert matches.face[0, 3000] == 0
    assert matches.positive[0, 3000]
    assert not (matches.positive & (matches.face == 1)).any()
    assert matches.ignored == 1


def test_images_without_a_valid_face_are_all_background() -> None:
    """Trap 2: the usual early return leaves some targets as they were allocated."""
    tiny = np.array([[100, 100, 102, 102]], np.float32)
    matches = match(tiny, np.zeros((0, 4), np.float32), box_around(100)[None])
    assert matches.positive.sum(dim=1).tolist()[:2] == [0, 0]
    assert matches.face[:2].eq(0).all()
    assert matches.positive[2, 100]
    assert not match(np.zeros((0, 4), np.float32)).positive.any()


@pytest.mark.parametrize(
    "bad",
    [
        [50, 50, 50, 80],
        [50, 50, 80, 50],
        [80, 80, 50, 50],
        [80, 50, 50, 80],
        [np.nan, 0, 10, 10],
        [0, 0, np.inf, 10],
        [-np.inf, -np.inf, np.inf, np.inf],
        [np.inf, np.inf, np.inf, np.inf],
        [-3e38, -3e38, 3e38, 3e38],
    ],
)
def test_impossible_boxes_are_dropped_and_counted(bad: list[float]) -> None:
    """Trap 3: a box without area has log(0) as its target."""
    good = np.stack([box_around(5000), box_around(900)])
    matches = match(np.insert(good, 1, bad, axis=0), good)
    assert matches.dropped == 1
    assert matches.ignored == 0
    found = faces_of(matches)
    assert [-1 if face < 0 else [0, 2][face] for face in found[1]] == found[0]


@pytest.mark.parametrize(
    "box", [[-1e18, -1e18, 1e18, 1e18], [3e38, 0, 3.3e38, 1e-3], [1e30, 5, 2e30, 6], [0, 0, 1e-30, 1]]
)
def test_absurd_boxes_are_ignored(box: list[float]) -> None:
    matches = match(np.array([box], np.float32))
    assert (int(matches.dropped), int(matches.ignored)) == (0, 1)
    assert not matches.positive.any()


@pytest.mark.parametrize("scale", [1.0, 1.1])
def test_forced_matches_do_not_depend_on_the_order_of_faces(scale: float) -> None:
    """Trap 7: of two faces that force one prior, the usual loop lets the last one have it."""
    better, worse = box_around(700, scale=scale), box_around(700, scale=1.2)
    mirrored = box_around(700) + np.array([[1, 0, 1, 0], [-1, 0, -1, 0]], np.float32)  # equal IoU: the left one wins
    for boxes, winner in ((np.stack([better, worse]), 0), (mirrored, 1)):
        assert match(boxes).face[0, 700] == winner
        assert match(boxes[::-1]).face[0, 700] == 1 - winner


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_order_of_faces_and_images_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [random_faces(rng, 30, (320, 320), whole=False) for _ in range(2)]
    orders = [rng.permutation(30) for _ in images]
    first = faces_of(match(*images, size_hw=(320, 320)))
    shuffled = [boxes[order] for boxes, order in zip(images, orders, strict=True)]
    second = faces_of(match(*shuffled[::-1], size_hw=(320, 320)))[::-1]
    for order, one, other in zip(orders, first, second, strict=True):
        assert one == [-1 if face < 0 else order[face] for face in other]


def test_other_anchors() -> None:
    anchors = AnchorSpec((4, 32), ((10, 20, 40), (90, 200, 210)))
    rng = np.random.default_rng(1)
    boxes = random_faces(rng, 40, (200, 330), whole=False)
    iou = iou_matrix(boxes, cxcywh_to_xyxy(make_priors(anchors, (200, 330))))
    matches = match_faces(torch.from_numpy(boxes)[None], torch.ones(1, 40, dtype=torch.bool), anchors, (200, 330))
    assert faces_of(matches)[0] == slow_assign(iou, boxes)


@pytest.mark.gpu
def test_gpu_gives_the_same_matches() -> None:
    boxes = random_faces(np.random.default_rng(2), 200, (640, 640), whole=True)
    arguments: list[Tensor] = [torch.from_numpy(boxes).view(4, 50, 4), torch.ones(4, 50, dtype=torch.bool)]
    expected = match_faces(*arguments, ANCHORS, (640, 640))
    found = match_faces(*(part.cuda() for part in arguments), ANCHORS, (640, 640))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other.cpu())
