from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facespec.errors import DataError
from trainer.average_precision import LEVELS, Curve, ImageTruth, average_precision, load_ground_truth

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


def _single(face: list[float], found: list[list[float]], border: int = 1) -> Curve:
    truth = {("e", "i"): ImageTruth(np.array([face], float), {level: np.ones(1, bool) for level in LEVELS})}
    return average_precision({("e", "i"): np.array(found, float)}, truth, border)["easy"]


@pytest.mark.parametrize(
    ("border", "face", "found", "ap"),
    [
        (1, [10, 20, 9, 9], [10, 20, 9, 4], 1),  # 50 of 100 pixels: an IoU of a half is enough
        (1, [10, 20, 9, 9], [10, 20, 4, 9], 1),
        (1, [10, 20, 9, 9], [10, 20, 9, 3.9], 0),
        (0, [10, 20, 10, 10], [10, 20, 10, 5], 1),
        (0, [10, 20, 10, 10], [10, 20, 5, 10], 1),
        (0, [10, 20, 10, 10], [10, 20, 10, 4.9], 0),
        (1, [10, 20, 10, 10], [10, 20, 10, 4.9], 1),  # 64.9 of 121
        (1, [0, 0, 9, 9], [30, 40, -1, 5], 0),  # without area: it overlaps nothing
        (1, [30, 40, -1, 5], [30, 40, -1, 5], 0),
    ],
)
def test_boxes_match_from_an_iou_of_a_half_on(border: int, face: list[float], found: list[float], ap: float) -> None:
    assert _single(face, [[*found, 0.9]], border).ap == ap


def test_a_curve_is_sampled_at_a_thousand_falling_thresholds() -> None:
    faces = [[0, 0, 9, 9], [50, 0, 9, 9], [0, 50, 9, 9], [50, 50, 9, 9]]
    truth = {("e", "i"): ImageTruth(np.array(faces, float), {level: np.ones(4, bool) for level in LEVELS})}
    rows = [[*faces[0], 1.0], [200, 200, 9, 9, 0.875], [*faces[1], 0.625], [*faces[2], 0.5]]  # the range is spread
    curve = average_precision({("e", "i"): np.array(rows, float)}, truth)["hard"]
    assert curve.precision.shape == curve.recall.shape == (1000,)
    assert curve.faces == 4
    at = {0: (1, 0.25), 200: (1, 0.25), 300: (1 / 2, 0.25), 700: (1 / 2, 0.25), 800: (2 / 3, 0.5), 999: (3 / 4, 0.75)}
    for index, (precision, recall) in at.items():
        assert curve.precision[index] == pytest.approx(precision), index
        assert curve.recall[index] == pytest.approx(recall), index
    assert curve.ap == pytest.approx(0.25 * 1 + 0.25 * 0.75 + 0.25 * 0.75)  # under the envelope; one face is not found


def test_other_images_and_other_faces_do_not_enter() -> None:
    face = [0.0, 0, 9, 9]
    good, bad = [*face, 0.8], [100, 100, 9, 9, 0.9]
    counted = {level: np.ones(1, bool) for level in LEVELS}
    nobody = {level: np.zeros(0, bool) for level in LEVELS}
    truth = {("e", "i"): ImageTruth(np.array([face]), counted), ("e", "none"): ImageTruth(np.zeros((0, 4)), nobody)}
    strange = {("e", "i"): np.array([good]), ("e", "other"): np.array([[*face, 99.0], [*face, -99.0]])}
    assert average_precision(strange, truth)["easy"].ap == 1
    # in the official evaluation images without faces cost nothing, either
    assert average_precision({("e", "i"): np.array([good]), ("e", "none"): np.array([bad])}, truth)["easy"].ap == 1
    # a second detection of a face is a false one, a detection of an ignored face is none
    assert _single(face, [[100, 100, 9, 9, 0.9], good, good]).precision[-1] == pytest.approx(1 / 3)
    both = ImageTruth(np.array([face, bad[:4]]), {level: np.array([True, level == "hard"]) for level in LEVELS})
    curves = average_precision({("e", "i"): np.array([good, bad])}, {("e", "i"): both})
    assert [curves[level].precision[-1] for level in LEVELS] == [1, 1, 1]
    assert [curves[level].recall[-1] for level in LEVELS] == [1, 1, 1]
    assert [curves[level].faces for level in LEVELS] == [1, 1, 2]


def _cell(items: list[object]) -> np.ndarray:
    cell = np.empty((len(items), 1), object)
    for index, item in enumerate(items):
        cell[index, 0] = item
    return cell


def test_ground_truth_is_read_by_event_image_and_level(tmp_path: Path) -> None:
    from scipy.io import savemat

    boxes = [
        np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]], np.uint16),
        np.zeros((0, 4)),
        np.array([[7.5, 1, 2, 3]]),
    ]
    files = {"event_list": _cell(["0--A", "1--B"]), "file_list": _cell([_cell(["x", "y"]), _cell(["z"])])}
    savemat(tmp_path / "wider_face_val.mat", {**files, "face_bbx_list": _cell([_cell(boxes[:2]), _cell(boxes[2:])])})
    listed = {"easy": [[2], [], []], "medium": [[2, 3], [], [1]], "hard": [[1, 2, 3], [], [1]]}
    for level, numbers in listed.items():
        columns: list[object] = [np.array(one, np.uint16).reshape(-1, 1) for one in numbers]
        savemat(tmp_path / f"wider_{level}_val.mat", {"gt_list": _cell([_cell(columns[:2]), _cell(columns[2:])])})
    truth = load_ground_truth(tmp_path)
    assert list(truth) == [("0--A", "x"), ("0--A", "y"), ("1--B", "z")]
    np.testing.assert_array_equal(truth["0--A", "x"].boxes_xywh, [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]])
    assert truth["0--A", "x"].boxes_xywh.dtype == np.float64
    assert truth["0--A", "y"].boxes_xywh.shape == (0, 4)
    assert truth["1--B", "z"].boxes_xywh.tolist() == [[7.5, 1, 2, 3]]
    for level, numbers in listed.items():
        for image, chosen, count in zip(truth.values(), numbers, (3, 0, 1), strict=True):
            assert image.counted[level].tolist() == [index + 1 in chosen for index in range(count)]
