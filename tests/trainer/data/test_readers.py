from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facespec.errors import DataError
from facespec.images import write_image
from trainer.average_precision import load_ground_truth
from trainer.data import Dataset, FileSample, Problem, Report, open_dataset
from trainer.data.dataset import Faces, Kind, find_images, to_numbers

WIDTH, HEIGHT = 120, 80
KNOWN = "20 20 0.0 30 20 0.0 25 25 0.0 21 30 0.0 29 30 0.0 0.9"
UNKNOWN = " ".join(["-1.0"] * 15 + ["0.0"])

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a label file with images a.jpg, b.jpg, ... of 120x80 beside it."""

    def call(name: str, text: str, images: str = "abcdef") -> Path:
        for letter in images:
            write_image(tmp_path / "images" / f"{letter}.jpg", np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return call


def _samples(dataset: Dataset) -> dict[str, FileSample]:
    found = {}
    for sample in dataset.samples:
        assert isinstance(sample, FileSample)
        found[sample.path.name] = sample
    return found


def _problems(problems: list[Problem]) -> list[tuple[int, Kind]]:
    """Line or annotation, and kind."""
    return [(int(re.findall(r"\d+", problem.place)[-1]), problem.kind) for problem in problems]


def test_label_txt(make: Make) -> None:
    path = make("label.txt", f"# a.jpg\n10 12 30 40 {KNOWN}\n1 2 3 4 {UNKNOWN}\n5 6 7 8\n\n# b.jpg\n")
    dataset = open_dataset(str(path))
    first, second = dataset.samples
    image, faces = first.load()
    assert image.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(faces.boxes, [[10, 12, 40, 52], [1, 2, 4, 6], [5, 6, 12, 14]])
    np.testing.assert_array_equal(faces.has_landmarks, [True, False, False])
    np.testing.assert_array_equal(faces.landmarks[0], [[20, 20], [30, 20], [25, 25], [21, 30], [29, 30]])
    assert not faces.landmarks[1:].any()
    assert len(second.load()[1]) == 0
    report = dataset.report
    assert (report.images, report.background, report.faces, report.with_landmarks) == (2, 1, 3, 1)
    assert report.problems == []


def test_official_txt(make: Make) -> None:
    lines = "a.jpg\n2\n10 12 30 40 0 0 0 0 0 0 \n50 12 3 4 2 0 0 1 0 0 \nb.jpg\n0\n0 0 0 0 0 0 0 0 0 0 \n"
    dataset = open_dataset(str(make("wider_face_train_bbx_gt.txt", lines)))
    np.testing.assert_array_equal(dataset.samples[0].load()[1].boxes, [[10, 12, 40, 52]])
    assert len(dataset.samples[1].load()[1]) == 0
    assert _problems(dataset.report.problems) == [(4, Kind.INVALID)]
    assert (dataset.report.images, dataset.report.background, dataset.report.faces) == (2, 1, 1)


LABEL_LINES = [
    ("1 2 three 4", Kind.MALFORMED, False),
    ("1 2 3", Kind.MALFORMED, False),
    ("1 2 nan 4", Kind.MALFORMED, False),
    ("1 2 1e30 4", Kind.MALFORMED, False),
    ("nonsense", Kind.MALFORMED, False),
    ("1 2 3 4 5", Kind.MALFORMED, False),
    ("1 2 0 4", Kind.NO_AREA, False),
    ("1 2 3 -4", Kind.NO_AREA, False),
    ("10 10 20 20", Kind.DUPLICATE_BOX, False),
    ("1 2 3 4 5 5 0 -1 -1 -1 5 5 0 5 5 0 5 5 0 0.9", Kind.PARTIAL_LANDMARKS, True),
]


@pytest.mark.parametrize(("line", "kind", "kept"), LABEL_LINES, ids=[line for line, _, _ in LABEL_LINES])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_bad_line_is_named(make: Make, line: str, kind: Kind, kept: bool, end: str) -> None:
    path = make("label.txt", end.join(["# a.jpg", "10 10 20 20", line, "# b.jpg", "9 9 9 9", ""]))
    dataset = open_dataset(str(path))
    (problem,) = dataset.report.problems
    assert problem.place == f"{path}:3"
    assert problem.kind is kind
    samples = _samples(dataset)
    assert len(samples["a.jpg"].labelled) == 1 + kept
    assert not samples["a.jpg"].labelled.has_landmarks.any()
    np.testing.assert_array_equal(samples["b.jpg"].labelled.boxes, [[9, 9, 18, 18]])


def test_of_two_equal_boxes_the_one_with_landmarks_is_used(make: Make) -> None:
    path = make("label.txt", f"# a.jpg\n10 10 40 40\n10 10 40 40 {KNOWN}\n")
    sample = _samples(open_dataset(str(path)))["a.jpg"]
    assert sample.labelled.has_landmarks.tolist() == [True]
    assert sample.rows.tolist() == [3]


def test_an_image_named_twice_has_the_faces_of_both(make: Make) -> None:
    dataset = open_dataset(str(make("label.txt", "# a.jpg\n1 1 9 9\n# b.jpg\n1 1 9 9\n# a.jpg\n1 1 9 9\n2 2 9 9\n")))
    assert _problems(dataset.report.problems) == [(5, Kind.DUPLICATE_IMAGE), (6, Kind.DUPLICATE_BOX)]
    assert len(_samples(dataset)["a.jpg"].labelled) == 2


def test_official_counts(make: Make) -> None:
    row = "{} 1 9 9 0 0 0 0 0 0"
    lines = ["a.jpg", "1", row.format(1), row.format(2), "b.jpg", row.format(3), "c.jpg", "2", row.format(4)]
    dataset = open_dataset(str(make("wider_face_train_bbx_gt.txt", "\n".join(lines))))
    assert _problems(dataset.report.problems) == [(line, Kind.WRONG_COUNT) for line in (1, 5, 7)]
    assert [len(sample.labelled) for sample in _samples(dataset).values()] == [2, 1, 1]


def test_an_image_whose_faces_are_all_left_out_is_no_background(make: Make) -> None:
    dataset = open_dataset(str(make("w.txt", "a.jpg\n1\n1 1 9 9 0 0 0 1 0 0\nb.jpg\n1\n1 1 9 9 0 0 0 0 0 0\n")))
    assert _problems(dataset.report.problems) == [(3, Kind.INVALID), (1, Kind.ALL_LEFT_OUT)]
    assert list(_samples(dataset)) == ["b.jpg"]


def test_missing_images_are_counted_and_an_error_if_there_are_no_others(make: Make, tmp_path: Path) -> None:
    text = "# a.jpg\n1 1 9 9\n# b.jpg\n1 1 9 9\n"
    dataset = open_dataset(str(make("label.txt", text, images="b")))
    assert _problems(dataset.report.problems) == [(1, Kind.MISSING_IMAGE)]
    assert "1  image file not there" in dataset.report.summary()
    (path := tmp_path / "images" / "b.jpg").unlink()
    with pytest.raises(
        DataError, match=rf"none of its 2 images is there.*x/a\.jpg; searched: {path.parent}, {tmp_path};"
    ):
        open_dataset(str(make("label.txt", text.replace("# ", "# x/"), images="")))


def test_what_reaches_out_of_the_image_is_cut(make: Make) -> None:
    inside = "119.5 40 0 120.9 40 0 119 45 0 118 50 0 119 50 0 1"
    outside = "119.5 40 0 122 40 0 119 45 0 118 50 0 119 50 0 1"
    lines = ["# a.jpg", "-5 -6 20 20", f"100 30 30 30 {inside}", f"101 30 30 60 {outside}", "120 0 5 5", "0 0 120 80"]
    sample = _samples(open_dataset(str(make("label.txt", "\n".join(lines)))))["a.jpg"]
    report = Report()
    faces = sample.faces_in((HEIGHT, WIDTH), report)
    np.testing.assert_array_equal(
        faces.boxes, [[0, 0, 15, 14], [100, 30, 120, 60], [101, 30, 120, 80], [0, 0, 120, 80]]
    )
    np.testing.assert_array_equal(faces.has_landmarks, [False, True, False, False])
    assert faces.landmarks[1].tolist()[:2] == [[119.5, 40], [120, 40]]
    assert sorted(_problems(report.problems), key=lambda item: (item[0], item[1].name)) == [
        (2, Kind.CLIPPED),
        (3, Kind.CLIPPED),
        (4, Kind.CLIPPED),
        (4, Kind.LANDMARKS_OUTSIDE),
        (5, Kind.OUTSIDE),
    ]
    np.testing.assert_array_equal(sample.load()[1].boxes, faces.boxes)


def _coco(**changes: Any) -> dict[str, Any]:
    face = {"id": 7, "image_id": 1, "bbox": [10, 12, 30, 40], "keypoints": [], "iscrowd": 0, "category_id": 1}
    points = [[20, 20, 2], [30, 20, 1], [25, 25, 2], [21, 30, 2], [29, 30, 2]]
    known = {**face, "id": 8, "bbox": [11, 12, 30, 40], "keypoints": [value for point in points for value in point]}
    data = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "categories": [{"id": 1, "name": "face"}],
        "annotations": [known, {**face, **changes}],
    }
    return data


def test_coco(make: Make) -> None:
    dataset = open_dataset(str(make("faces.json", json.dumps(_coco()))))
    samples = _samples(dataset)
    faces = samples["a.jpg"].load()[1]
    np.testing.assert_array_equal(faces.boxes, [[11, 12, 41, 52], [10, 12, 40, 52]])
    np.testing.assert_array_equal(faces.has_landmarks, [True, False])
    np.testing.assert_array_equal(faces.landmarks[0], [[20, 20], [30, 20], [25, 25], [21, 30], [29, 30]])
    assert len(samples["b.jpg"].load()[1]) == 0
    assert dataset.report.problems == []


@pytest.mark.parametrize(
    ("changes", "kind", "kept"),
    [
        ({"iscrowd": 1}, Kind.CROWD, False),
        ({"bbox": [1, 2, 3]}, Kind.MALFORMED, False),
        ({"bbox": None}, Kind.MALFORMED, False),
        ({"bbox": [1, 2, "x", 4]}, Kind.MALFORMED, False),
        ({"bbox": [1, 2, 0, 4]}, Kind.NO_AREA, False),
        ({"keypoints": [1, 2, 2] * 17}, Kind.OTHER_KEYPOINTS, True),
        ({"keypoints": [1, 2, 2] * 68}, Kind.OTHER_KEYPOINTS, True),
        ({"keypoints": "none"}, Kind.OTHER_KEYPOINTS, True),
        ({"keypoints": [None, 2, 2] * 5}, Kind.OTHER_KEYPOINTS, True),
        ({"ignore": 1}, Kind.INVALID, False),
        ({"id": 10**30, "bbox": None}, Kind.MALFORMED, False),
        ({"keypoints": [20, 20, 2, 30, 20, 2, 25, 25, 0, 21, 30, 2, 29, 30, 2]}, Kind.PARTIAL_LANDMARKS, True),
    ],
)
def test_every_bad_annotation_is_named(make: Make, changes: dict[str, Any], kind: Kind, kept: bool) -> None:
    dataset = open_dataset(str(make("faces.json", json.dumps(_coco(**changes)))))
    assert [problem.kind for problem in dataset.report.problems] == [kind]
    if "id" not in changes:
        assert _problems(dataset.report.problems) == [(7, kind)]
    assert _samples(dataset)["a.jpg"].labelled.has_landmarks.tolist() == [True] + [False] * kept


def test_faces_of_an_unknown_image_make_no_background(make: Make) -> None:
    """They may be those of an image that has none."""
    dataset = open_dataset(str(make("faces.json", json.dumps(_coco(image_id=99)))))
    assert [problem.kind for problem in dataset.report.problems] == [Kind.MALFORMED, Kind.ALL_LEFT_OUT]
    assert list(_samples(dataset)) == ["a.jpg"]


def test_two_images_with_one_id_make_no_background(make: Make) -> None:
    data = _coco()
    data["images"][1]["id"] = 1
    dataset = open_dataset(str(make("faces.json", json.dumps(data))))
    assert [problem.kind for problem in dataset.report.problems] == [Kind.MALFORMED]
    assert list(_samples(dataset)) == ["a.jpg"]
    data = _coco()
    data["images"][1]["id"] = True
    kinds = [problem.kind for problem in open_dataset(str(make("faces.json", json.dumps(data)))).report.problems]
    assert kinds == [Kind.MALFORMED]


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../a.jpg", "x/../../a.jpg", "..\\a.jpg", "C:\\a.jpg"])
def test_images_outside_of_their_folder_are_left_out(name: str, make: Make) -> None:
    text = f"# {name}\n10 10 20 20\n# a.jpg\n10 10 20 20\n"
    dataset = open_dataset(str(make("label.txt", text)))
    assert [problem.kind for problem in dataset.report.problems] == [Kind.BAD_NAME]
    assert list(_samples(dataset)) == ["a.jpg"]
    data = _coco()
    data["images"].append({"id": 3, "file_name": name})
    dataset = open_dataset(str(make("faces.json", json.dumps(data))))
    assert [problem.kind for problem in dataset.report.problems] == [Kind.BAD_NAME]


def test_a_name_too_long_for_a_file_is_missing(make: Make) -> None:
    dataset = open_dataset(str(make("label.txt", f"# {'x' * 400}.jpg\n10 10 20 20\n# a.jpg\n10 10 20 20\n")))
    assert [problem.kind for problem in dataset.report.problems] == [Kind.MISSING_IMAGE]


def test_coco_landmarks_that_are_all_invisible_are_simply_unknown(make: Make) -> None:
    dataset = open_dataset(str(make("faces.json", json.dumps(_coco(keypoints=[0] * 15)))))
    assert dataset.report.problems == []
    assert dataset.report.with_landmarks == 1


def test_coco_with_several_categories_reads_the_one_called_face(make: Make) -> None:
    data = _coco(category_id=2)
    data["categories"].append({"id": 2, "name": "dog"})
    assert open_dataset(str(make("faces.json", json.dumps(data)))).report.faces == 1
    data["categories"][0]["name"] = "cat"
    with pytest.raises(DataError, match="which of its 2 categories are faces"):
        open_dataset(str(make("faces.json", json.dumps(data))))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("label.txt", "", "the first line must be"),
        ("label.txt", "1 2 3 4\n", "the first line must be"),
        ("label.txt", "# a.jpg\n1 2 0 0\n", "no usable face in 1 image; 2 problems"),
        ("label.txt", "# a.jpg\n", "no usable face"),
        ("faces.json", "{", "cannot be read as JSON"),
        ("faces.json", "[]", "no COCO json"),
        ("faces.json", '{"images": [1], "annotations": []}', "no COCO json"),
    ],
)
def test_files_that_hold_nothing_are_refused(make: Make, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        open_dataset(str(make(name, text)))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(make: Make) -> None:
    path = make("label.txt", "")
    path.write_bytes(b"# a.jpg\n\xff\xfe\n")
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(str(path))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_image_stops_training_by_name(make: Make, damage: str) -> None:
    dataset = open_dataset(str(make("label.txt", "# a.jpg\n1 1 9 9\n")))
    path = Path(dataset.samples[0].name)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.jpg"):
        dataset.samples[0].load()


OFFICIAL = "0--Parade/a.jpg\n1\n1 1 9 9 0 0 0 0 0 0\n"
LABELS = "# 0--Parade/a.jpg\n2 2 9 9\n"


@pytest.mark.parametrize(
    ("labels", "images", "left"),
    [
        ({"wider_face_split/wider_face_train_bbx_gt.txt": OFFICIAL}, "WIDER_train/images", 1),
        ({"train/wider_face_train_bbx_gt.txt": OFFICIAL}, "train/images", 1),
        ({"train/wider_face_train_bbx_gt.txt": OFFICIAL, "train/label.txt": LABELS}, "train/images", 2),
        ({"train/label.txt": LABELS}, "WIDER_train/images", 2),
        ({"label.txt": LABELS}, "images", 2),
        ({"label.txt": LABELS}, "", 2),
    ],
)
def test_layouts_of_wider_face(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: dict[str, str], images: str, left: float
) -> None:
    write_image(tmp_path / images / "0--Parade" / "a.jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    for name, text in labels.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("WIDERFACE_ROOT", str(tmp_path))
    for dataset in (
        open_dataset("widerface"),
        open_dataset("widerface", root=tmp_path),
        open_dataset(str(tmp_path)),
    ):
        assert dataset.samples[0].load()[1].boxes[0, 0] == left
    if images != "WIDER_train/images" or "wider_face_split" in next(iter(labels)):
        assert open_dataset(str(tmp_path / next(iter(labels)))).report.images == 1


def test_what_is_not_there_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WIDERFACE_ROOT", raising=False)
    with pytest.raises(DataError, match=r"data/widerface.*WIDER FACE.*label\.txt.*--data synthetic") as error:
        open_dataset("widerface")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no such file or folder"):
        open_dataset("nowhere")
    with pytest.raises(DataError, match=r"no label\.txt"):
        open_dataset(str(tmp_path))


@pytest.mark.data
def test_the_dev_images_have_the_boxes_of_the_official_matlab_file(widerface: Path) -> None:
    dataset = open_dataset("widerface", "val", widerface)
    truth = {name: image.boxes_xywh for (_, name), image in load_ground_truth(widerface / "gt").items()}
    for name, sample in _samples(dataset).items():
        official = truth[Path(name).stem]
        corners = np.hstack([official[:, :2], official[:, :2] + official[:, 2:]])
        assert {tuple(box) for box in sample.labelled.boxes.tolist()} <= {tuple(box) for box in corners.tolist()}
    lines = [line.split() for line in (widerface / "val" / "wider_face_val_bbx_gt.txt").read_text().splitlines()]
    invalid = Counter(fields[7] for fields in lines if len(fields) == 10)
    assert dataset.report.counts()[Kind.INVALID] == invalid["1"]
    assert dataset.report.faces == invalid["0"]
    assert dataset.report.images == 323


@pytest.mark.data
def test_the_training_labels_lose_nothing_unseen(widerface: Path) -> None:
    file = widerface / "train" / "label.txt"
    if not file.is_file():
        pytest.skip("the training part of WIDER FACE is not on this machine")
    dataset = open_dataset("widerface", "train", widerface)
    lines = file.read_text().splitlines()
    faces = [line for line in lines if line[0] != "#"]
    nothing = [line for line in faces if line.startswith("0 0 0 0 ")]
    counts = dataset.report.counts()
    assert dataset.report.images == sum(line[0] == "#" for line in lines)
    assert dataset.report.background == len(nothing)
    assert dataset.report.faces == len(faces) - len(nothing) - counts[Kind.NO_AREA] - counts[Kind.DUPLICATE_BOX]
    assert sum(counts.values()) <= 5


@pytest.mark.parametrize(("x", "y"), [(-1.0, 30), (WIDTH + 1.0, 30), (40, -1.0), (40, HEIGHT + 1.0)])
def test_landmarks_up_to_a_pixel_outside_are_on_the_edge(make: Make, x: float, y: float) -> None:
    line = "0 0 120 80 20 20 0 60 20 0 {} {} 0 30 40 0 50 40 0 1"
    away = x + 0.01 * ((x > WIDTH) - (x < 0)), y + 0.01 * ((y > HEIGHT) - (y < 0))
    for (nose_x, nose_y), known in (((x, y), True), (away, False)):
        text = f"# a.jpg\n{line.format(nose_x, nose_y)}\n"
        faces = _samples(open_dataset(str(make("label.txt", text))))["a.jpg"].load()[1]
        assert faces.has_landmarks.tolist() == [known]
        nose = [min(max(x, 0), WIDTH), min(max(y, 0), HEIGHT)]
        assert faces.landmarks[0].tolist() == (
            [[20, 20], [60, 20], nose, [30, 40], [50, 40]] if known else [[0, 0]] * 5
        )


def test_numbers_are_those_that_a_pixel_could_have() -> None:
    assert to_numbers(["1", 2, "1e6", -1e6]) == [1.0, 2.0, 1e6, -1e6]
    for bad in ("1000001", "-1000001", "nan", "inf", "x", None, [1], 10**400):
        assert to_numbers(["1", bad]) is None


def test_paths_stay_in_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("a/b.jpg", "a..b.jpg", "c.jpg", "../outside.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found = find_images(["a/b.jpg", "a\\b.jpg", "a..b.jpg", "x.jpg", "../outside.jpg", "", "/"], [folder])
    assert found == {
        "a/b.jpg": folder / "a" / "b.jpg",
        "a\\b.jpg": folder / "a" / "b.jpg",
        "a..b.jpg": folder / "a..b.jpg",
        "x.jpg": folder / "x.jpg",
        "../outside.jpg": None,
        "": None,
        "/": None,
    }


@pytest.mark.parametrize(
    "name",
    [
        "e/a.jpg", "/e/a.jpg", "./e/a.jpg", "images/e/a.jpg", "WIDER_train/images/e/a.jpg", "e\\a.jpg", "e/a",
        "/home/them/data/WIDER_train/images/e/a.jpg", "C:\\data\\images\\e\\a.jpg", "../images/e/a.jpg",
        "..\\..\\label-studio\\media\\upload\\4\\a.jpg", "https://host/bucket/images/e/a.jpg?token=1",
        "s3://bucket/e/a.jpg", "/data/local-files/?d=faces/e%2Fa.jpg", "a.jpg",
    ],
)  # fmt: skip
def test_names_of_elsewhere_mean_the_files_that_are_here(name: str, tmp_path: Path) -> None:
    folders = [tmp_path / "images", tmp_path, tmp_path / "images" / "e"]
    image = tmp_path / "images" / "e" / "a.jpg"
    write_image(image, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    assert find_images([name], folders) == {name: image}


def test_the_end_of_a_name_is_no_name_where_it_could_mean_two_images(tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.jpg").touch()
    names = ["upload/3/a.jpg", "upload/4/a.jpg", "b.jpg", "elsewhere/b.jpg"]
    assert find_images(names, [tmp_path]) == {
        "upload/3/a.jpg": None,
        "upload/4/a.jpg": None,
        "b.jpg": tmp_path / "b.jpg",
        "elsewhere/b.jpg": None,
    }


def test_the_names_are_those_of_the_images_in_order_wherever_they_lie() -> None:
    def names_of(*paths: str) -> str:
        samples = [FileSample(Path(path)) for path in paths]
        return Dataset("d", samples, Report()).names()

    expected = "e/1.jpg\ne/2.jpg"
    assert names_of("/x/e/1.jpg", "/x/e/2.jpg") == names_of("elsewhere/e/1.jpg", "e/2.jpg") == expected
    for other in (("e/2.jpg", "e/1.jpg"), ("e/1.jpg",), ("f/1.jpg", "f/2.jpg"), ("e/1.jpg", "e/3.jpg")):
        assert names_of(*other) != expected


def test_a_report_counts_and_speaks() -> None:
    report = Report(1201, 3, 34568, 9, [Problem("f:3", Kind.OUTSIDE, "1 2 3 4"), Problem("f:4", Kind.NO_AREA, "x")])
    report.add("g:1", Kind.OUTSIDE, "y")
    assert (report.images, report.background, report.faces, report.with_landmarks) == (1201, 3, 34568, 9)
    assert list(report.counts().items()) == [(Kind.NO_AREA, 1), (Kind.OUTSIDE, 2)]
    assert report.summary().splitlines() == [
        "1,201 images (3 without faces), 34,568 faces (9 with landmarks)",
        "       1  box without area: dropped",
        "       2  box outside the image: dropped",
    ]
    assert [str(problem) for problem in report.problems] == [
        "f:3: box outside the image: dropped (1 2 3 4)",
        "f:4: box without area: dropped (x)",
        "g:1: box outside the image: dropped (y)",
    ]
    box = np.array([[1, 1, 5, 5]], np.float32)
    report.count_faces(Faces(box, np.zeros((1, 5, 2), np.float32), np.ones(1, bool)))
    report.count_faces(Faces.none())
    assert (report.images, report.background, report.faces, report.with_landmarks) == (1203, 4, 34569, 10)


def test_a_face_without_area_makes_no_background_but_one_given_twice_is_one(make: Make) -> None:
    text = "# a.jpg\n5 5 0 9\n# b.jpg\n1 1 9 9\n1 1 9 9\n# c.jpg\n1 1 9 9\n3 3 9 0\n"
    dataset = open_dataset(str(make("label.txt", text)))
    assert _problems(dataset.report.problems) == [
        (2, Kind.NO_AREA),
        (1, Kind.ALL_LEFT_OUT),
        (5, Kind.DUPLICATE_BOX),
        (8, Kind.NO_AREA),
    ]
    assert {name: len(sample.labelled) for name, sample in _samples(dataset).items()} == {"b.jpg": 1, "c.jpg": 1}


def test_an_image_labelled_with_a_line_of_zeros_is_background(make: Make) -> None:
    text = f"# a.jpg\n0 0 0 0 {UNKNOWN}\n# b.jpg\n1 1 9 9\n0 0 0 0\n"
    dataset = open_dataset(str(make("label.txt", text)))
    assert _problems(dataset.report.problems) == [(5, Kind.NO_AREA)]  # beside another it is no such line
    assert (dataset.report.images, dataset.report.background) == (2, 1)


def test_coco_crowds_and_categories_leave_images_out(make: Make) -> None:
    data = _coco(image_id=2, iscrowd=1)
    dataset = open_dataset(str(make("faces.json", json.dumps(data))))
    assert [problem.kind for problem in dataset.report.problems] == [Kind.CROWD, Kind.ALL_LEFT_OUT]
    assert list(_samples(dataset)) == ["a.jpg"]
    # a dog is no face that is left out: the image shows what is none
    data = _coco(image_id=2, category_id=2)
    data["categories"].append({"id": 2, "name": "dog"})
    dataset = open_dataset(str(make("faces.json", json.dumps(data))))
    assert dataset.report.problems == []
    assert (dataset.report.images, dataset.report.background) == (2, 1)
    del data["annotations"][1]["category_id"]
    dataset = open_dataset(str(make("faces.json", json.dumps(data))))
    assert [(problem.kind, problem.found) for problem in dataset.report.problems] == [
        (Kind.MALFORMED, "no category_id"),
        (Kind.ALL_LEFT_OUT, "b.jpg"),
    ]
    # one category needs no name, and two of it are as bad as none
    data = _coco(category_id=9)
    data["categories"][0]["name"] = "cat"
    assert open_dataset(str(make("faces.json", json.dumps(data)))).report.faces == 2
    data["categories"] += [{"id": 2, "name": "face"}, {"id": 3, "name": "face"}]
    told = r"which of its 2 categories are faces: 'cat' \(1 annotations\), '9' \(1 annotations\)\? Say --category NAME"
    with pytest.raises(DataError, match=told):
        open_dataset(str(make("faces.json", json.dumps(data))))


def test_coco_images_are_named_once_and_by_their_id(make: Make) -> None:
    data = _coco(image_id="two")
    data["images"] = [
        {"id": 1, "file_name": "a.jpg"}, {"id": "two", "file_name": "a.jpg"}, {"id": 3}, {"file_name": "b.jpg"},
        {"id": 4, "file_name": ""}, {"id": 5, "file_name": "c.jpg"},
    ]  # fmt: skip
    path = make("faces.json", json.dumps(data))
    dataset = open_dataset(str(path))
    assert [(problem.place, problem.kind) for problem in dataset.report.problems] == [
        (f"{path}: image two", Kind.DUPLICATE_IMAGE),
        (f"{path}: image 3", Kind.MALFORMED),
        (f"{path}: image number 3", Kind.MALFORMED),
        (f"{path}: image 4", Kind.MALFORMED),
    ]
    assert {name: len(sample.labelled) for name, sample in _samples(dataset).items()} == {"a.jpg": 2, "c.jpg": 0}
    data["annotations"] = "none"
    with pytest.raises(DataError, match="must have a list of 'images' and one of 'annotations'"):
        open_dataset(str(make("faces.json", json.dumps(data))))


def test_rows_are_counted_in_what_the_file_counts(make: Make) -> None:
    text = "# a.jpg\n\n-5 1 20 20\n"
    path = make("label.txt", text)
    report = Report()
    _samples(open_dataset(str(path)))["a.jpg"].faces_in((HEIGHT, WIDTH), report)
    assert [problem.place for problem in report.problems] == [f"{path}:3"]
    assert report.problems[0].found == "-5 1 15 21 in 120x80 a.jpg"
    path = make("faces.json", json.dumps(_coco(bbox=[-5, 1, 20, 20])))
    report = Report()
    _samples(open_dataset(str(path)))["a.jpg"].faces_in((HEIGHT, WIDTH), report)
    assert [problem.place for problem in report.problems] == [f"{path}: annotation 7"]


def test_each_split_has_its_own_labels_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WIDERFACE_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    root, other = tmp_path / "data" / "widerface", tmp_path / "other"
    for place, names in ((root, {"train": "a", "val": "b"}), (other, {"train": "c", "val": "d"})):
        for split, letter in names.items():
            write_image(place / f"WIDER_{split}" / "images" / "e" / f"{letter}.jpg", np.zeros((9, 9, 3), np.uint8))
            file = place / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"e/{letter}.jpg\n1\n1 1 5 5 0 0 0 0 0 0\n")
    for split, letter in (("train", "a"), ("val", "b")):
        for dataset, name in (
            (open_dataset("widerface", split), "widerface"),  # type: ignore[arg-type]
            (open_dataset(str(root), split), str(root)),  # type: ignore[arg-type]
            (open_dataset(str(root / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt")), None),
        ):
            assert list(_samples(dataset)) == [f"{letter}.jpg"]
            assert name is None or dataset.name == name
    monkeypatch.setenv("WIDERFACE_ROOT", str(other))
    assert list(_samples(open_dataset("widerface"))) == ["c.jpg"]
    assert list(_samples(open_dataset("widerface", "val", root))) == ["b.jpg"]  # what is said wins
    shutil.rmtree(other / "WIDER_val")
    with pytest.raises(DataError, match=r"--data widerface: no labelled val images in .*other: unpack WIDER FACE"):
        open_dataset("widerface", "val")


def test_a_json_is_known_by_its_suffix_whatever_its_case(make: Make) -> None:
    assert open_dataset(str(make("FACES.JSON", json.dumps(_coco())))).report.faces == 2


def test_lines_may_lack_the_quality_or_all_but_the_box(make: Make) -> None:
    without = KNOWN.rpartition(" ")[0]
    text = f"\ufeff#a.JPG\n10\t12 30\t 40 {without}\n1\t2\t3\t4\t\n1 2 30 40 0 0 0 0 0 0\n"
    path = make("label.txt", text, images="")
    write_image(path.parent / "images" / "a.jpg", np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    (path.parent / "images" / "a.jpg").rename(path.parent / "images" / "a.JPG")
    dataset = open_dataset(str(path))
    faces = dataset.samples[0].load()[1]
    np.testing.assert_array_equal(faces.boxes, [[10, 12, 40, 52], [1, 2, 4, 6]])
    assert faces.landmarks[0].tolist() == [[20, 20], [30, 20], [25, 25], [21, 30], [29, 30]]
    assert _problems(dataset.report.problems) == [(4, Kind.MALFORMED)]  # of the other form
    text = f"a.JPG\n3\n10 12 30 40\n1 2 3 4 0 0 0 0 0 0\n1 2 30 40 {without}\n"
    path.with_name("official.txt").write_text(text)
    dataset = open_dataset(str(path.with_name("official.txt")))
    np.testing.assert_array_equal(dataset.samples[0].load()[1].boxes, [[10, 12, 40, 52], [1, 2, 4, 6]])
    assert _problems(dataset.report.problems) == [(5, Kind.MALFORMED)]
    assert dataset.name == str(path.with_name("official.txt"))
