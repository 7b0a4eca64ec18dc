"""COCO files as tools export them: where their images lie, which categories are faces, what their keypoints are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facespec.errors import DataError
from facespec.images import write_image
from trainer.data import FileSample, open_dataset
from trainer.data.dataset import Kind, Sample

POINTS = ((20, 20), (40, 21), (30, 30), (22, 40), (38, 41))
"""Left eye, right eye, nose, left and right corner of the mouth, as seen in the image."""

Annotation = dict[str, Any]
Write = Callable[..., Path]


def _face(points: tuple[tuple[int, int], ...] = (), **more: Any) -> Annotation:
    flat = [value for x, y in points for value in (x, y, 2)]
    return {"image_id": 1, "category_id": 1, "bbox": [10, 12, 40, 50], "keypoints": flat, **more}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a COCO file; every image that it names lies in a folder, by default beside it."""

    def call(
        annotations: list[Annotation],
        categories: list[dict[str, Any]] | None = None,
        file: str = "a.json",
        names: tuple[str, ...] = ("a.jpg",),
        images: str = "",
    ) -> Path:
        for name in names:
            end = name.replace("\\", "/").rpartition("/")[2]
            write_image(tmp_path / images / end, np.full((80, 120, 3), 90, np.uint8))
        data = {
            "images": [{"id": index, "file_name": name} for index, name in enumerate(names, start=1)],
            "annotations": annotations,
            "categories": categories or [{"id": 1, "name": "face"}],
        }
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
        return path

    return call


def _labelled(sample: Sample) -> FileSample:
    assert isinstance(sample, FileSample)
    return sample


@pytest.mark.parametrize(
    ("file", "name", "images"),
    [
        ("result.json", "images/a.jpg", "images"),  # Label Studio
        ("result.json", "images\\a.jpg", "images"),  # on Windows
        ("result.json", "..\\..\\label-studio\\label-studio\\media\\upload\\4\\a.jpg", "images"),  # its 1.16
        ("result.json", "/data/local-files/?d=set/a.jpg", "images"),  # not copied
        ("annotations/instances_default.json", "a.jpg", "images/default"),  # CVAT
        ("annotations/instances_default.json", "a.jpg", "images"),
        ("annotations/instances_train2017.json", "a.jpg", "train2017"),  # COCO 2017
        ("annotations/instances_train2017.json", "train2017/a.jpg", "train2017"),
        ("annotations/train.json", "a.jpg", "images/train"),
        ("annotations.json", "a.jpg", "images"),
        ("train/_annotations.coco.json", "a.jpg", "train"),  # Roboflow
    ],
)
def test_images_are_found_where_tools_put_them(file: str, name: str, images: str, write: Write, tmp_path: Path) -> None:
    path = write([_face()], file=file, names=(name,), images=images)
    for what in (path, tmp_path):  # the file, and the folder that was exported
        (sample,) = open_dataset(str(what)).samples
        assert sample.name == str(tmp_path / images / "a.jpg")
        assert sample.load()[1].boxes.tolist() == [[10, 12, 50, 62]]


def test_each_split_has_its_own_file_and_images(write: Write, tmp_path: Path) -> None:
    for split, shift in (("train", 0), ("val", 1)):
        file = f"annotations/instances_{split}2017.json"
        write([_face(bbox=[10 + shift, 12, 40, 50])], file=file, images=f"{split}2017")
        write([], file=f"annotations/captions_{split}2017.json", images=f"{split}2017")
    for split, x in (("train", 10), ("val", 11)):
        dataset = open_dataset(str(tmp_path), split)  # type: ignore[arg-type]
        assert dataset.samples[0].name == str(tmp_path / f"{split}2017" / "a.jpg")
        assert dataset.samples[0].load()[1].boxes[0, 0] == x
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    (tmp_path / "annotations" / "captions_val2017.json").unlink()
    there = r"\(annotations/captions_train2017.json, annotations/instances_train2017.json are\)"
    with pytest.raises(DataError, match=rf"no COCO .json of the split val {there}: name one with its path"):
        open_dataset(str(tmp_path), "val")
    write([_face()], file="annotations/instances_train_b.json")
    with pytest.raises(DataError, match=r"which of its 2 files is it \(annotations/instances_train2017.json, annot"):
        open_dataset(str(tmp_path))


def test_images_may_lie_anywhere_else(write: Write, tmp_path: Path) -> None:
    path = write([_face()], names=("images/a.jpg",), file="labels/a.json", images="elsewhere/deep")
    with pytest.raises(DataError, match=r"none of its 1 images is there.*--images FOLDER names another"):
        open_dataset(str(path))
    for option in ("images", "fallback_images"):
        folder = tmp_path / "elsewhere" / "deep"
        (sample,) = open_dataset(str(path), **{option: folder}).samples  # type: ignore[arg-type]
        assert sample.name == str(folder / "a.jpg")
    with pytest.raises(DataError, match="--images nowhere: no such folder"):
        open_dataset(str(path), images="nowhere")
    beside = write([_face()], names=("images/a.jpg",), file="labels/a.json", images="labels/images")
    for option, where in (("images", folder), ("fallback_images", beside.parent / "images")):
        (sample,) = open_dataset(str(path), **{option: folder}).samples  # type: ignore[arg-type]
        assert sample.name == str(where / "a.jpg")


FACE, HEAD, DOG = {"id": 1, "name": "Face "}, {"id": 2, "name": "head"}, {"id": 3, "name": "dog"}


@pytest.mark.parametrize(
    ("categories", "used", "wanted", "xs"),
    [
        ([FACE, DOG], [1, 3], None, [0]),  # whatever its case
        ([HEAD, DOG], [2, 2], None, [0, 1]),  # what has no annotations does not count
        ([FACE, HEAD], [2, 2], None, [0, 1]),
        ([{"id": 0, "name": "face"}, {"id": 1, "name": "face"}], [1, 0], None, [0, 1]),
        ([HEAD], [2, 2], None, [0, 1]),
        ([HEAD, DOG], [2, 3], "HEAD", [0]),
        ([FACE, HEAD, DOG], [1, 2, 3], "head,dog", [1, 2]),
        ([FACE, HEAD, DOG], [1, 2, 3], "3", [2]),
        ([{"id": 1, "name": "a,b"}, DOG], [1, 3], "a,b", [0]),
    ],
)
def test_categories(
    categories: list[dict[str, Any]], used: list[int], wanted: str | None, xs: list[int], write: Write
) -> None:
    annotations = [_face(category_id=category, bbox=[x, 1, 20, 20]) for x, category in enumerate(used)]
    dataset = open_dataset(str(write(annotations, categories)), category=wanted)
    assert _labelled(dataset.samples[0]).labelled.boxes[:, 0].tolist() == xs
    told = any("faces are the annotations of" in note for note in dataset.report.notes)
    assert told is (categories[0] is not FACE or used[0] != 1 or bool(wanted)) or "face" in categories[0]["name"]


def test_no_face_says_which_categories_there_are(write: Write) -> None:
    path = write([_face(category_id=2)] * 40, [FACE, HEAD, DOG])
    with pytest.raises(DataError, match=r"category 'face'; there are 'head' \(40 annotations\)$"):
        open_dataset(str(path), category="face")
    with pytest.raises(DataError, match=r"category 'face'; there are none at all"):
        open_dataset(str(write([])), category="face")
    with pytest.raises(DataError, match="no usable face in 1 image; no face is labelled in it"):
        open_dataset(str(write([])))
    path = write([_face(category_id=2), _face(category_id=3)], [FACE, HEAD, DOG])
    with pytest.raises(DataError, match=r"which of its 2 categories are faces: 'head' .*'dog' .*--category NAME"):
        open_dataset(str(path))


# as seen in the image, and as the person would say it
SEEN = ["left_eye", "right_eye", "nose", "left_mouth", "right_mouth"]
OWN = ["right_eye", "left_eye", "nose", "right_mouth", "left_mouth"]
STYLES = {
    "words": SEEN,
    "camel": ["leftEye", "rightEye", "noseTip", "leftMouthCorner", "rightMouthCorner"],
    "behind": ["eye_left", "eye-right", "Nose", "mouth left", "mouth_corner_right"],
    "letters": ["leye", "reye", "nose", "lmouth", "rmouth"],
    "lips": ["LeftPupil", "RightPupil", "nose_tip", "left lip corner", "right lip corner"],
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (1, 0, 2, 4, 3), (2, 0, 3, 1, 4)])
def test_keypoints_are_put_in_order_by_their_names(style: str, order: tuple[int, ...], write: Write) -> None:
    category = {"id": 1, "name": "face", "keypoints": [STYLES[style][index] for index in order]}
    path = write([_face(tuple(POINTS[index] for index in order))], [category])
    (sample,) = open_dataset(str(path)).samples
    faces = sample.load()[1]
    assert faces.has_landmarks.tolist() == [True]
    assert faces.landmarks[0].tolist() == [list(point) for point in POINTS]


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("names", [SEEN, OWN, [], None])
@pytest.mark.parametrize("first", ["left", "right"])
def test_left_is_what_is_seen_left_whoever_named_it(
    first: str, names: list[str] | None, turn: int, write: Write
) -> None:
    """However the face is turned, and with a profile among the faces whose points say the other thing."""
    angle = np.deg2rad(turn)
    turned = np.rint((np.array(POINTS) - 30) @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]] + 40)
    order = (0, 1, 2, 3, 4) if first == "left" else (1, 0, 2, 4, 3)
    points, other = (tuple((int(x), int(y)) for x, y in turned[list(which)]) for which in (order, (1, 0, 2, 4, 3)))
    if first == "right":
        other = tuple((int(x), int(y)) for x, y in turned)
    category = {"id": 1, "name": "face", **({} if names is None else {"keypoints": names})}
    annotations = [_face(points, bbox=[x, 10, 60, 60]) for x in (10, 11)] + [_face(other, bbox=[12, 10, 60, 60])]
    dataset = open_dataset(str(write(annotations, [category])))
    landmarks = _labelled(dataset.samples[0]).labelled.landmarks
    np.testing.assert_array_equal(landmarks[0], turned)
    np.testing.assert_array_equal(landmarks[1], turned)
    np.testing.assert_array_equal(landmarks[2], turned[[1, 0, 2, 4, 3]])
    told = "left and right are the person's own in 2 of 3 faces" in " ".join(dataset.report.notes)
    assert told is ((first == "right") is (names is not OWN))


@pytest.mark.parametrize(
    "names",
    [
        ["k"] * 5, ["1", "2", "3", "4", "5"], ["left_eye", "right_eye", "nose", "left_ear", "right_ear"],
        ["left_eye", "left_eye", "nose", "left_mouth", "right_mouth"], [*SEEN[:4], "chin"],
        ["left_eyebrow", *SEEN[1:]],
    ],
)  # fmt: skip
def test_other_keypoints_keep_the_box(names: list[str], write: Write) -> None:
    path = write([_face(POINTS)], [{"id": 1, "name": "face", "keypoints": names}])
    dataset = open_dataset(str(path))
    assert [problem.kind for problem in dataset.report.problems] == [Kind.OTHER_KEYPOINTS]
    faces = dataset.samples[0].load()[1]
    assert (faces.boxes.tolist(), faces.has_landmarks.tolist()) == ([[10, 12, 50, 62]], [False])


def test_the_five_are_taken_out_of_more_if_they_are_named(write: Write) -> None:
    names = ["left_ear", *OWN[:3], "left_eyebrow", "chin", *OWN[3:]]
    own = [POINTS[SEEN.index(name)] if name in SEEN else (1, 1) for name in names]
    path = write([_face(tuple(own))], [{"id": 1, "name": "face", "keypoints": names}])
    assert open_dataset(str(path)).samples[0].load()[1].landmarks[0].tolist() == [list(point) for point in POINTS]
    short = write([_face(POINTS)], [{"id": 1, "name": "face", "keypoints": names}])
    dataset = open_dataset(str(short))
    assert [problem.kind for problem in dataset.report.problems] == [Kind.OTHER_KEYPOINTS]


def test_a_person_without_visible_keypoints_is_no_problem(write: Write) -> None:
    category = {"id": 1, "name": "person", "keypoints": ["k"] * 17}
    dataset = open_dataset(str(write([_face(keypoints=[0] * 51, num_keypoints=0)], [category])))
    assert (dataset.report.faces, dataset.report.problems) == (1, [])


def test_annotations_of_an_image_that_is_left_out_make_no_other_doubtful(write: Write) -> None:
    names = ("a.jpg", "b.jpg", "../../nowhere.jpg")
    path = write([_face(), _face(image_id=3)], names=names)
    (path.parent / "nowhere.jpg").unlink()
    dataset = open_dataset(str(path))
    assert [problem.kind for problem in dataset.report.problems] == [Kind.BAD_NAME]
    assert (dataset.report.images, dataset.report.background) == (2, 1)


def test_crowds_and_ignored_faces_are_kept_apart(write: Write) -> None:
    annotations = [_face(), _face(iscrowd=1, bbox=[1, 2, 3, 4]), _face(ignore=1, bbox=[5, 6, 7, 8])]
    sample = _labelled(open_dataset(str(write(annotations))).samples[0])
    assert sample.labelled.boxes.tolist() == [[10, 12, 50, 62]]
    assert sample.ignored.tolist() == [[1, 2, 4, 6], [5, 6, 12, 14]]
