from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facespec.errors import DataError
from trainer.average_precision import LEVELS, ImageTruth, average_precision, load_ground_truth

Scene = tuple[dict[tuple[str, str], np.ndarray], dict[tuple[str, str], ImageTruth]]


def _scene(seed: int, images: int = 4, integer: bool = True) -> Scene:
    """Faces, detections near some of them (now and then several for one), and false detections; scores have ties."""
    rng = np.random.default_rng(seed)
    predictions, truth = {}, {}
    for index in range(images):
        faces = np.column_stack([rng.uniform(0, 200, (5, 2)), rng.uniform(0, 60, (5, 2))])[: rng.integers(0, 6)]
        near = np.repeat(faces, rng.integers(0, 3, len(faces)), axis=0)
        near = near + rng.normal(0, 3, near.shape)
        far = np.column_stack([rng.uniform(0, 200, (3, 2)), rng.uniform(1, 60, (3, 2))])
        boxes = np.concatenate([near, far])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], 0)
        if integer:
            faces, boxes = np.trunc(faces), np.trunc(boxes)
        scores = np.sort(rng.integers(1, 30, len(boxes)) / rng.choice([30, 37]))[::-1]
        key = ("event", f"image_{index}")
        if rng.random() < 0.85:
            predictions[key] = np.column_stack([boxes, scores])
        share = {"easy": 0.3, "medium": 0.6, "hard": 0.9}
        truth[key] = ImageTruth(faces, {level: rng.random(len(faces)) < share[level] for level in LEVELS})
    return predictions, truth


def _customary(predictions: dict, truth: dict, level: str) -> float:
    """The protocol of the WIDER FACE kit, one detection and one threshold at a time."""
    rows = [row for key in truth for row in predictions.get(key, [])]
    low, high = min([1.0, *(row[4] for row in rows)]), max([0.0, *(row[4] for row in rows)])
    table = [[0, 0] for _ in range(1000)]
    faces = 0
    for key, image in truth.items():
        faces += int(image.counted[level].sum())
        detections = predictions.get(key, [])
        if not len(detections) or not len(image.boxes_xywh):
            continue
        found: set[int] = set()
        recalled, proposed = [], []  # running counts
        proposals = 0
        for x, y, w, h, _ in detections:
            overlaps = []
            for gx, gy, gw, gh in image.boxes_xywh:
                iw = min(x + w, gx + gw) - max(x, gx) + 1
                ih = min(y + h, gy + gh) - max(y, gy) + 1
                inter = iw * ih if iw > 0 and ih > 0 else 0
                overlaps.append(inter / ((w + 1) * (h + 1) + (gw + 1) * (gh + 1) - inter) if inter else 0.0)
            best = max(range(len(overlaps)), key=lambda g: (overlaps[g], -g))
            if overlaps[best] >= 0.5 and not image.counted[level][best]:
                pass  # an ignored face: the detection does not count at all
            else:
                proposals += 1
                if overlaps[best] >= 0.5:
                    found.add(best)
            recalled.append(len(found))
            proposed.append(proposals)
        for t in range(1000):
            last = -1
            for index, row in enumerate(detections):
                if (row[4] - low) / (high - low) >= 1 - (t + 1) / 1000:
                    last = index
            if last >= 0:
                table[t][0] += proposed[last]
                table[t][1] += recalled[last]
    if not faces:
        return math.nan
    recall = [0.0, *(r / faces for _, r in table), 1.0]
    precision = [0.0, *(r / p if p else 0.0 for p, r in table), 0.0]
    for index in range(len(precision) - 1, 0, -1):
        precision[index - 1] = max(precision[index - 1], precision[index])
    return sum((recall[i + 1] - recall[i]) * precision[i + 1] for i in range(len(recall) - 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_equals_the_customary_evaluation(seed: int, integer: bool) -> None:
    predictions, truth = _scene(seed, integer=integer)
    curves = average_precision(predictions, truth)
    for level in LEVELS:
        np.testing.assert_allclose(curves[level].ap, _customary(predictions, truth, level), rtol=0, atol=1e-12)
        assert curves[level].faces == sum(int(image.counted[level].sum()) for image in truth.values())


def test_order_of_detections_does_not_matter() -> None:
    predictions, truth = _scene(3, images=12)
    # equal scores keep their order, so make them distinct
    distinct = {
        key: np.column_stack([rows[:, :4], np.linspace(0.9, 0.1, len(rows))]) for key, rows in predictions.items()
    }
    shuffled = {key: np.random.default_rng(0).permutation(rows) for key, rows in distinct.items()}
    expected, found = average_precision(distinct, truth), average_precision(shuffled, truth)
    assert [found[level].ap for level in LEVELS] == [expected[level].ap for level in LEVELS]


def test_perfect_and_empty_predictions() -> None:
    _, truth = _scene(5, images=12)
    perfect = {
        key: np.column_stack([image.boxes_xywh, np.linspace(1, 0.5, len(image.boxes_xywh))])
        for key, image in truth.items()
    }
    assert [curve.ap for curve in average_precision(perfect, truth).values()] == [1, 1, 1]
    assert [curve.ap for curve in average_precision({}, truth).values()] == [0, 0, 0]
    same = {
        key: np.column_stack([image.boxes_xywh, np.full(len(image.boxes_xywh), 0.7)]) for key, image in truth.items()
    }
    assert [curve.ap for curve in average_precision(same, truth).values()] == [1, 1, 1]
    nobody = {
        key: ImageTruth(i.boxes_xywh, {level: i.counted[level] & False for level in LEVELS}) for key, i in truth.items()
    }
    assert all(math.isnan(curve.ap) for curve in average_precision(perfect, nobody).values())


@pytest.mark.data
def test_official_ground_truth(widerface: Path) -> None:
    """Counts published with the data set's evaluation: 3226 images, 7211, 13319 and 31958 faces."""
    truth = load_ground_truth(widerface / "gt")
    assert len(truth) == 3226
    faces = [sum(int(image.counted[level].sum()) for image in truth.values()) for level in LEVELS]
    assert faces == [7211, 13319, 31958]


def test_damaged_ground_truth_is_named(tmp_path: Path) -> None:
    from scipy.io import savemat

    with pytest.raises(DataError, match=r"wider_face_val\.mat: missing"):
        load_ground_truth(tmp_path)
    for name in ("face", *LEVELS):
        savemat(tmp_path / f"wider_{name}_val.mat", {"something": 1})
    with pytest.raises(DataError, match="not WIDER FACE ground truth"):
        load_ground_truth(tmp_path)
    (tmp_path / "wider_easy_val.mat").write_bytes(b"garbage" * 100)
    with pytest.raises(DataError, match=r"wider_easy_val\.mat: not a MATLAB file"):
        load_ground_truth(tmp_path)
