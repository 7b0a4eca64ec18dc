"""COCO json: boxes in `bbox` (x, y, width, height), landmarks in `keypoints` (five times x, y, visibility)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from facespec.errors import DataError
from trainer.data.dataset import Dataset, Entry, Kind, Label, Report, inside, make_dataset, to_numbers

FACE = "face"
"""Name of the category that is read where a file has several."""


def read_coco(file: Path, images: Path) -> Dataset:
    """Read the faces of a COCO json.

    Landmarks count as known if all five are visible or occluded, that is have visibility 1 or 2.

    Args:
        file: The json.
        images: Folder that its file names are relative to.

    Raises:
        DataError: The file cannot be read, is no COCO json, has several categories and none named "face", or leaves
            nothing to train on.
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
        path = inside(images, name)
        if path is None:
            report.add(place, Kind.BAD_NAME, name[:200])
            continue
        if picture["id"] in by_id:  # whose faces they are cannot be told
            report.add(place, Kind.MALFORMED, "its id is that of another image, too")
            by_id[picture["id"]].left_out += 1
            continue
        if path in entries:
            report.add(place, Kind.DUPLICATE_IMAGE, name)
        by_id[picture["id"]] = entries.setdefault(path, Entry(place))
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
        label, kind, found = _parse(row, annotation)
        if kind:
            report.add(place, kind, found)
        if label:
            entry.labels.append(label)
        else:
            entry.left_out += 1
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
    faces = [item.get("id") for item in categories if item.get("name") == FACE]
    if len(faces) != 1:
        names = ", ".join(str(item.get("name")) for item in categories[:5])
        raise DataError(f"{file}: which of its {len(categories)} categories is it ({names})? Name one '{FACE}'")
    return faces[0]


def _parse(row: int, annotation: dict[str, Any]) -> tuple[Label | None, Kind | None, str]:
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
