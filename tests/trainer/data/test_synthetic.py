from __future__ import annotations

import numpy as np
import pytest

from facespec.boxes import iou_matrix
from facespec.errors import DataError
from trainer import load_model
from trainer.data import open_dataset, synthetic
from trainer.data.synthetic import FACE_RANGE, SIDE_RANGE, SyntheticSample
from trainer.detector import TorchRetinaFace


@pytest.mark.usefixtures("astronaut")
def test_images_are_the_same_every_time_and_differ_from_each_other() -> None:
    image, faces = SyntheticSample("train", 3).load()
    again, same = SyntheticSample("train", 3).load()
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(faces.landmarks, same.landmarks)
    np.testing.assert_array_equal(SyntheticSample("train", 3).faces().boxes, faces.boxes)
    for other in (SyntheticSample("val", 3), SyntheticSample("train", 4)):
        assert other.load()[0].shape != image.shape or (other.load()[0] != image).any()


def test_the_set_has_faces_of_all_sizes_and_images_without() -> None:
    train, val = open_dataset("synthetic", "train"), open_dataset("synthetic", "val")
    assert (len(train), len(val)) == (1000, 100)
    boxes, known, counts = [], [], []
    for sample in train.samples:
        assert isinstance(sample, SyntheticSample)
        faces = sample.faces()
        boxes.append(faces.boxes)
        known.append(faces.has_landmarks)
        counts.append(len(faces))
    corners = np.concatenate(boxes)
    heights = corners[:, 3] - corners[:, 1]
    assert train.report.faces == len(corners)
    assert train.report.background == counts.count(0) > 50
    assert max(counts) >= 6
    assert FACE_RANGE[0] * 0.8 < heights.min() < 20
    assert 200 < heights.max() < FACE_RANGE[1] * 1.2
    np.testing.assert_array_equal(np.concatenate(known), heights >= 20)


def test_labels_lie_in_the_image() -> None:
    for index in range(30):
        image, faces = SyntheticSample("val", index).load()
        height, width = image.shape[:2]
        assert SIDE_RANGE[0] <= min(height, width) <= max(height, width) < SIDE_RANGE[1]
        assert ((faces.boxes >= 0) & (faces.boxes <= [width, height, width, height])).all()
        points = faces.landmarks[faces.has_landmarks]
        assert ((points >= 0) & (points <= [width, height])).all()
        assert (points[:, 0, 1] < points[:, 3, 1]).all()
        assert (points[:, 1, 1] < points[:, 4, 1]).all()


@pytest.mark.slow
def test_the_published_detector_finds_the_faces_where_the_labels_are() -> None:
    """Independent of how the labels are computed: a shift, a wrong turn or unswapped landmarks would show."""
    detector = TorchRetinaFace(load_model(), score_threshold=0.3)
    overlaps, errors = [], []
    for index in range(16):
        image, faces = SyntheticSample("train", index).load()
        found = detector.detect(image)
        large = faces[faces.boxes[:, 3] - faces.boxes[:, 1] >= 40]
        if len(large) and len(found):
            overlap = iou_matrix(large.boxes, found.boxes)
            best = overlap.argmax(axis=1)
            overlaps += overlap.max(axis=1).tolist()
            away = np.linalg.norm(found.landmarks[best] - large.landmarks, axis=2).mean(axis=1)
            errors += (away / (large.boxes[:, 2] - large.boxes[:, 0])).tolist()
    assert len(overlaps) > 20
    assert np.mean(np.array(overlaps) > 0.5) > 0.85
    assert np.median(overlaps) > 0.75
    assert np.median(errors) < 0.08


def test_without_photographs_the_command_that_brings_them_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic._people.cache_clear()
    monkeypatch.setattr(synthetic, "_PORTRAITS", ())
    try:
        with pytest.raises(DataError, match=r"pip install -e '\.\[demo\]'"):
            open_dataset("synthetic")
    finally:
        synthetic._people.cache_clear()
