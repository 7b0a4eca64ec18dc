"""What is drawn, seen in the pixels."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from facespec.detections import Detections
from facespec.draw import BOX_COLOUR, LANDMARK_COLOURS, draw_detections

GREY = 128


def _faces(*boxes: tuple[float, float, float, float], frame_hw: tuple[int, int] = (400, 500)) -> Detections:
    """Faces, the best first, with the landmarks in a cross around the middle."""
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    middle, side = (corners[:, :2] + corners[:, 2:]) / 2, (corners[:, 2:] - corners[:, :2]) / 4
    around = np.array([[-1, -1], [1, -1], [0, 0], [-1, 1], [1, 1]])
    landmarks = (middle[:, None] + side[:, None] * around).astype(np.float32)
    scores = np.linspace(0.99, 0.61, max(len(corners), 2)).astype(np.float32)[: len(corners)]
    return Detections(corners, scores, landmarks, frame_hw)


def _draw(faces: Detections, **options: bool) -> np.ndarray:
    return draw_detections(np.full((*faces.frame_hw, 3), GREY, np.uint8), faces, **options)


def _changed(a: np.ndarray, b: np.ndarray) -> tuple[int, int, int, int]:
    """Return x1, y1, x2, y2 of the pixels that differ, ends included."""
    rows, columns = np.nonzero((a != b).any(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def test_a_face_has_a_box_and_five_points_of_their_colours() -> None:
    faces = _faces((100, 60, 200, 220))
    canvas = _draw(faces, labels=False)
    for y, x in ((60, 150), (220, 150), (140, 100), (140, 200)):  # all four sides
        assert canvas[y, x].tolist() == list(BOX_COLOUR), (x, y)
    for (x, y), colour in zip(faces.landmarks[0].astype(int).tolist(), LANDMARK_COLOURS, strict=True):
        assert canvas[y, x].tolist() == list(colour)
        assert canvas[y, x + 3].tolist() == list(colour)  # a disc of 160 // 50 pixels
        assert (canvas[y, x + 6] == GREY).all()
    assert len({*LANDMARK_COLOURS, BOX_COLOUR}) == 6
    outside = canvas.copy()
    outside[56:225, 96:205] = GREY
    assert (outside == GREY).all()
    assert (canvas[70:90, 110:190] == GREY).all()  # nothing is filled


@pytest.mark.parametrize(("height", "width"), [(60, 1), (159, 1), (160, 2), (239, 2), (240, 3), (400, 4), (440, 4)])
def test_lines_follow_the_size_of_the_face(height: int, width: int) -> None:
    """A pixel for every 80 of height, from one to four."""
    canvas = _draw(_faces((100, 5, 300, 5 + height), frame_hw=(460, 500)), labels=False)
    expected = np.full_like(canvas, GREY)
    cv2.rectangle(expected, (100, 5), (300, 5 + height), BOX_COLOUR, width, cv2.LINE_AA)
    np.testing.assert_array_equal(canvas[:, 90:110], expected[:, 90:110])
    assert (expected[:, 90:110] != GREY).any()


def test_lines_are_seen_in_large_pictures() -> None:
    for frame_hw, width in (((540, 700), 1), ((1080, 1920), 2), ((2160, 3840), 4), ((3840, 2160), 4)):
        faces = _faces((100, 100, 130, 139), frame_hw=frame_hw)
        row = _draw(faces, labels=False)[120, 80:112]  # across the left side
        assert (row == np.array(BOX_COLOUR)).all(axis=1).sum() == pytest.approx(width, abs=1)


def test_a_small_face_has_points_of_one_pixel_and_no_label() -> None:
    for height, small in ((39, True), (40, False)):
        faces = _faces((100, 100, 130, 100 + height))
        canvas, plain = _draw(faces), _draw(faces, labels=False)
        assert np.array_equal(canvas, plain) == small
        x, y = np.rint(faces.landmarks[0, 2]).astype(int)
        assert canvas[y, x].tolist() == list(LANDMARK_COLOURS[2])
        assert (canvas[y, x + 1] == GREY).all() == small
    corner = _faces((-15, -15, 15, 15), (490, 380, 510, 410))  # points beyond every edge
    canvas = _draw(corner)
    assert canvas[8, 8].tolist() == list(LANDMARK_COLOURS[4])
    assert (canvas[-20:, -20:] != GREY).any()
    assert (canvas[380:, :15] == GREY).all()  # an index below 0 is no pixel of the other side
    assert (canvas[:15, 480:] == GREY).all()


def test_the_better_face_is_drawn_over_the_weaker_one() -> None:
    faces = _faces((100, 100, 200, 200), (100, 100, 200, 200))
    moved = faces.landmarks.copy()
    moved[1] = moved[0, ::-1]  # the weaker one's nose lies where the better one's does; the others are exchanged
    canvas = _draw(Detections(faces.boxes, faces.scores, moved, faces.frame_hw), labels=False)
    for (x, y), colour in zip(moved[0].astype(int).tolist(), LANDMARK_COLOURS, strict=True):
        assert canvas[y, x].tolist() == list(colour)


def test_a_label_stands_above_its_box_or_inside_where_there_is_no_room() -> None:
    for top, above in ((100, True), (4, False)):
        faces = _faces((120, top, 320, top + 200))
        x1, y1, x2, y2 = _changed(_draw(faces), _draw(faces, labels=False))
        assert x1 >= 119
        assert x2 < 320
        if above:
            assert y2 <= top
            assert y1 < top - 10
        else:
            assert y1 >= 0
            assert 10 < y2 < 40
        canvas = _draw(faces)
        assert (canvas[y1 + 2 : y2 - 1, x1 + 2 : x2 - 1].min(axis=2) < 40).any()  # the figures are black
        assert (canvas[y1 + 1, x1 + 1 : x2] == BOX_COLOUR).all()


def test_a_label_stays_within_the_frame() -> None:
    for box, side in (((480, 100, 560, 300), "right"), ((-90, 100, 60, 300), "left")):
        faces = _faces(box)
        x1, _, x2, _ = _changed(_draw(faces), _draw(faces, labels=False))
        assert x1 == 0 if side == "left" else x2 >= 498
        assert x2 - x1 > 20


def test_the_label_of_the_better_face_wins_its_place() -> None:
    """Two boxes whose labels would overlap: that of the better face stays. Apart, both have one."""
    near, apart = ((100, 100, 130, 300), (135, 100, 165, 300)), ((20, 100, 220, 300), (250, 100, 450, 300))
    for boxes in (near, near[::-1]):
        both, only = _faces(*boxes), _faces(boxes[0])
        changed = _changed(_draw(both), _draw(both, labels=False))
        assert abs(changed[0] - boxes[0][0]) <= 1
        assert changed == _changed(_draw(only), _draw(only, labels=False))
    faces = _faces(*apart)
    x1, _, x2, _ = _changed(_draw(faces), _draw(faces, labels=False))
    assert x1 <= 20
    assert x2 > 250


def test_the_label_says_the_score_in_two_figures() -> None:
    def label(score: float) -> np.ndarray:
        faces = _faces((100, 100, 300, 300))
        return _draw(Detections(faces.boxes, np.float32([score]), faces.landmarks, faces.frame_hw))[:101]

    assert np.array_equal(label(0.871), label(0.869))
    assert not np.array_equal(label(0.871), label(0.861))


def test_faces_far_outside_are_clipped_not_wrapped() -> None:
    faces = _faces((-1e9, 50, 250, 1e9), (100, -1e9, 1e9, 300))
    canvas = _draw(faces, labels=False)
    assert canvas[200, 250].tolist() == list(BOX_COLOUR)
    assert canvas[300, 400].tolist() == list(BOX_COLOUR)


def test_no_faces_no_change() -> None:
    assert (_draw(_faces()) == GREY).all()


@pytest.mark.parametrize("options", [{}, {"copy": True}, {"copy": False}])
def test_the_callers_frame_is_drawn_on_only_if_it_asks_for_that(options: dict[str, bool]) -> None:
    frame = np.full((400, 500, 3), GREY, np.uint8)
    drawn = draw_detections(frame, _faces((100, 100, 200, 220)), **options)
    assert (drawn != GREY).any()
    assert (frame is drawn) == (frame != GREY).any() == (options.get("copy") is False)
