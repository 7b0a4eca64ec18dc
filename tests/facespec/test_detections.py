from __future__ import annotations

import json
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.transform import SimilarityTransform, warp

from facespec.detections import (
    ARCFACE_LANDMARKS_112,
    LANDMARK_NAMES,
    Detections,
    similarity_transforms,
    to_detections,
)
from facespec.draw import draw_detections
from facespec.errors import FrameError, NonFiniteError
from facespec.letterbox import Letterbox
from facespec.spec import DecodeSpec


def _detections(count: int = 4) -> Detections:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 50, (count, 2))
    boxes = np.concatenate([low, low + 20], axis=1).astype(np.float32)
    scores = np.sort(rng.uniform(0.1, 1, count).astype(np.float32))[::-1].copy()
    landmarks = (low[:, None] + rng.uniform(0, 20, (count, 5, 2))).astype(np.float32)
    return Detections(boxes, scores, landmarks, (100, 90), truncated=True)


def test_indexing() -> None:
    found = _detections()
    assert len(found) == 4
    for index, expected in (
        (slice(1, 3), [1, 2]), (0, [0]), (-1, [3]), ([2, 0], [2, 0]), (found.scores > 2, []), (np.int64(1), [1]),
    ):  # fmt: skip
        part = found[index]
        np.testing.assert_array_equal(part.boxes, found.boxes[expected])
        np.testing.assert_array_equal(part.scores, found.scores[expected])
        np.testing.assert_array_equal(part.landmarks, found.landmarks[expected])
        assert (part.frame_hw, part.truncated) == ((100, 90), True)
    assert [len(face) for face in found] == [1, 1, 1, 1]
    for part in (found[:], found.with_min_score(0)):  # copies, never views
        for name in ("boxes", "scores", "landmarks"):
            assert not np.shares_memory(getattr(part, name), getattr(found, name)), name
    with pytest.raises(IndexError):
        found[4]
    best = found.with_min_score(float(found.scores[1]))
    np.testing.assert_array_equal(best.landmarks, found.landmarks[:2])
    np.testing.assert_array_equal(best.boxes, found.boxes[:2])
    empty = Detections.empty((5, 6))
    assert (len(empty), empty.frame_hw, empty.truncated) == (0, (5, 6), False)
    assert (empty.boxes.dtype, empty.scores.dtype, empty.landmarks.dtype) == (np.float32,) * 3


def test_shapes_must_agree() -> None:
    found = _detections()
    for boxes, scores, landmarks in (
        (found.boxes[:2], found.scores, found.landmarks),
        (found.boxes, found.scores[:2], found.landmarks),
        (found.boxes, found.scores, found.landmarks[:2]),
        (found.boxes[:, :3], found.scores, found.landmarks),
        (found.boxes, found.scores[:, None], found.landmarks),
        (found.boxes, found.scores, found.landmarks.reshape(4, 10)),
    ):
        with pytest.raises(ValueError, match="shapes"):
            Detections(boxes, scores, landmarks, (1, 1))


def test_to_dict_survives_json() -> None:
    found = _detections()
    data = json.loads(json.dumps(found.to_dict()))
    assert (data["width"], data["height"], data["truncated"]) == (90, 100, True)
    np.testing.assert_allclose([face["box"] for face in data["faces"]], found.boxes, atol=0.0051)
    np.testing.assert_allclose([face["score"] for face in data["faces"]], found.scores, atol=1e-6)
    np.testing.assert_allclose([face["landmarks"] for face in data["faces"]], found.landmarks, atol=0.0051)
    for face, box, score, points in zip(data["faces"], found.boxes, found.scores, found.landmarks, strict=True):
        assert face["box"] == [round(float(value), 2) for value in box]  # no more figures than mean something
        assert face["score"] == round(float(score), 6)
        assert face["landmarks"] == [[round(float(x), 2), round(float(y), 2)] for x, y in points]
    assert Detections.empty((5, 6)).to_dict() == {"width": 6, "height": 5, "truncated": False, "faces": []}


@pytest.mark.filterwarnings("ignore")  # supervision's own
@pytest.mark.parametrize("count", [0, 4])
def test_to_supervision_and_back(count: int) -> None:
    found = _detections(count)
    other = found.to_supervision()
    assert len(other) == count
    np.testing.assert_array_equal(other.xyxy, found.boxes)
    np.testing.assert_array_equal(other.confidence, found.scores)
    assert list(other.data["class_name"]) == ["face"] * count
    assert list(other.class_id) == [0] * count
    for theirs, ours in ((other.xyxy, found.boxes), (other.confidence, found.scores)):
        assert not np.shares_memory(theirs, ours)
    np.testing.assert_array_equal(found.to_keypoints().xy.reshape(-1, 5, 2), found.landmarks)
    back = Detections.from_supervision(other[::-1], (100, 90))  # best first again
    assert back.frame_hw == (100, 90)
    np.testing.assert_array_equal(back.boxes, found.boxes)
    np.testing.assert_allclose(back.landmarks, found.landmarks, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_landmarks_are_right_under_the_inference_slicer_of_supervision() -> None:
    """Of a frame in four slices, each of which shows one face at the same place."""
    import supervision

    def callback(image: np.ndarray) -> Any:
        face = Detections(
            np.array([[10, 20, 30, 60]], np.float32),
            np.array([0.9], np.float32),
            np.array([[[12, 30], [28, 30], [20, 40], [14, 50], [26, 50]]], np.float32),
            (image.shape[0], image.shape[1]),
        )
        return face.to_supervision()

    slicer = supervision.InferenceSlicer(callback, slice_wh=(100, 100), overlap_wh=(0, 0), thread_workers=1)
    whole = Detections.from_supervision(slicer(np.zeros((200, 200, 3), np.uint8)), (200, 200))
    corners = {(x, y) for x in (10, 110) for y in (20, 120)}
    assert {(round(x), round(y)) for x, y in whole.boxes[:, :2].tolist()} == corners
    np.testing.assert_allclose(whole.landmarks[:, 2], whole.boxes[:, :2] + [10, 20], atol=1e-3)


def test_boxes_are_cut_at_the_edges_of_the_frame() -> None:
    boxes = np.array([[-1.1, -5, 20, 30], [80, 90, 95, 200], [10, 10, 20, 20]], np.float32)
    found = Detections(boxes, np.array([0.9, 0.8, 0.7], np.float32), np.zeros((3, 5, 2), np.float32), (100, 90), True)
    cut = found.clip()
    assert cut.boxes.tolist() == [[0, 0, 20, 30], [80, 90, 90, 100], [10, 10, 20, 20]]
    assert cut.boxes.dtype == np.float32
    assert (cut.frame_hw, cut.truncated, cut.scores is not None) == ((100, 90), True, True)
    assert found.boxes[0, 0] == np.float32(-1.1)


def test_boxes_grow_by_a_margin_of_their_own_size() -> None:
    found = Detections(
        np.array([[10, 20, 30, 60]], np.float32), np.ones(1, np.float32), np.zeros((1, 5, 2), np.float32), (100, 90)
    )
    assert found.expand(0.25).boxes.tolist() == [[5, 10, 35, 70]]
    assert found.expand(-0.25).boxes.tolist() == [[15, 30, 25, 50]]
    assert found.expand(1).clip().boxes.tolist() == [[0, 0, 50, 90 + 10]]
    for margin in (-0.5, float("nan"), float("inf")):
        with pytest.raises(FrameError, match="the margin of a box"):
            found.expand(margin)


def test_faces_moved_into_a_larger_frame() -> None:
    found = _detections()
    moved = found.moved(7, -3, (500, 400))
    np.testing.assert_allclose(moved.boxes, found.boxes + np.array([7, -3, 7, -3]))
    np.testing.assert_allclose(moved.landmarks, found.landmarks + np.array([7, -3]))
    assert (moved.frame_hw, moved.truncated) == ((500, 400), True)
    assert moved.boxes.dtype == moved.landmarks.dtype == np.float32


def test_draw_is_draw_detections() -> None:
    found, frame = _detections(), np.full((100, 90, 3), 128, np.uint8)
    np.testing.assert_array_equal(found.draw(frame), draw_detections(frame, found))
    assert found.draw(frame, copy=False) is frame


def test_a_face_without_extent_spoils_no_other_crop() -> None:
    landmarks = np.stack([np.array(STANDARD, np.float32), np.full((5, 2), 7, np.float32)] * 2)
    frame = np.random.default_rng(0).integers(1, 255, (112, 112, 3), np.uint8)
    found = Detections(np.zeros((4, 4), np.float32), np.ones(4, np.float32), landmarks, (112, 112))
    assert found.alignable.tolist() == [True, False, True, False]
    assert Detections.empty((5, 5)).alignable.tolist() == []
    crops = found.aligned_crops(frame)
    for index in (0, 2):  # the standard place: the frame itself
        np.testing.assert_allclose(crops[index], frame, atol=1)
    assert not crops[[1, 3]].any()


@pytest.mark.parametrize("size", [0, -1, 4097, 1.5, None])
def test_impossible_sizes_of_crops_are_refused(size: Any) -> None:
    with pytest.raises(FrameError, match="the side of a crop is a number of pixels from 1 to 4096"):
        _detections().aligned_crops(np.zeros((100, 90, 3), np.uint8), size)


@given(st.integers(0, 2**32 - 1))
def test_similarity_transforms_equal_scikit_image(seed: int) -> None:
    from skimage.transform import SimilarityTransform

    rng = np.random.default_rng(seed)
    landmarks = (ARCFACE_LANDMARKS_112 * rng.uniform(0.2, 5) + rng.normal(0, 8, (3, 5, 2))).astype(np.float32)
    for points, matrix in zip(landmarks, similarity_transforms(landmarks, ARCFACE_LANDMARKS_112), strict=True):
        if hasattr(SimilarityTransform, "from_estimate"):  # scikit-image 0.26
            expected = SimilarityTransform.from_estimate(points, ARCFACE_LANDMARKS_112)
        else:
            expected = SimilarityTransform()
            expected.estimate(points, ARCFACE_LANDMARKS_112)
        np.testing.assert_allclose(matrix, expected.params[:2], rtol=1e-4, atol=1e-4)


def test_aligned_crops_undo_a_known_pose() -> None:
    """A face drawn upright at the standard positions, then turned, scaled and moved, comes back upright."""
    rng = np.random.default_rng(0)
    upright = cv2.GaussianBlur(rng.integers(0, 256, (112, 112, 3), np.uint8), (0, 0), 3)
    angle, scale = np.deg2rad(25), 1.7
    pose = np.array(
        [
            [scale * np.cos(angle), -scale * np.sin(angle), 90],
            [scale * np.sin(angle), scale * np.cos(angle), 30],
        ]
    )
    frame = cv2.warpAffine(upright, pose, (320, 320))
    landmarks = (ARCFACE_LANDMARKS_112 @ pose[:, :2].T + pose[:, 2]).astype(np.float32)
    found = Detections(np.zeros((1, 4), np.float32), np.ones(1, np.float32), landmarks[None], (320, 320))
    crop = found.aligned_crops(frame)[0]
    assert crop.shape == (112, 112, 3)
    assert np.abs(crop[8:-8, 8:-8].astype(int) - upright[8:-8, 8:-8]).mean() < 2
    assert found.aligned_crops(frame, 224).shape == (1, 224, 224, 3)
    assert Detections.empty((320, 320)).aligned_crops(frame).shape == (0, 112, 112, 3)


def test_landmarks_on_one_point_cannot_be_aligned() -> None:
    with pytest.raises(FrameError, match="one point"):
        similarity_transforms(np.ones((1, 5, 2), np.float32), ARCFACE_LANDMARKS_112)


def test_drawing_marks_the_box_and_leaves_the_frame_alone() -> None:
    frame = np.zeros((100, 90, 3), np.uint8)
    found = _detections()
    canvas = draw_detections(frame, found)
    assert not frame.any()
    x1, y1, _, y2 = np.rint(found.boxes[0]).astype(int)
    assert canvas[y1 + 3 : y2 - 3, x1].any(axis=1).all()
    far = Detections(np.array([[-1e9, -1e9, 1e9, 1e9]], np.float32), np.ones(1, np.float32),
                     np.full((1, 5, 2), 1e9, np.float32), (100, 90))  # fmt: skip
    assert draw_detections(frame, far).shape == frame.shape


def test_drawing_on_the_frame_itself_gives_the_same_picture() -> None:
    frame, found = np.full((100, 90, 3), 7, np.uint8), _detections()
    expected = draw_detections(frame, found)
    sealed = frame.copy()
    sealed.flags.writeable = False
    assert np.array_equal(draw_detections(sealed, found, copy=False), expected)
    assert (sealed == 7).all()  # what cannot be written to is copied
    assert draw_detections(frame, found, copy=False) is frame
    assert np.array_equal(frame, expected)


@pytest.mark.parametrize(
    "frame",
    [np.full((64, 64), 200, np.uint8), np.full((64, 64, 4), 200, np.uint8), np.full((64, 64, 3), 200.0, np.float32)],
)
def test_crops_of_other_frames_are_refused(frame: np.ndarray) -> None:
    with pytest.raises(FrameError, match="uint8"):
        _detections().aligned_crops(frame)


def test_crops_of_another_frame_are_refused() -> None:
    with pytest.raises(FrameError, match=r"found in a frame of \(100, 90\)"):
        _detections().aligned_crops(np.zeros((50, 45, 3), np.uint8))


def _network_rows(**changes: object) -> dict[str, Any]:
    rows = {
        "box": Letterbox.fit((100, 90), (64, 64)),
        "decode": DecodeSpec(top_k=10, max_detections=3),
        "score_threshold": 0.5,
        "num_detections": 3,
        "boxes": np.ones((3, 4), np.float32),
        "scores": np.array([0.9, 0.8, 0.4], np.float32),
        "landmarks": np.ones((3, 5, 2), np.float32),
        "num_candidates": 3,
    }
    return {**rows, **changes}


@pytest.mark.parametrize(
    ("changes", "truncated"),
    [
        ({}, False),  # the limit of 3 is met, but the third face lies below the threshold
        ({"score_threshold": 0.4}, True),
        ({"num_candidates": 11}, False),
        ({"num_candidates": 11, "num_detections": 2}, True),
        ({"num_candidates": 10, "num_detections": 2}, False),
    ],
)
def test_truncated_means_that_faces_over_the_threshold_may_be_missing(changes: dict[str, Any], truncated: bool) -> None:
    assert to_detections(**_network_rows(**changes)).truncated == truncated


def test_network_rows_become_faces_of_the_frame() -> None:
    scores = np.array([0.9, 0.7, 0.70001], np.float32)
    found = to_detections(**_network_rows(scores=scores))
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.7], abs=1e-6)
    assert (np.diff(found.scores) <= 0).all()
    np.testing.assert_allclose(found.boxes, 100 / 64, rtol=0.02)
    for changes in ({"num_candidates": -1}, {"boxes": np.full((3, 4), np.nan, np.float32)},
                    {"landmarks": np.full((3, 5, 2), np.inf, np.float32)}):  # fmt: skip
        with pytest.raises(NonFiniteError):
            to_detections(**_network_rows(**changes))


def test_rows_lie_in_the_frame_each_axis_by_its_own_factor() -> None:
    """Scaled down to 1/2 along x and to 1/4 along y; rows that are not valid, or under the threshold, do not matter."""
    box = Letterbox((400, 200), (100, 100), (128, 160))
    boxes = np.array([[1, 2, 3, 4], [-5, 6, 7, 8], [np.nan] * 4, [np.inf] * 4], np.float32)
    landmarks = np.arange(40, dtype=np.float32).reshape(4, 5, 2)
    landmarks[2:] = np.nan
    scores = np.array([0.9, 0.5, 0.4, 0.95], np.float32)
    rows = _network_rows(box=box, boxes=boxes, landmarks=landmarks, scores=scores)
    found = to_detections(**{**rows, "decode": DecodeSpec(max_detections=4)})
    np.testing.assert_array_equal(found.boxes, [[2, 8, 6, 16], [-10, 24, 14, 32]])
    np.testing.assert_array_equal(found.landmarks, landmarks[:2] * [2, 4])
    np.testing.assert_array_equal(found.scores, scores[:2])  # one at exactly the threshold stays
    assert found.frame_hw == (400, 200)
    before = scores.copy()
    for name, array in (("boxes", boxes), ("scores", scores), ("landmarks", landmarks)):
        assert not np.shares_memory(getattr(found, name), array)
    np.testing.assert_array_equal(scores, before)
    none = to_detections(**_network_rows(num_detections=0, num_candidates=0))
    assert (len(none), none.boxes.shape, none.landmarks.shape, none.truncated) == (0, (0, 4), (0, 5, 2), False)
    with pytest.raises(NonFiniteError):
        to_detections(**_network_rows(num_detections=0, num_candidates=-1))


def test_the_order_of_the_landmarks_is_what_it_is_called() -> None:
    """In the standard face: eyes above the nose above the mouth, left is left in the image."""
    assert LANDMARK_NAMES == ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
    at = dict(zip(LANDMARK_NAMES, ARCFACE_LANDMARKS_112.tolist(), strict=True))
    assert at["left_eye"][0] < at["nose"][0] < at["right_eye"][0]
    assert at["left_mouth"][0] < at["nose"][0] < at["right_mouth"][0]
    assert at["left_eye"][1] < at["nose"][1] < at["left_mouth"][1]


def test_labels_cover_no_other_face() -> None:
    """Two faces, one right above the other: the label of the lower one would lie on the upper one."""
    frame = np.zeros((300, 200, 3), np.uint8)
    boxes = np.array([[50, 60, 130, 140], [50, 145, 130, 225]], np.float32)
    both = Detections(boxes, np.array([0.8, 0.9], np.float32), np.full((2, 5, 2), -9, np.float32), (300, 200))
    plain, drawn = draw_detections(frame, both, labels=False), draw_detections(frame, both)
    changed = np.argwhere((plain != drawn).any(axis=2))
    assert len(changed)
    assert changed[:, 0].max() <= 60


def test_repr_is_one_line() -> None:
    assert repr(_detections()) == "Detections(4 faces in a frame of 90x100, truncated)"
    assert repr(Detections.empty((3, 4))) == "Detections(0 faces in a frame of 4x3)"


# faces aligned for recognition

STANDARD = [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
"""As insightface publishes it (utils/face_align.py, arcface_dst)."""


def _aligned_crops(frame: np.ndarray, landmarks: np.ndarray, size: int = 112) -> np.ndarray:
    boxes, scores = np.zeros((len(landmarks), 4), np.float32), np.zeros(len(landmarks), np.float32)
    return Detections(boxes, scores, landmarks, (frame.shape[0], frame.shape[1])).aligned_crops(frame, size)


def _ramp(height: int, width: int) -> np.ndarray:
    """A picture that is linear in x and y, so that bilinear interpolation of it is exact: B = x, G = y, R = x + y."""
    y, x = np.indices((height, width))
    return np.stack([x, y, (x + y) // 2], axis=2).astype(np.uint8)


def test_the_standard_positions_are_the_published_ones() -> None:
    np.testing.assert_array_equal(ARCFACE_LANDMARKS_112, np.array(STANDARD, np.float32))


@pytest.mark.parametrize("size", [112, 224, 56])
def test_a_crop_holds_the_landmarks_at_the_standard_positions_of_its_size(size: int) -> None:
    """Read off a ramp, whose colour tells where a pixel came from: a face of half of a crop's size, turned by 90°."""
    frame = _ramp(200, 240)
    standard = np.array(STANDARD)
    centred = (standard - 56) / 2
    turned = np.stack([-centred[:, 1], centred[:, 0]], axis=1)
    places = np.array([[120, 90], [70, 120]])  # x, y of two faces
    landmarks = (turned[None] + places[:, None]).astype(np.float32)
    crops = _aligned_crops(frame, landmarks, size)
    assert crops.shape == (2, size, size, 3)
    assert crops.dtype == np.uint8
    for crop, (x, y) in zip(crops.astype(float), places, strict=True):
        at = np.rint(standard * size / 112).astype(int)
        back = (at * 112 / size - 56) / 2
        np.testing.assert_allclose(crop[at[:, 1], at[:, 0], 0], x - back[:, 1], atol=0.6)
        np.testing.assert_allclose(crop[at[:, 1], at[:, 0], 1], y + back[:, 0], atol=0.6)


def test_pixels_are_interpolated_and_what_lies_outside_is_black() -> None:
    """Against scikit-image, on a coarse picture that is enlarged eight times, and lies partly outside."""
    frame = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    landmarks = (np.array(STANDARD, np.float32) / 8 - 2)[None]
    crop = _aligned_crops(frame, landmarks)[0]
    transform = SimilarityTransform(scale=8, translation=(16, 16))
    expected = warp(frame, transform.inverse, order=1, output_shape=(112, 112), preserve_range=True)
    assert np.abs(crop - expected).mean() < 2  # cv2's weights have five bits
    assert not crop[:7].any()
    assert not crop[:, :7].any()
    assert crop[20:100, 20:].any(axis=2).all()


def test_one_face_of_several_without_extent_is_refused() -> None:
    landmarks = np.stack([np.array(STANDARD, np.float32), np.full((5, 2), 7, np.float32)])
    for order in (slice(None), slice(None, None, -1)):
        with pytest.raises(FrameError, match="one point"):
            similarity_transforms(landmarks[order], ARCFACE_LANDMARKS_112)


def test_a_crop_of_what_is_no_frame_is_refused() -> None:
    landmarks = np.array(STANDARD, np.float32)[None]
    for frame in (np.zeros((99, 99), np.uint8), np.zeros((99, 99, 3), np.float32)):
        with pytest.raises(FrameError, match="uint8"):
            _aligned_crops(frame, landmarks)
    assert _aligned_crops(np.zeros((99, 99, 3), np.uint8), landmarks[:0]).shape == (0, 112, 112, 3)


def _outputs(count: int, value: float = 10.0) -> dict[str, Any]:
    random = np.random.default_rng(count)
    return {
        "num_detections": count,
        "boxes": (value * random.uniform(1, 2, (count, 4))).astype(np.float32),
        "scores": np.linspace(0.9, 0.6, count, dtype=np.float32),
        "landmarks": (value * random.uniform(1, 2, (count, 5, 2))).astype(np.float32),
        "num_candidates": count,
    }


def test_a_crowd_is_scaled_to_the_last_face() -> None:
    """More faces than the factors that are kept for a size are enough for."""
    box, outputs = Letterbox((300, 200), (96, 64), (96, 96)), _outputs(700)
    found = to_detections(box, DecodeSpec(), 0.5, **outputs)
    factors = np.array([200 / 64, 300 / 96])
    np.testing.assert_allclose(found.boxes, outputs["boxes"] * np.tile(factors, 2), rtol=1e-6)
    np.testing.assert_allclose(found.landmarks, outputs["landmarks"] * factors, rtol=1e-6)


def test_large_values_are_finite() -> None:
    outputs = _outputs(3, value=1e30)
    assert len(to_detections(Letterbox.pad((64, 64)), DecodeSpec(), 0.5, **outputs)) == 3
    for name, at in (("boxes", (2, 3)), ("landmarks", (0, 4, 1))):
        for value in (np.nan, np.inf, -np.inf):
            spoilt = {**outputs, name: outputs[name].copy()}
            spoilt[name][at] = value
            with pytest.raises(NonFiniteError):
                to_detections(Letterbox.pad((64, 64)), DecodeSpec(), 0.5, **spoilt)
