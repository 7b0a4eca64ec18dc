from __future__ import annotations

import numpy as np
import pytest

from facespec.boxes import iou_matrix
from facespec.errors import DataError
from facespec.letterbox import Frame
from trainer import load_model
from trainer.data import open_dataset, synthetic
from trainer.data.synthetic import FACE_RANGE, SIDE_RANGE, SyntheticSample
from trainer.model import TorchRetinaFace


@pytest.mark.usefixtures("astronaut")
def test_images_are_the_same_every_time_and_differ_from_each_other() -> None:
    image, faces = SyntheticSample("train", 3).load()
    again, same = SyntheticSample("train", 3).load()
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(faces.landmarks, same.landmarks)
    np.testing.assert_array_equal(SyntheticSample("train", 3).faces().boxes, faces.boxes)
    for other in (SyntheticSample("val", 3), SyntheticSample("train", 4)):
        assert other.load()[0].shape != image.shape or (other.load()[0] != image).any()


def test_the_set_has_faces_of_all_sizes_and_images_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert synthetic.IMAGES == {"train": 1000, "val": 100}
    monkeypatch.setattr(synthetic, "IMAGES", {"train": 300, "val": 8})
    train, val = open_dataset("synthetic", "train"), open_dataset("synthetic", "val")
    assert (len(train), len(val)) == (300, 8)
    assert [sample.name for sample in val.samples[:2]] == ["synthetic val 0", "synthetic val 1"]
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
    assert train.report.background == counts.count(0) > 15
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
    for index in range(12):
        image, faces = SyntheticSample("train", index).load()
        found = detector.detect(image)
        large = faces[faces.boxes[:, 3] - faces.boxes[:, 1] >= 40]
        if len(large) and len(found):
            overlap = iou_matrix(large.boxes, found.boxes)
            best = overlap.argmax(axis=1)
            overlaps += overlap.max(axis=1).tolist()
            away = np.linalg.norm(found.landmarks[best] - large.landmarks, axis=2).mean(axis=1)
            errors += (away / (large.boxes[:, 2] - large.boxes[:, 0])).tolist()
    assert len(overlaps) > 15
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


@pytest.fixture(scope="module")
def plans() -> list[tuple[tuple[int, int], list[synthetic._Paste]]]:
    """Three hundred images before they are drawn."""
    return [synthetic._plan(np.random.default_rng(seed)) for seed in range(300)]


def test_what_is_pasted_varies_as_it_should(plans: list[tuple[tuple[int, int], list[synthetic._Paste]]]) -> None:
    sides = np.array([size for size, _ in plans])
    assert sides.min() in range(448, 453)
    assert sides.max() in range(699, 704)
    pastes = [paste for _, one in plans for paste in one]
    faces = [paste for paste in pastes if paste.cutout.landmarks is not None]
    assert 300 < len(pastes) - len(faces) < 600  # things that are no faces: up to three an image
    counts = [sum(paste.cutout.landmarks is not None for paste in one) for _, one in plans]
    assert max(counts) in (7, 8)
    assert 2.5 < np.mean(counts) < 4.5
    linear = np.array([paste.linear for paste in faces])
    determinants = np.linalg.det(linear)
    assert (determinants < 0).mean() == pytest.approx(0.5, abs=0.08)
    angles = np.rad2deg(np.arctan2(-linear[:, 0, 1], linear[:, 1, 1]))
    assert np.abs(angles.mean()) < 2
    assert angles.std() == pytest.approx(12, rel=0.15)
    stretch = np.sqrt(np.hypot(*linear[:, :, 0].T) / np.hypot(*linear[:, :, 1].T))
    assert stretch.min() == pytest.approx(0.9, abs=0.01)
    assert stretch.max() == pytest.approx(1.1, abs=0.01)
    heights = np.sqrt(np.abs(determinants)) * [paste.cutout.face_wh[1] for paste in faces]
    assert heights.min() == pytest.approx(16, rel=0.05)
    assert np.median(heights) < 80  # even in their logarithms
    gains = np.array([paste.gain for paste in pastes])
    assert gains.min() == pytest.approx(0.6, abs=0.02)
    assert gains.max() == pytest.approx(1.25, abs=0.02)
    assert np.mean([paste.blur for paste in pastes]) == pytest.approx(0.2, abs=0.05)
    assert len({id(paste.cutout) for paste in faces}) == len(synthetic._PORTRAITS)


def test_heights_of_faces_go_up_to_what_their_photograph_gives() -> None:
    rng = np.random.default_rng(0)
    for cutout in synthetic._people():
        pastes = [synthetic._place(cutout, (500, 600), rng) for _ in range(400)]
        heights = np.array([np.sqrt(abs(np.linalg.det(paste.linear))) for paste in pastes]) * cutout.face_wh[1]
        most = min(300, 1.6 * cutout.face_wh[1])
        assert most * 0.97 < heights.max() <= most + 1e-6
        assert 16 <= heights.min() < 16.5
        assert np.median(heights) == pytest.approx(np.sqrt(16 * most), rel=0.15)  # even in their logarithms
        centres = np.array([paste.centre for paste in pastes])
        assert (centres.min(axis=0) < [20, 20]).all()
        assert (centres.max(axis=0) > [580, 480]).all()


def test_what_is_pasted_lies_in_the_image_and_apart(
    plans: list[tuple[tuple[int, int], list[synthetic._Paste]]],
) -> None:
    for (height, width), pastes in plans:
        boxes = []
        for paste in pastes:
            half = paste.extent((paste.cutout.face_wh[0] * 0.75, paste.cutout.face_wh[1] * 0.75))
            boxes.append([*(paste.centre - half), *(paste.centre + half)])
        corners = np.array(boxes).reshape(-1, 4)
        assert (corners[:, :2] >= 0).all()
        assert (corners[:, 2:] <= [width, height]).all()
        overlaps = iou_matrix(corners.astype(np.float32), corners.astype(np.float32))
        assert (overlaps - np.diag(np.diag(overlaps)) < 1e-4).all()


def _cutout(shade: int = 200) -> synthetic._Cutout:
    """An opaque rectangle of 32x16 pixels in a patch of 64x64, a little brighter on its left."""
    patch = np.zeros((64, 64, 4), np.uint8)
    patch[..., :3] = shade
    patch[24:40, 16:48, 3] = 255
    landmarks = np.array([(-8, -4), (8, -4), (0, 0), (-6, 4), (6, 4)], float)
    return synthetic._Cutout(synthetic._pyramid(patch), (32, 16), landmarks)


@pytest.mark.parametrize("scale", [0.25, 0.4, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("turn", [0, 90])
def test_a_cutout_is_drawn_where_its_label_is(scale: float, turn: int) -> None:
    sine, cosine = np.sin(np.deg2rad(turn)), np.cos(np.deg2rad(turn))
    linear = scale * np.array([[cosine, -sine], [sine, cosine]])
    centre = np.array([60.3, 50.6])
    image = np.zeros((100, 120, 3), np.uint8)
    synthetic._paste(image, synthetic._Paste(_cutout(), linear, centre, 1.0, False))
    weight = image[..., 0].astype(float)
    assert weight.max() == 200
    y, x = np.mgrid[:100, :120] + 0.5
    middle = np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()
    np.testing.assert_allclose(middle, centre, atol=0.12)
    assert weight.sum() / 200 == pytest.approx(32 * 16 * scale**2, rel=0.06)
    spread = [np.average((axis - at) ** 2, weights=weight) for axis, at in zip((x, y), middle, strict=True)]
    assert (spread[0] > spread[1]) == (turn == 0)


def test_gain_blur_and_opacity_of_what_is_pasted() -> None:
    def pasted(gain: float, blur: bool, under: int = 0) -> Frame:
        image = np.full((100, 120, 3), under, np.uint8)
        synthetic._paste(image, synthetic._Paste(_cutout(), np.eye(2), np.array([60.0, 50.0]), gain, blur))
        return image

    plain = pasted(1.0, False)
    assert (plain[42:58, 44:76] == 200).all()
    outside = plain.copy()
    outside[42:58, 44:76] = 0
    assert not outside.any()  # what is not opaque leaves the image as it was
    assert (pasted(0.6, False)[50, 60] == 120).all()
    assert (pasted(1.25, False)[50, 60] == 250).all()
    assert (pasted(1.0, False, under=33)[10, 10] == 33).all()
    patch = np.zeros((64, 64, 4), np.uint8)
    patch[..., 3], patch[:, 32:, :3] = 255, 200
    cutout = synthetic._Cutout(synthetic._pyramid(patch), (32, 16), None)
    for blur, between in ((False, 0), (True, 4)):
        image = np.zeros((64, 64, 3), np.uint8)
        synthetic._paste(image, synthetic._Paste(cutout, np.eye(2), np.array([32.0, 32.0]), 1.0, blur))
        assert ((image[32, :, 0] > 0) & (image[32, :, 0] < 200)).sum() in range(between // 2, between + 1)


def test_labels_of_a_mirrored_face_are_swapped_and_small_ones_have_no_landmarks() -> None:
    paste = synthetic._Paste(_cutout(), np.diag([-2.0, 2.0]), np.array([100.0, 50.0]), 1.0, False)
    faces = synthetic._faces([paste])
    np.testing.assert_allclose(faces.boxes, [[68, 34, 132, 66]])
    np.testing.assert_allclose(faces.landmarks[0], [(84, 42), (116, 42), (100, 50), (88, 58), (112, 58)])
    assert faces.has_landmarks.tolist() == [True]
    for scale, known in ((1.25, True), (1.24, False)):  # 20 pixels high, and less
        one = synthetic._faces([paste._replace(linear=np.diag([scale, scale]))])
        assert one.has_landmarks.tolist() == [known]
        assert one.landmarks.any() == known
    thing = paste._replace(cutout=synthetic._Cutout(_cutout().pyramid, (9, 9), None))
    assert len(synthetic._faces([thing])) == 0
    assert len(synthetic._faces([thing, paste, thing])) == 1


def test_a_cut_fades_towards_an_ellipse_around_its_centre() -> None:
    image = np.full((200, 300, 3), 7, np.uint8)
    patch, offset = synthetic._cut(image, np.array([150.25, 100.5]), np.array([40.0, 30.0]))
    assert patch.shape == (64, 96, 4)
    assert (patch[..., :3] == 7).all()
    centre = np.array([48, 32]) + offset
    opacity = patch[..., 3].astype(float) / 255
    y, x = np.mgrid[:64, :96] + 0.5
    distance = np.hypot((x - centre[0]) / 40, (y - centre[1]) / 30)
    np.testing.assert_allclose(opacity, np.clip((1 - distance) / 0.2, 0, 1), atol=0.003)
    assert np.abs(offset).max() <= 0.5
    # past the edge of the photograph its rim goes on
    image[:, 0] = 90
    patch, _ = synthetic._cut(image, np.array([0.0, 100.0]), np.array([16.0, 16.0]))
    assert (patch[:, :17, :3] == 90).all()
    levels = synthetic._pyramid(patch)
    assert [level.shape[:2] for level in levels] == [(32 >> n, 32 >> n) for n in range(6)]


def test_backgrounds_are_scenery_gradients_and_noise() -> None:
    kinds = []
    for seed in range(120):
        image = synthetic._background((60, 90), np.random.default_rng(seed))
        assert image.shape == (60, 90, 3)
        kinds.append(np.abs(np.diff(image.astype(int), axis=1)).mean())
    assert len({round(kind, 6) for kind in kinds}) > 100
    smooth = np.mean(np.array(kinds) < 3.5)
    assert 0.05 < smooth < 0.6
