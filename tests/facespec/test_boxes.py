from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from facespec import boxes as fb
from facespec.boxes import make_priors
from facespec.spec import AnchorSpec, DecodeSpec

PRIORS = make_priors(AnchorSpec(), (64, 96))
VARIANCES = (0.1, 0.2)


def _random_boxes(seed: int, count: int, extent: float = 100.0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, extent, (count, 2))
    return np.concatenate([low, low + rng.uniform(1, extent / 2, (count, 2))], axis=1).astype(np.float32)


@given(st.integers(0, 2**32 - 1))
def test_decoding_undoes_encoding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = _random_boxes(seed, len(PRIORS))
    points = rng.uniform(-50, 150, (len(PRIORS), 5, 2)).astype(np.float32)
    decoded = fb.decode_boxes(fb.encode_boxes(boxes, PRIORS, VARIANCES), PRIORS, VARIANCES)
    np.testing.assert_allclose(decoded, boxes, atol=2e-3)
    decoded = fb.decode_landmarks(fb.encode_landmarks(points, PRIORS, VARIANCES), PRIORS, VARIANCES)
    np.testing.assert_allclose(decoded, points, atol=1e-3)


def test_decoding_by_hand() -> None:
    """One prior of 16 px at (4, 4): centre moves by 0.1 * 16 px a unit, the size grows by exp(0.2 * unit)."""
    prior = np.array([[4, 4, 16, 16]], np.float32)
    box = fb.decode_boxes(np.array([[1, -1, 0, math.log(2) / 0.2]], np.float32), prior, VARIANCES)
    np.testing.assert_allclose(box, [[5.6 - 8, 2.4 - 16, 5.6 + 8, 2.4 + 16]], rtol=1e-6)
    points = fb.decode_landmarks(np.arange(10, dtype=np.float32)[None], prior, VARIANCES)
    np.testing.assert_allclose(points[0], 4 + 1.6 * np.arange(10).reshape(5, 2), rtol=1e-6)


@pytest.mark.parametrize("box", [[1, 1, 1, 5], [1, 1, 5, 1], [5, 1, 1, 5], [1, 5, 5, 1], [1, 1, np.nan, 5]])
def test_encoding_a_box_without_size_is_an_error_not_a_nan(box: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        fb.encode_boxes(np.array([[0, 0, 9, 9], box], np.float32), PRIORS[:2], VARIANCES)


def test_corners_and_centres_by_hand() -> None:
    corners, centres = np.float32([[[1, 2, 5, 10]], [[-3, 0, -1, 1]]]), np.float32([[[3, 6, 4, 8]], [[-2, 0.5, 2, 1]]])
    np.testing.assert_array_equal(fb.xyxy_to_cxcywh(corners), centres)
    np.testing.assert_array_equal(fb.cxcywh_to_xyxy(centres), corners)


def test_an_inverted_box_has_no_area_and_overlaps_nothing() -> None:
    boxes = np.float32([[0, 0, 4, 5], [4, 0, 0, 5], [0, 5, 4, 0], [4, 5, 0, 0], [2, 2, 2, 2]])
    assert fb.box_areas(boxes).tolist() == [20, 0, 0, 0, 0]
    expected = np.zeros((5, 5))
    expected[0, 0] = 1
    np.testing.assert_array_equal(fb.iou_matrix(boxes, boxes), expected)
    assert fb.nms(boxes, 0.4).tolist() == [0, 1, 2, 3, 4]
    assert fb.iou_matrix(boxes, boxes[:0]).shape == (5, 0)


@given(st.integers(0, 2**32 - 1))
def test_iou_equals_counting_pixels(seed: int) -> None:
    """For boxes with whole coordinates IoU is a matter of counting the cells they cover."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 12, (6, 2))
    boxes = np.concatenate([low, low + rng.integers(0, 9, (6, 2))], axis=1)
    masks = []
    for x1, y1, x2, y2 in boxes:
        mask = np.zeros((24, 24), bool)
        mask[y1:y2, x1:x2] = True
        masks.append(mask)
    expected = [[(a & b).sum() / max((a | b).sum(), 1) for b in masks] for a in masks]
    np.testing.assert_allclose(fb.iou_matrix(boxes.astype(np.float32), boxes.astype(np.float32)), expected, atol=1e-6)


def _slow_nms(boxes: NDArray[np.float32], threshold: float) -> list[int]:
    """The definition: keep a box unless a kept one overlaps it by more than the threshold."""
    iou = fb.iou_matrix(boxes, boxes)
    kept: list[int] = []
    for index in range(len(boxes)):
        if all(iou[index, other] <= threshold for other in kept):
            kept.append(index)
    return kept


@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.sampled_from([0.1, 0.4, 0.7]))
def test_nms_equals_its_definition(seed: int, count: int, threshold: float) -> None:
    boxes = _random_boxes(seed, count, 40)
    kept = fb.nms(boxes, threshold)
    assert kept.tolist() == _slow_nms(boxes, threshold)
    assert fb.nms(boxes, threshold, 3).tolist() == kept[:3].tolist()
    # the prefix property, on which raising the score threshold at run time rests
    half = count // 2
    assert fb.nms(boxes[:half], threshold).tolist() == [index for index in kept.tolist() if index < half]


def test_nms_keeps_at_the_threshold_and_drops_above_it() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 4], [0, 0, 10, 4.01]], np.float32)
    assert fb.nms(boxes, 0.4).tolist() == [0, 1]
    assert fb.nms(boxes[[0, 2]], 0.4).tolist() == [0]


@given(hnp.arrays(np.float32, 20, elements=st.floats(-200, 200, width=32)))
def test_sigmoid(logits: NDArray[np.float32]) -> None:
    expected = [math.exp(x) / (1 + math.exp(x)) for x in logits.astype(float)]
    np.testing.assert_allclose(fb.sigmoid(logits), expected, rtol=1e-5, atol=1e-45)


def _heads(seed: int, levels: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    count = len(PRIORS)
    logits = rng.normal(0, 2, (count, 2)).astype(np.float32)
    if levels:
        logits = np.round(logits * levels) / levels  # many ties
    return rng.normal(0, 1, (count, 4)).astype(np.float32), logits, rng.normal(0, 1, (count, 10)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2]), st.sampled_from([1, 10, 5000]))
def test_decode_detections_equals_its_definition(seed: int, levels: int, top_k: int) -> None:
    """Against one face after another in float64."""
    decode = DecodeSpec(score_threshold=0.3, top_k=top_k, max_detections=20)
    boxes, logits, landmarks = _heads(seed, levels)
    found = fb.decode_detections(boxes, logits, landmarks, PRIORS, decode)
    difference = logits[:, 1] - logits[:, 0]
    order = sorted((-d, i) for i, d in enumerate(difference.tolist()) if d >= np.float32(decode.logit_threshold))
    candidates = [i for _, i in order[:top_k]]
    decoded = {}
    for i in candidates:
        cx, cy, w, h = PRIORS[i].astype(float)
        dx, dy, dw, dh = boxes[i].astype(float)
        cx, cy, w, h = cx + dx * 0.1 * w, cy + dy * 0.1 * h, w * math.exp(0.2 * dw), h * math.exp(0.2 * dh)
        decoded[i] = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    kept: list[int] = []
    for i in candidates:
        if len(kept) < 20 and all(fb.iou_matrix(decoded[i][None], decoded[k][None])[0, 0] <= 0.4 for k in kept):
            kept.append(i)
    assert found.num_candidates == len(order)
    assert found.prior_index.tolist() == kept
    np.testing.assert_allclose(found.boxes, np.array([decoded[i] for i in kept]).reshape(-1, 4), atol=1e-3)
    np.testing.assert_allclose(found.scores, 1 / (1 + np.exp(-difference[kept])), rtol=1e-5)
    centre, side = PRIORS[kept, None, :2].astype(float), PRIORS[kept, None, 2:].astype(float)
    points = centre + landmarks[kept].astype(float).reshape(-1, 5, 2) * 0.1 * side
    np.testing.assert_allclose(found.landmarks, points, atol=1e-3)
    assert (found.boxes.dtype, found.scores.dtype, found.landmarks.dtype) == (np.float32,) * 3
    assert found.prior_index.dtype == np.int64


def test_a_face_at_exactly_the_threshold_is_kept() -> None:
    boxes, logits, landmarks = _heads(0)
    logits[:] = (0, -1e-6)
    logits[3] = (7, 7)
    found = fb.decode_detections(boxes, logits, landmarks, PRIORS, DecodeSpec(score_threshold=0.5))
    assert (found.prior_index.tolist(), found.num_candidates, found.scores.tolist()) == ([3], 1, [0.5])


def test_a_size_that_overflows_is_not_finite_and_raises_no_warning() -> None:
    boxes, logits, landmarks = _heads(0)
    logits[:] = (9, -9)
    logits[3] = (-9, 9)
    boxes[3, 2:] = 1e4
    found = fb.decode_detections(boxes, logits, landmarks, PRIORS, DecodeSpec())
    assert found.prior_index.tolist() == [3]
    assert not np.isfinite(found.boxes).any()
    assert np.isfinite(found.landmarks).all()


def test_softmax_saturates_but_the_order_does_not() -> None:
    """Two faces whose float32 probabilities are both 1: the one with the larger difference of logits comes first."""
    boxes, logits, landmarks = _heads(0)
    logits[:] = (5, -5)
    logits[10], logits[50] = (-20, 20), (-30, 30)
    found = fb.decode_detections(boxes, logits, landmarks, PRIORS, DecodeSpec())
    assert found.scores.tolist() == [1, 1]
    assert found.prior_index.tolist() == [50, 10]


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_reported(part: int, value: float) -> None:
    heads = _heads(0)
    heads[part][7, 1] = value
    found = fb.decode_detections(*heads, PRIORS, DecodeSpec())
    assert found.num_candidates == -1
    assert len(found.scores) == 0


def test_no_face() -> None:
    boxes, logits, landmarks = _heads(0)
    logits[:] = (9, -9)
    found = fb.decode_detections(boxes, logits, landmarks, PRIORS, DecodeSpec())
    assert found.num_candidates == 0
    assert found.boxes.shape == (0, 4)
    assert found.landmarks.shape == (0, 5, 2)
