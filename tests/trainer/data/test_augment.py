from __future__ import annotations

import colorsys
import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from facespec.errors import SpecError
from facespec.letterbox import Frame
from trainer.data import AugmentSettings, Dataset, FileSample, Report, TrainingSet, open_dataset
from trainer.data.augment import (
    INTERPOLATIONS,
    Colours,
    Crop,
    apply_crop,
    augment,
    choose_crop,
    draw_colours,
    mirror,
    recolour,
)
from trainer.data.batches import collate, start_worker
from trainer.data.dataset import Faces
from trainer.data.synthetic import SyntheticSample

SIZE = 320
PLAIN = AugmentSettings(brightness=0, contrast=(1, 1), saturation=(1, 1), hue=0)
"""Colours stay as they are, so that what is painted can be found again."""

MARKS = np.array([(0, 0, 255), (255, 0, 0), (0, 255, 255), (255, 0, 255), (255, 255, 0)])
"""Colours of the landmarks: left eye, right eye, nose, left and right mouth corner."""

SWAPPED = [1, 0, 2, 4, 3]
FACE = np.array([(150, 110), (190, 112), (170, 132), (152, 150), (188, 152)], np.float32)


def _faces(boxes: object, landmarks: object = None) -> Faces:
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    if landmarks is None:
        return Faces(corners, np.zeros((len(corners), 5, 2), np.float32), np.zeros(len(corners), bool))
    return Faces(corners, np.array(landmarks, np.float32).reshape(-1, 5, 2), np.ones(len(corners), bool))


def _synthetic(count: int) -> Dataset:
    """The first images of the synthetic set; planning all of it takes seconds."""
    return Dataset("few", [SyntheticSample("train", index) for index in range(count)], Report())


def _portrait() -> tuple[Frame, Faces]:
    """A green box on black with five marks in it, in an image of 400x300."""
    image = np.zeros((300, 400, 3), np.uint8)
    cv2.rectangle(image, (130, 90), (209, 169), (0, 90, 0), -1)  # fills [130, 210) x [90, 170)
    for point, colour in zip(FACE, MARKS.tolist(), strict=True):
        x, y = point.astype(int).tolist()
        image[y - 3 : y + 3, x - 3 : x + 3] = colour  # centred on the point: pixel i covers [i, i + 1)
    return image, _faces([130, 90, 210, 170], FACE)


def _find(view: Frame, colour: np.ndarray) -> np.ndarray | None:
    """Return the centre of what has a colour, as x, y."""
    y, x = np.nonzero(np.abs(view.astype(int) - colour).sum(axis=2) < 150)
    return np.array([x.mean() + 0.5, y.mean() + 0.5]) if len(x) else None


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop", [Crop(100, 60, 160), Crop(-40, -30, 380), Crop(0, -50, 400), Crop(20, 0, 300)])
def test_painted_marks_are_where_the_landmarks_say(crop: Crop, interpolation: str) -> None:
    image, faces = _portrait()
    view, moved = apply_crop(
        image, faces, crop, SIZE, np.random.default_rng(0), dataclasses.replace(PLAIN, interpolations=(interpolation,))
    )
    assert view.shape == (SIZE, SIZE, 3)
    pixel = SIZE / crop.side
    for point, colour in zip(moved.landmarks[0], MARKS, strict=True):
        found = _find(view, colour)
        assert found is not None
        assert np.abs(found - point).max() < 0.35 + 0.5 * pixel * (interpolation == "nearest")
    y, x = np.nonzero((view[..., 1] > 45) & (np.abs(view.astype(int) - PLAIN.pad_bgr).sum(axis=2) > 60))
    assert np.abs(moved.boxes[0] - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() < 0.6 + 0.5 * pixel


def test_a_flip_swaps_left_and_right() -> None:
    image, faces = _portrait()
    view, mirrored = mirror(image, faces)
    for index, point in enumerate(mirrored.landmarks[0]):
        found = _find(view, MARKS[SWAPPED[index]])  # what was painted as a left eye is seen as a right one
        assert found is not None
        assert np.abs(found - point).max() < 0.01
    assert mirrored.boxes.tolist() == [[190, 90, 270, 170]]
    again, back = mirror(view, mirrored)
    np.testing.assert_array_equal(again, image)
    np.testing.assert_array_equal(back.landmarks, faces.landmarks)


def test_whatever_is_drawn_marks_are_found_where_the_landmarks_say() -> None:
    image, faces = _portrait()
    flipped, unknown = [], 0
    for seed in range(60):
        view, moved = augment(image, faces, SIZE, np.random.default_rng(seed), PLAIN)
        if not moved.has_landmarks.any():
            unknown += 1
            continue
        points = moved.landmarks[0]
        assert points[0, 0] < points[1, 0]
        assert points[3, 0] < points[4, 0]
        centres = [_find(view, colour) for colour in MARKS]
        far = [[np.inf if centre is None else np.abs(centre - point).max() for centre in centres] for point in points]
        order = np.argmin(far, axis=1).tolist()
        assert order in ([0, 1, 2, 3, 4], SWAPPED)
        flipped.append(order == SWAPPED)
        assert np.min(far, axis=1).max() < 2.5
    assert 0.25 < np.mean(flipped) < 0.75
    assert unknown < 10


def test_landmarks_that_leave_the_crop_are_unknown_not_at_its_edge() -> None:
    image, faces = _portrait()
    crop = Crop(151, 60, 140)  # through the left eye, right of it the centre of the face
    _, moved = apply_crop(image, faces, crop, SIZE, np.random.default_rng(0), PLAIN)
    assert len(moved) == 1
    assert not moved.has_landmarks[0]
    assert not moved.landmarks.any()
    np.testing.assert_allclose(moved.boxes[0], np.array([0, 30, 59, 110]) * SIZE / 140, atol=1e-4)
    _, moved = apply_crop(image, faces, crop._replace(left=150), SIZE, np.random.default_rng(0), PLAIN)
    assert moved.has_landmarks[0]


def test_faces_are_kept_by_their_centre_in_order() -> None:
    image = np.zeros((200, 200, 3), np.uint8)
    boxes = [(0, 0, 90, 90), (40, 40, 80, 80), (90, 90, 131, 131), (90, 90, 129, 129), (60, 60, 61, 61)]
    _, moved = apply_crop(image, _faces(boxes), Crop(50, 50, 60), 60, np.random.default_rng(0), PLAIN)
    np.testing.assert_allclose(moved.boxes, [(0, 0, 30, 30), (40, 40, 60, 60), (10, 10, 11, 11)], atol=1e-4)


def test_the_padding_has_the_mean_colour_whatever_happens_to_colours() -> None:
    image = np.full((100, 200, 3), 200, np.uint8)
    loud = AugmentSettings(brightness=200, contrast=(0.1, 3.0), saturation=(0, 3), hue=90)
    for seed in range(10):
        view, _ = apply_crop(image, Faces.none(), Crop(0, 0, 200), 100, np.random.default_rng(seed), loud)
        assert (view[50:] == loud.pad_bgr).all()
        assert not (view[:50] == loud.pad_bgr).all()


def test_where_no_crop_holds_a_face_the_whole_image_is_padded_to_a_square() -> None:
    few = dataclasses.replace(PLAIN, crop_scales=(0.3,), crop_tries=40)
    assert choose_crop((100, 300), _faces([10, 10, 60, 60]), np.random.default_rng(0), few) == Crop(0, 0, 300)


def test_an_image_without_faces_is_cropped_all_the_same() -> None:
    sides = {choose_crop((200, 300), Faces.none(), np.random.default_rng(seed), PLAIN).side for seed in range(99)}
    assert sides == {int(scale * 200) for scale in PLAIN.crop_scales}
    view, faces = augment(np.zeros((200, 300, 3), np.uint8), Faces.none(), 64, np.random.default_rng(0), PLAIN)
    assert view.shape == (64, 64, 3)
    assert len(faces) == 0


def test_crops_hold_a_whole_face_lie_everywhere_and_use_every_scale() -> None:
    boxes = np.array([(20, 20, 60, 70), (230, 120, 260, 160)], np.float32)
    crops = [choose_crop((200, 300), _faces(boxes), np.random.default_rng(seed), PLAIN) for seed in range(600)]
    for crop in crops:
        low = np.array([crop.left, crop.top])
        assert ((boxes[:, :2] >= low) & (boxes[:, 2:] <= low + crop.side)).all(axis=1).any()
        for start, length in ((crop.left, 300), (crop.top, 200)):
            assert min(0, length - crop.side) <= start <= max(0, length - crop.side)
    assert {crop.side for crop in crops} == {int(scale * 200) for scale in PLAIN.crop_scales}
    lefts = [crop.left for crop in crops if crop.side == 120]
    assert min(lefts) < 25
    assert max(lefts) > 155
    above = [-crop.top for crop in crops if crop.side == 280]  # padding: the image is anywhere in a larger crop
    assert min(above) < 15
    assert max(above) > 65


def _reference_recolour(pixel: np.ndarray, colours: Colours) -> np.ndarray:
    """One pixel by the book, in real numbers."""
    bgr = np.clip(pixel + colours.brightness, 0, 255)
    if not colours.contrast_last:
        bgr = np.clip(bgr * colours.contrast, 0, 255)
    hue, saturation, value = colorsys.rgb_to_hsv(*(bgr[::-1] / 255))
    rgb = colorsys.hsv_to_rgb((hue + colours.hue / 180) % 1, min(saturation * colours.saturation, 1), value)
    bgr = np.array(rgb[::-1]) * 255
    return np.clip(bgr * colours.contrast, 0, 255) if colours.contrast_last else bgr


@pytest.mark.parametrize(
    "colours",
    [
        Colours(),
        Colours(brightness=-30),
        Colours(brightness=25, contrast=1.4),
        Colours(saturation=0.5),
        Colours(saturation=1.5, hue=-18),
        Colours(hue=15),
        Colours(20, 0.6, 1.2, 9, True),
        Colours(20, 1.3, 0.8, 9, False),
        Colours(brightness=-60, contrast=2.0, contrast_last=True),
    ],
)
def test_colours_follow_their_definition(colours: Colours) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    expected = np.array([[_reference_recolour(pixel, colours) for pixel in row] for row in pixels.astype(float)])
    error = np.abs(recolour(pixels, colours) - expected)
    in_bgr = colours.saturation == 1 and colours.hue == 0
    assert error.max() <= (0.51 if in_bgr else 9)  # 8-bit hue has steps of 2 degrees
    assert error.mean() < 2
    assert (colours == Colours()) == bool((recolour(pixels, colours) == pixels).all())


@st.composite
def _views(draw: st.DrawFn) -> tuple[tuple[int, int], Faces, int, int]:
    height, width = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    count = draw(st.integers(0, 12))
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * [width, height]
    points = rng.uniform(0, 1, (count, 5, 2)) * [width, height]
    known = rng.random(count) < 0.7
    faces = Faces(corners.reshape(-1, 4).astype(np.float32), (points * known[:, None, None]).astype(np.float32), known)
    keep = (faces.boxes[:, 2:] > faces.boxes[:, :2]).all(axis=1)
    return (height, width), faces[keep], draw(st.sampled_from([32, 64, 96])), draw(st.integers(0, 2**31))


@given(_views())
@settings(max_examples=150, deadline=None)
def test_what_comes_out_fits_the_image(view: tuple[tuple[int, int], Faces, int, int]) -> None:
    size_hw, faces, size, seed = view
    image, moved = augment(
        np.zeros((*size_hw, 3), np.uint8), faces, size, np.random.default_rng(seed), AugmentSettings()
    )
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert (moved.boxes.dtype, moved.landmarks.dtype, moved.has_landmarks.dtype) == (np.float32, np.float32, bool)
    assert ((moved.boxes >= 0) & (moved.boxes <= size)).all()
    assert (moved.boxes[:, 2:] > moved.boxes[:, :2]).all()
    assert ((moved.landmarks >= 0) & (moved.landmarks <= size)).all()
    assert not moved.landmarks[~moved.has_landmarks].any()
    assert moved.has_landmarks.sum() <= faces.has_landmarks.sum()
    assert 0 < len(moved) <= len(faces) or len(faces) == 0


def test_items_depend_on_seed_epoch_and_index_alone() -> None:
    dataset = _synthetic(8)
    count = len(dataset)
    first = TrainingSet(dataset, 64, AugmentSettings(), seed=1)
    assert len(first) == count
    (image, faces), (again, same) = first[5], TrainingSet(dataset, 64, AugmentSettings(), seed=1)[5]
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(faces.boxes, same.boxes)
    for other in (first[5 + count], first[6], TrainingSet(dataset, 64, AugmentSettings(), seed=2)[5]):
        assert (other[0] != image).any()


def test_workers_change_nothing() -> None:
    large = np.zeros((2000, 2000, 3), np.uint8)
    cv2.resize(large, (1000, 1000), interpolation=cv2.INTER_LANCZOS4)  # cv2 has threads of its own from here on
    training_set = TrainingSet(_synthetic(10), 64, AugmentSettings(), seed=3)
    items = [7, 17, 8, 25]
    batches = [
        next(
            iter(
                DataLoader(
                    training_set, 4, sampler=items, num_workers=workers, collate_fn=collate, worker_init_fn=start_worker
                )
            )
        )
        for workers in (0, 2)
    ]
    for alone, in_workers in zip((batches[0][0], *batches[0][1]), (batches[1][0], *batches[1][1]), strict=True):
        np.testing.assert_array_equal(alone.numpy(), in_workers.numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_scales": ()}, "crop_scales"),
        ({"crop_scales": (0.0, 1.0)}, "crop_scales"),
        ({"crop_tries": 0}, "crop_tries"),
        ({"flip": float("nan")}, "flip"),
        ({"brightness": -1}, "brightness"),
        ({"contrast": (1.5, 0.5)}, "contrast"),
        ({"saturation": (0.5,)}, "saturation"),
        ({"hue": 91}, "hue"),
        ({"interpolations": ("sharp",)}, "nearest, linear, cubic, area, lanczos"),
        ({"pad_bgr": (0, 0, 256)}, "mean_bgr"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        AugmentSettings(**changes)  # type: ignore[arg-type]


@pytest.mark.data
def test_faces_are_as_large_in_training_as_in_the_images(widerface: Path) -> None:
    """What the docstring of the settings says; the original's crops leave out half of the smallest faces."""
    if not (widerface / "train" / "label.txt").is_file():
        pytest.skip("the training part of WIDER FACE is not on this machine")
    share = dict.fromkeys(("images", "default", "original"), np.zeros(0))
    for seed, sample in enumerate(open_dataset("widerface", "train", widerface).samples[::3]):
        assert isinstance(sample, FileSample)
        image, faces = sample.load()
        views = {"images": faces}
        for name, how in (("default", AugmentSettings()), ("original", AugmentSettings.original())):
            rng = np.random.default_rng(seed)
            crop = choose_crop((image.shape[0], image.shape[1]), faces, rng, how)
            corner = [crop.left, crop.top]
            centres = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2 - corner
            kept = faces[((centres > 0) & (centres < crop.side)).all(axis=1)]
            views[name] = dataclasses.replace(kept, boxes=kept.boxes * (640 / crop.side))
        for name, seen in views.items():
            sides = np.sqrt((seen.boxes[:, 2:] - seen.boxes[:, :2]).prod(axis=1))
            share[name] = np.append(share[name], sides < 16)
    small = {name: values.mean() for name, values in share.items()}
    assert abs(small["default"] - small["images"]) < 0.08
    assert small["original"] < 0.7 * small["images"]


def test_changes_of_colour_are_drawn_over_their_ranges_each_half_of_the_time() -> None:
    settings = AugmentSettings(brightness=40, contrast=(0.25, 1.25), saturation=(0.75, 2.0), hue=3)
    rng = np.random.default_rng(0)
    drawn = [draw_colours(rng, settings) for _ in range(2000)]
    columns = {name: np.array([getattr(one, name) for one in drawn]) for name in Colours._fields}
    for name, nothing, low, high in (
        ("brightness", 0, -40, 40), ("contrast", 1, 0.25, 1.25), ("saturation", 1, 0.75, 2.0), ("hue", 0, -3, 3),
    ):  # fmt: skip
        values = columns[name]
        changed = values[values != nothing]
        share = 0.5 if name != "hue" else 0.5 * 6 / 7  # a turn by nothing is one of seven
        assert len(changed) / 2000 == pytest.approx(share, abs=0.04), name
        assert low <= changed.min() < low + 0.02 * (high - low), name
        assert high - 0.02 * (high - low) < changed.max() <= high, name
        assert changed.mean() == pytest.approx((low + high) / 2, abs=0.04 * (high - low)), name
    assert columns["contrast_last"].mean() == pytest.approx(0.5, abs=0.04)
    assert {type(one.hue) for one in drawn} == {int}
    # one part does not tell another
    used = np.array([columns["brightness"] != 0, columns["contrast"] != 1, columns["saturation"] != 1])
    assert np.abs(np.corrcoef(used) - np.eye(3)).max() < 0.1


def _textured() -> Frame:
    return np.random.default_rng(5).integers(0, 256, (90, 120, 3), np.uint8)


@pytest.mark.parametrize("size", [32, 128])
def test_a_view_is_the_crop_scaled_and_in_other_colours(size: int) -> None:
    """Down, colours come after scaling, up before it: where there is less to do; by every interpolation."""
    settings = AugmentSettings()
    seen = set()
    for seed in range(40):
        view, _ = apply_crop(_textured(), Faces.none(), Crop(20, 10, 64), size, np.random.default_rng(seed), settings)
        rng = np.random.default_rng(seed)
        name = settings.interpolations[rng.integers(5)]
        colours = draw_colours(rng, settings)
        part = _textured()[10:74, 20:84]
        flag = getattr(cv2, {"lanczos": "INTER_LANCZOS4"}.get(name, f"INTER_{name.upper()}"))
        if size > 64:
            expected = cv2.resize(recolour(part, colours), (size, size), interpolation=flag)
        else:
            expected = recolour(np.asarray(cv2.resize(part, (size, size), interpolation=flag), np.uint8), colours)
        np.testing.assert_array_equal(view, expected)
        seen.add(name)
    assert seen == set(INTERPOLATIONS)


def test_faces_stay_where_their_centre_is_inside_not_on_the_edge() -> None:
    boxes = [
        (40, 60, 60, 80),
        (100, 60, 120, 80),
        (60, 40, 80, 60),
        (60, 100, 80, 120),
        (41, 60, 61, 80),
        (99, 60, 119, 80),
    ]
    image = np.zeros((200, 200, 3), np.uint8)
    _, moved = apply_crop(image, _faces(boxes), Crop(50, 50, 60), 60, np.random.default_rng(0), PLAIN)
    np.testing.assert_allclose(moved.boxes, [(0, 10, 11, 30), (49, 10, 60, 30)], atol=1e-4)
    # landmarks on the edge are inside, on either side
    points = np.array([(50, 50), (110, 50), (80, 80), (50, 110), (110, 110)], np.float32)
    for shift, known in ((0.0, True), (0.01, False), (-0.01, False)):
        faces = _faces([(50, 50, 110, 110)], points + shift)
        _, moved = apply_crop(image, faces, Crop(50, 50, 60), 60, np.random.default_rng(0), PLAIN)
        assert moved.has_landmarks.tolist() == [known]
        assert moved.landmarks.any() == known


@pytest.mark.parametrize("left", [0, 200])
def test_a_crop_that_just_holds_a_face_is_taken(left: int) -> None:
    """At either end of the image, which is as high as the face."""
    settings = dataclasses.replace(PLAIN, crop_scales=(1.0,), crop_tries=10_000)
    crop = choose_crop((100, 300), _faces([left, 0, left + 100, 100]), np.random.default_rng(0), settings)
    assert crop == Crop(left, 0, 100)


@pytest.mark.parametrize("tries", [1, 2, 30])
def test_no_more_crops_are_drawn_than_asked_for(tries: int) -> None:
    """Half of the crops hold this face, which lies at an end; the whole image is taken if none does."""
    settings = dataclasses.replace(PLAIN, crop_scales=(1.0,), crop_tries=tries)
    face = _faces([99, 40, 101, 42])
    whole = [choose_crop((100, 299), face, np.random.default_rng(seed), settings).side == 299 for seed in range(400)]
    assert np.mean(whole) == pytest.approx(0.5**tries, abs=0.08)


def test_the_smallest_crop_is_a_pixel() -> None:
    tiny = dataclasses.replace(PLAIN, crop_scales=(0.3,))
    assert choose_crop((1, 2), Faces.none(), np.random.default_rng(0), tiny).side == 1


@pytest.mark.parametrize("flip", [0.0, 0.25, 1.0])
def test_flips_are_as_frequent_as_asked_for_and_leave_the_original_alone(flip: float) -> None:
    image, faces = _portrait()
    kept = image.copy(), dataclasses.replace(faces, boxes=faces.boxes.copy(), landmarks=faces.landmarks.copy())
    settings = dataclasses.replace(PLAIN, flip=flip, crop_scales=(1.4,), interpolations=("nearest",))
    flipped = []
    for seed in range(200):
        view, _ = augment(image, faces, 64, np.random.default_rng(seed), settings)
        left, right = (_find(view, MARKS[index]) for index in (0, 1))
        flipped += [left[0] > right[0]] if left is not None and right is not None else []
    assert len(flipped) > 100
    assert np.mean(flipped) == pytest.approx(flip, abs=0.1)
    mirror(image, faces)
    np.testing.assert_array_equal(image, kept[0])
    np.testing.assert_array_equal(faces.boxes, kept[1].boxes)
    np.testing.assert_array_equal(faces.landmarks, kept[1].landmarks)


def test_unknown_landmarks_stay_nothing_in_the_mirror() -> None:
    _, moved = mirror(np.zeros((20, 30, 3), np.uint8), _faces([(1, 2, 9, 10)]))
    assert not moved.landmarks.any()
    assert not moved.has_landmarks.any()
    assert moved.boxes.tolist() == [[21, 2, 29, 10]]
