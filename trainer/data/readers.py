"""Finding a data set by the name or path that a command is given, and reading its labels: text or COCO json.

The official text file of WIDER FACE names an image, then gives the number of its faces and a line for each (an image
without faces has 0 and a line of zeros):

    0--Parade/0_Parade_marchingband_1_849.jpg
    1
    449 330 122 149 0 0 0 0 0 0

x y w h, blur, expression, illumination, invalid, occlusion, pose. label.txt, of the authors of RetinaFace, says

    # 0--Parade/0_Parade_marchingband_1_849.jpg
    449 330 122 149 488.9 373.6 0.0 542.1 376.4 0.0 515.0 412.8 0.0 485.2 425.9 0.0 538.4 431.5 0.0 0.82

x y w h, five times x y flag, quality; -1 for landmarks that are unknown, or x y w h alone. An image without lines, or
with one whose box is 0 0 0 0, has no faces.

COCO json has boxes in `bbox` (x, y, width, height) and landmarks in `keypoints` (five times x, y, visibility).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from facespec.errors import DataError
from facespec.files import widerface_root
from facespec.images import IMAGE_SUFFIXES
from trainer.data.dataset import Dataset, Entry, Kind, Label, Report, inside, make_dataset, to_numbers
from trainer.data.synthetic import synthetic

WIDERFACE, SYNTHETIC = "widerface", "synthetic"

HELP = (
    "unpack WIDER FACE there (images and wider_face_split from its project page, shuoyang1213.me/WIDERFACE; label.txt "
    "with landmarks from the RetinaFace annotations), name its folder with --data or WIDERFACE_ROOT, or try "
    f"--data {SYNTHETIC}, which needs no download"
)

Split = Literal["train", "val"]

_INVALID = 7
_UNKNOWN = -1.0
_NOTHING = ["0"] * 4  # the box of the only line of an image without faces, in both forms

Row = tuple[int, str]


def open_dataset(name_or_path: str, split: Split = "train", root: str | Path | None = None) -> Dataset:
    """Open a data set.

    Images are expected in the folder `images` beside the label file or, where there is none, beside it.

    Args:
        name_or_path: "widerface", "synthetic", the path of a label.txt, of a WIDER FACE *_bbx_gt.txt or of a COCO
            .json, or a folder: of WIDER FACE or with a label.txt.
        split: "train" or "val". A file is what it is, whatever the split.
        root: Folder of WIDER FACE: with train/images and train/label.txt, or as its archives unpack: WIDER_train/images
            and wider_face_split. By default $WIDERFACE_ROOT, or data/widerface.

    Raises:
        DataError: There is no such data set, or it cannot be used.
    """
    if name_or_path == SYNTHETIC:
        return synthetic(split)
    named = name_or_path == WIDERFACE
    path = Path((root or widerface_root()) if named else name_or_path)
    if named or path.is_dir():
        if found := _find_widerface(path, split):
            return _read_text(*found, name=WIDERFACE if named else str(path))
        if named:
            raise DataError(f"--data {WIDERFACE}: no labelled {split} images in {path}: {HELP}")
        raise DataError(f"--data {path}: no label.txt and no labelled {split} images of WIDER FACE in this folder")
    if not path.is_file():
        raise DataError(f"--data {name_or_path}: no such file or folder, and not one of {WIDERFACE}, {SYNTHETIC}")
    images = _first_folder([path.parent / "images", path.parent])
    if path.suffix.lower() == ".json":
        return _read_coco(path, images or path.parent)
    unpacked = path.parent.parent / f"WIDER_{'val' if '_val_' in path.name else 'train'}" / "images"
    if path.parent.name == "wider_face_split" and unpacked.is_dir():
        images = unpacked
    return _read_text(path, images or path.parent)


def _find_widerface(root: Path, split: Split) -> tuple[Path, Path] | None:
    """Return the label file of a split, that with landmarks if there is one, and the folder of its images."""
    official = f"wider_face_{split}_bbx_gt.txt"
    files = [root / split / "label.txt", root / split / official, root / "wider_face_split" / official]
    file = next((file for file in files if file.is_file()), None)
    images = _first_folder([root / split / "images", root / f"WIDER_{split}" / "images"])
    if file and images:
        return file, images
    if (root / "label.txt").is_file():
        return root / "label.txt", _first_folder([root / "images"]) or root
    return None


def _first_folder(places: Iterable[Path]) -> Path | None:
    return next((place for place in places if place.is_dir()), None)


def _read_text(file: Path, images: Path, name: str = "") -> Dataset:
    """Read a text file in either of the two forms, its image names relative to a folder; its first line tells which."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    rows = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    first = rows[0][1] if rows else ""
    with_landmarks = first.startswith("#")
    if not with_landmarks and not _is_name(first):
        raise DataError(
            f"{file}: the first line must be '# image.jpg' (label.txt) or the name of an image "
            f"(wider_face_*_bbx_gt.txt), it is {first[:60]!r}"
        )
    report, entries = Report(), dict[Path, Entry]()
    for (number, title), faces in _by_image(rows):
        entry = _entry(entries, images, title.lstrip("# "), f"{file}:{number}", report)
        if entry is None:
            continue
        if not with_landmarks:
            faces, problem = _after_count(faces)
            if problem:
                report.add(f"{file}:{number}", Kind.WRONG_COUNT, problem)
        elif len(faces) == 1 and faces[0][1].split()[:4] == _NOTHING:
            faces = []
        for row, text in faces:
            label, kind = _parse_line(row, text, with_landmarks)
            if kind:
                report.add(f"{file}:{row}", kind, text[:60])
            entry.add(label)
    return make_dataset(name or str(file), entries, f"{file}:", report)


def _entry(entries: dict[Path, Entry], images: Path, name: str, place: str, report: Report) -> Entry | None:
    """Return the entry of an image, a new one if it has none; None if its name leads out of the images' folder."""
    path = inside(images, name)
    if path is None:
        report.add(place, Kind.BAD_NAME, name[:200])
        return None
    if path in entries:
        report.add(place, Kind.DUPLICATE_IMAGE, name)
    return entries.setdefault(path, Entry(place))


def _is_name(text: str) -> bool:
    """Whether a line names an image. Damaged numbers do not, or the faces after them would go to no image."""
    return text.startswith("#") or "/" in text or text.lower().endswith(IMAGE_SUFFIXES)


def _by_image(rows: list[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Yield the line of each image and the lines that follow it."""
    starts = [index for index, (_, text) in enumerate(rows) if _is_name(text)]
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield rows[start], rows[start + 1 : end]


def _after_count(rows: list[Row]) -> tuple[list[Row], str]:
    """Return the faces after the line that gives their number, and how they differ from it ("" if they do not)."""
    if not rows or not rows[0][1].isdecimal():
        return rows, f"no number of faces, {len(rows)} lines"
    count, faces = int(rows[0][1][:9]), rows[1:]
    if count == 0 and len(faces) == 1 and faces[0][1].split()[:4] == _NOTHING:
        faces = []
    return faces, "" if count == len(faces) else f"{count} faces announced, {len(faces)} lines"


def _parse_line(row: int, text: str, with_landmarks: bool) -> tuple[Label | None, Kind | None]:
    """Return the face of a line, unless it is left out, and what is wrong with it, if anything is."""
    values = to_numbers(text.split())
    if values is None or len(values) not in ((4, 19, 20) if with_landmarks else (4, 10)):
        return None, Kind.MALFORMED
    xywh, rest = values[:4], values[4:]
    if not with_landmarks:
        return (None, Kind.INVALID) if rest and rest[_INVALID - 4] else (Label(row, xywh), None)
    points = [value for index in range(0, len(rest) - 2, 3) for value in rest[index : index + 2]]
    if not points or points[0] == _UNKNOWN:
        return Label(row, xywh), None
    if any(pair == (_UNKNOWN, _UNKNOWN) for pair in zip(points[::2], points[1::2], strict=True)):
        return Label(row, xywh), Kind.PARTIAL_LANDMARKS
    return Label(row, xywh, points), None


def _read_coco(file: Path, images: Path) -> Dataset:
    """Read the faces of a COCO json: of the category "face" where it has several.

    Landmarks count as known if all five are visible or occluded, that is have visibility 1 or 2.
    """
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error})") from None
    pictures, annotations = (_objects(data, part) for part in ("images", "annotations"))
    if not pictures or annotations is None:
        raise DataError(f"{file}: no COCO json: it must have a list of 'images' and one of 'annotations'")
    category = _category(file, _objects(data, "categories") or [])
    report, entries, by_id = Report(), dict[Path, Entry](), dict[Any, Entry]()
    for index, picture in enumerate(pictures):
        place, name = f"{file}: image {picture.get('id', f'number {index}')}", picture.get("file_name")
        if not isinstance(name, str) or not name or type(picture.get("id")) not in (int, str):
            report.add(place, Kind.MALFORMED, f"id {picture.get('id')!r}, file_name {name!r}"[:200])
            continue
        if picture["id"] in by_id:  # whose faces they are cannot be told
            report.add(place, Kind.MALFORMED, "its id is that of another image, too")
            by_id[picture["id"]].left_out += 1
        elif entry := _entry(entries, images, name, place, report):
            by_id[picture["id"]] = entry
    lost = 0
    for index, annotation in enumerate(annotations):
        row = annotation.get("id")
        row = row if type(row) is int and 0 <= row < 1 << 63 else index
        place, image = f"{file}: annotation {row}", annotation.get("image_id")
        entry = by_id.get(image) if type(image) in (int, str) else None
        if entry is None:
            report.add(place, Kind.MALFORMED, f"image_id {image!r} is no image"[:200])
            lost += 1
            continue
        if category is not None and "category_id" not in annotation:
            report.add(place, Kind.MALFORMED, "no category_id")
            entry.left_out += 1
            continue
        if category is not None and annotation["category_id"] != category:
            continue
        label, kind, found = _parse_annotation(row, annotation)
        if kind:
            report.add(place, kind, found)
        entry.add(label)
    if lost:  # an image without annotations may be the one they are of
        for entry in entries.values():
            entry.left_out += not entry.labels
    return make_dataset(str(file), entries, f"{file}: annotation ", report)


def _objects(data: Any, part: str) -> list[dict[str, Any]] | None:
    """Return a list of objects of a json, or None if it is anything else."""
    found = data.get(part) if isinstance(data, dict) else None
    return found if isinstance(found, list) and all(isinstance(item, dict) for item in found) else None


def _category(file: Path, categories: list[dict[str, Any]]) -> Any:
    """Return the id of the category of faces, or None where there is no choice."""
    if len(categories) < 2:
        return None
    faces = [item.get("id") for item in categories if item.get("name") == "face"]
    if len(faces) != 1:
        names = ", ".join(str(item.get("name")) for item in categories[:5])
        raise DataError(f"{file}: which of its {len(categories)} categories is it ({names})? Name one 'face'")
    return faces[0]


def _parse_annotation(row: int, annotation: dict[str, Any]) -> tuple[Label | None, Kind | None, str]:
    """Return the face of an annotation, unless it is left out, what is wrong with it, if anything is, and its text."""
    box, keypoints = annotation.get("bbox"), annotation.get("keypoints") or []
    xywh = to_numbers(box) if isinstance(box, list) else None
    values = to_numbers(keypoints) if isinstance(keypoints, list) else None
    if xywh is None or len(xywh) != 4:
        return None, Kind.MALFORMED, f"bbox {box!r}"[:60]
    if annotation.get("iscrowd"):
        return None, Kind.CROWD, f"bbox {box!r}"[:60]
    if values is None or len(values) not in (0, 15):
        return None, Kind.MALFORMED, f"keypoints must be 15 numbers, they are {keypoints!r}"[:90]
    visible = [visibility > 0 for visibility in values[2::3]]
    if not any(visible):
        return Label(row, xywh), None, ""
    if not all(visible):
        return Label(row, xywh), Kind.PARTIAL_LANDMARKS, f"{sum(visible)} of 5"
    return Label(row, xywh, [value for index in range(0, 15, 3) for value in values[index : index + 2]]), None, ""
