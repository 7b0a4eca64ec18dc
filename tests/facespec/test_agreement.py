"""What counts as the same face, how far two sides agree, and how disagreements are drawn."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from facespec.agreement import (
    MATCH_IOU,
    Agreement,
    Disagreement,
    Sample,
    draw_disagreements,
    landmark_errors,
    match_faces,
)
from facespec.detections import Detections
from facespec.letterbox import Frame

GREEN, RED = (80, 220, 60), (60, 60, 255)


def _detections(boxes: list[list[float]], scores: list[float], shifts: list[float] | None = None) -> Detections:
    """Faces whose five landmarks lie at the top left corner, each moved along x by its place times a shift."""
    array = np.array(boxes, np.float32).reshape(-1, 4)
    points = np.repeat(array[:, None, :2], 5, axis=1)
    points[..., 0] += np.arange(5) * (np.array(shifts or [0.0] * len(array), np.float32)[:, None])
    return Detections(array, np.array(scores, np.float32), points.astype(np.float32), (480, 640))


def test_half_an_overlap_is_enough() -> None:
    box = np.array([[0, 0, 10, 10]], np.float32)
    assert MATCH_IOU == 0.5
    assert match_faces(box, np.array([[0, 0, 10, 5]], np.float32)).iou.tolist() == [0.5]
    assert len(match_faces(box, np.array([[0, 0, 10, 4.9]], np.float32)).iou) == 0


def test_pairs_are_in_the_order_of_the_reference() -> None:
    reference = np.array([[50, 0, 60, 10], [0, 0, 10, 10], [0, 1, 10, 11]], np.float32)
    candidate = np.array([[0, 1, 10, 11], [50, 0, 60, 9]], np.float32)
    found = match_faces(reference, candidate)  # the third takes what the second overlaps, too
    assert found.reference.tolist() == [0, 2]
    assert found.candidate.tolist() == [1, 0]
    assert found.iou.tolist() == pytest.approx([0.9, 1.0])


def test_landmark_errors_are_means_of_distances() -> None:
    """Of five points, in both directions; a box without an area does no harm."""
    boxes = np.array([[0, 0, 20, 5], [7, 7, 7, 7]], np.float32)  # of size 10, and none
    reference = np.zeros((2, 5, 2), np.float32)
    candidate = np.zeros((2, 5, 2), np.float32)
    candidate[0, 0] = (3, 4)
    candidate[0, 1] = (0, -5)
    assert landmark_errors(boxes, reference, candidate).tolist() == pytest.approx([20.0, 0.0])


def test_agreement_over_images_by_hand() -> None:
    """What each side has alone, what the other has below the score, and which image it is on."""
    agreement = Agreement()
    first = _detections([[0, 0, 10, 10], [50, 0, 60, 10], [90, 0, 100, 10]], [0.9, 0.7, 0.5], [0, 0, 0])
    second = _detections([[0, 0, 10, 10], [50, 0, 60, 10]], [0.6, 0.4], [1.0, 0])
    agreement.add(first, second, 4)
    agreement.add(_detections([], []), _detections([[5, 5, 9, 9]], [0.8]), 6)
    assert (agreement.images, agreement.faces, agreement.candidate_faces) == (2, 3, 2)
    assert agreement.recall == pytest.approx(100 / 3)
    assert agreement.precision == pytest.approx(100 / 2)
    assert agreement.landmarks == pytest.approx([20.0])  # 2 pixels in the mean, of ten
    assert agreement.scores == pytest.approx([0.3])
    assert agreement.unmatched == pytest.approx([0.7, 0.5, 0.8])
    found = {item.text: item for item in agreement.disagreements}
    missed = found["missed: score 0.70, 0.40 on the other side"]
    gone = found["missed: score 0.50, not there on the other side"]
    extra = found["extra: score 0.80, not there on the other side"]
    same = found["landmarks 20.0 %, IoU 1.00"]
    assert (missed.image, missed.box_xyxy) == (4, (50, 0, 60, 10))
    assert (extra.image, extra.box_xyxy) == (6, (5, 5, 9, 9))
    assert same.box_xyxy == (0, 0, 10, 10)
    assert missed.badness == pytest.approx(2000.3)
    assert gone.badness == pytest.approx(2000.5)
    assert extra.badness == pytest.approx(1000.8)
    assert same.badness == pytest.approx(20)
    # the other way round: what was missed is one too many
    turned = Agreement()
    turned.add(second, first)
    assert "extra: score 0.70, 0.40 on the other side" in {item.text for item in turned.disagreements}
    assert turned.recall == 100
    # less overlap is worse
    moved = Agreement()
    moved.add(_detections([[0, 0, 10, 10]], [0.9]), _detections([[0, 0, 10, 8]], [0.9]))
    assert moved.disagreements[0].badness == pytest.approx(20)


def test_a_score_of_ones_own() -> None:
    agreement = Agreement(score=0.8)
    agreement.add(_detections([[0, 0, 10, 10]], [0.9]), _detections([[0, 0, 10, 10]], [0.79]))
    assert (agreement.recall, agreement.precision) == (0, None)
    assert Agreement().score == 0.5


def _picture(disagreements: list[Disagreement], frames: list[Frame], faces: list[list[Detections]]) -> Frame:
    def sample(index: int) -> Sample:
        return Sample(f"image {index}", lambda: frames[index])

    return draw_disagreements(disagreements, [sample(index) for index in range(len(frames))], faces)


def _tiles(picture: Frame, index: int) -> tuple[Frame, Frame]:
    """The two tiles of a disagreement: three beside each other, 224 pixels a tile, 40 for words above it, 8 between."""
    top, left = 8 + index // 3 * 272 + 40, 8 + index % 3 * 464
    return picture[top : top + 224, left : left + 224], picture[top : top + 224, left + 224 : left + 448]


def test_a_disagreement_is_drawn_to_the_pixel() -> None:
    """At a scale of one: the surroundings as they are, both sides' faces in their colours, at their places."""
    frame = np.random.default_rng(0).integers(0, 200, (400, 500, 3), np.uint8)
    box = (205.0, 155.0, 294.6, 205.0)  # 89.6 wide: shown with 224 pixels around it, from (137.8, 68)
    reference = _detections([[200, 100, 260, 160], [205, 155, 294, 205]], [0.9, 0.3])
    candidate = _detections([[210, 120, 270, 170]], [0.9])
    picture = _picture([Disagreement(0, 1.0, "words", box)], [frame], [[reference], [candidate]])
    assert picture.shape == (272 + 8, 3 * 464 + 8, 3)
    left, right = _tiles(picture, 0)
    shift = np.array([[1, 0, -137.8], [0, 1, -68.0]])
    plain = cv2.warpAffine(frame, shift, (224, 224), flags=cv2.INTER_LINEAR)
    for tile, (x1, y1, x2, y2), colour, other in (
        (left, (62, 32, 122, 92), GREEN, RED),
        (right, (72, 52, 132, 102), RED, GREEN),
    ):
        drawn = np.abs(tile.astype(int) - colour).max(axis=2) < 50  # with soft edges
        assert drawn[y1, x1 + 8 : x2].all()
        assert drawn[y2, x1:x2].all()
        assert drawn[y1 + 8 : y2, x1].all()
        assert drawn[y1:y2, x2].all()
        assert drawn[y1, x1]
        assert not (tile == other).all(axis=2).any()
        outside = np.ones((224, 224), bool)
        outside[y1 - 4 : y2 + 5, x1 - 4 : x2 + 5] = False
        np.testing.assert_array_equal(tile[outside], plain[outside])  # and nothing of the face of score 0.3
    assert (picture[8:48, 8:456] > 150).any()  # the words
    assert (picture[:, 8 + 464 :] == 32).all()


def test_small_faces_are_enlarged_and_the_frame_ends_in_grey() -> None:
    frame = np.zeros((16, 16, 3), np.uint8)
    frame[8:, :8] = 200
    nobody = _detections([], [])
    picture = _picture([Disagreement(0, 1.0, "x", (6, 6, 10, 10))], [frame], [[nobody], [nobody]])
    left, right = _tiles(picture, 0)  # 32 pixels around (8, 8), each 7 pixels large
    np.testing.assert_array_equal(left, right)
    for row, column, value in ((60, 60, 0), (60, 160, 0), (160, 60, 200), (160, 160, 0), (30, 112, 64), (200, 112, 64)):
        assert (left[row, column] == value).all()
    # the edges lie between the pixels
    edge = left[140, 64:160, 0].astype(int)
    assert abs(int(np.argmin(np.abs(edge - 100))) + 64 - 112) <= 1


def test_the_worst_come_first_two_of_an_image() -> None:
    """Twelve at most, three in a row."""
    nobody = [_detections([], [])] * 8
    frames = [np.full((64, 64, 3), 20 * index + 40, np.uint8) for index in range(8)]
    box = (24.0, 24.0, 40.0, 40.0)
    items = [Disagreement(image, float(10 * image + number), "x", box) for image in range(8) for number in range(3)]
    picture = _picture(items, frames, [nobody, nobody])
    assert picture.shape == (4 * 272 + 8, 3 * 464 + 8, 3)
    shown = [int(_tiles(picture, index)[0][112, 112, 0]) for index in range(12)]
    assert shown == [20 * (7 - index // 2) + 40 for index in range(12)]
    few = _picture(items[:2] + items[3:5], frames, [nobody, nobody])
    assert few.shape == (2 * 272 + 8, 3 * 464 + 8, 3)
