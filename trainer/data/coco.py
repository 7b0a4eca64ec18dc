"""Reading the faces of a COCO json, as Label Studio, CVAT, Roboflow and COCO itself write it; see docs/data.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from facespec.errors import DataError
from trainer.data.augment import MIRRORED
from trainer.data.dataset import Dataset, Entry, Kind, Label, Report, add_entry, find_images, make_dataset, to_numbers

_PARTS = (("left", "eye"), ("right", "eye"), ("", "nose"), ("left", "mouth"), ("right", "mouth"))
_WORDS = {"eye": "eye|pupil", "nose": "nose", "mouth": "mouth|lip"}

Id = int | str | None


@dataclass
class _Landmarks:
    """The landmarks of a category.

    Attributes:
        names: Those of its keypoints; empty where they have none.
        columns: Which keypoints are the five, in our order; None if their names say that they are not.
        votes: For each face whether what comes first in them is left as seen in the image: see `_handedness`.
    """

    names: tuple[str, ...] = ()
    columns: tuple[int, ...] | None = (0, 1, 2, 3, 4)
    votes: list[int] = field(default_factory=list)


def read_coco(file: Path, folders: Sequence[Path], category: str | None = None) -> Dataset:
    """Read the faces of a COCO json.

    Landmarks count as known if all five are visible or occluded, that is have visibility 1 or 2.

    Args:
        file: With `images`, `annotations` and, where there are several, `categories`.
        folders: Where its images may lie.
        category: Names or ids of the categories of faces, with commas between them; None takes those called "face" or,
            if no annotation is of such a one, the only category that has annotations.

    Raises:
        DataError: It is no such file, the category cannot be told, or nothing is left to train on.
    """
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error})") from None
    pictures, annotations = (_objects(data, part) for part in ("images", "annotations"))
    if not pictures or annotations is None:
        raise DataError(f"{file}: no COCO json: it must have a list of 'images' and one of 'annotations'")
    report, by_id = Report(), dict[Id, Entry | None]()
    categories = {item["id"]: item for item in _objects(data, "categories") or [] if type(item.get("id")) in (int, str)}
    chosen = _choose(file, categories, annotations, category, report)
    entries = _read_images(file, pictures, folders, by_id, report)
    landmarks: dict[Id, _Landmarks] = {}
    labels: list[tuple[Entry, Label | None, _Landmarks]] = []
    lost = 0
    for index, annotation in enumerate(annotations):
        row = annotation.get("id")
        row = row if type(row) is int and 0 <= row < 1 << 63 else index
        place, image = f"{file}: annotation {row}", annotation.get("image_id")
        if type(image) not in (int, str) or image not in by_id:
            report.add(place, Kind.MALFORMED, f"image_id {image!r} is no image"[:200])
            lost += 1
            continue
        entry, of = by_id[image], annotation.get("category_id")
        if entry is None:  # its image is left out
            continue
        if type(of) not in (int, str):
            of = None
        if chosen is not None and of is None:
            report.add(place, Kind.MALFORMED, "no category_id")
            entry.left_out += 1
        elif chosen is None or of in chosen:
            kind_of = landmarks.setdefault(of, _landmarks_of(categories.get(of, {})))
            label, kind, found = _parse_annotation(row, annotation, kind_of)
            if kind:
                report.add(place, kind, found)
            if kind in (Kind.CROWD, Kind.INVALID):
                entry.ignored.append(to_numbers(annotation["bbox"]) or ())
            labels.append((entry, label, kind_of))
    for entry, label, kind_of in labels:
        if label and label.points and sum(kind_of.votes) < 0:
            points = [label.points[2 * i + axis] for i in MIRRORED for axis in (0, 1)]
            label = Label(label.row, label.xywh, points)
        entry.add(label)
    for kind_of in landmarks.values():
        _note_order(kind_of, report)
    if lost:  # an image without annotations may be the one they are of
        for entry in entries.values():
            entry.left_out += not entry.labels
    return make_dataset(str(file), entries, f"{file}: annotation ", report, folders)


def _objects(data: Any, part: str) -> list[dict[str, Any]] | None:
    """Return a list of objects of a json, or None if it is anything else."""
    found = data.get(part) if isinstance(data, dict) else None
    return found if isinstance(found, list) and all(isinstance(item, dict) for item in found) else None


def _choose(
    file: Path,
    categories: Mapping[Id, dict[str, Any]],
    annotations: list[dict[str, Any]],
    wanted: str | None,
    report: Report,
) -> set[Id] | None:
    """Return the ids of the categories of faces, or None where there is no choice; note what they are called."""
    counts = Counter(item["category_id"] for item in annotations if type(item.get("category_id")) in (int, str))
    names = {item: str(categories.get(item, {}).get("name", item)).strip() for item in {**categories, **counts}}

    def listed(ids: Iterable[Id]) -> str:
        return ", ".join(f"{names[item]!r} ({counts[item]} annotations)" for item in ids) or "none at all"

    def named(*words: str) -> set[Id]:
        folded = [word.strip().casefold() for word in words]
        return {item for item, name in names.items() if name.casefold() in folded or str(item) in folded}

    if wanted is not None:
        chosen = named(wanted) or named(*wanted.split(","))
        if not any(counts[item] for item in chosen):
            raise DataError(f"{file}: no annotation is of the category {wanted!r}; there are {listed(counts)}")
    else:
        chosen = {item for item, name in names.items() if name.casefold() == "face" and counts[item]}
        if not chosen and len(categories) > 1 and len(counts) > 1:
            raise DataError(
                f"{file}: which of its {len(counts)} categories are faces: {listed(counts)}? Say --category NAME"
            )
        chosen = chosen or set(counts)
    if any(names[item].casefold() != "face" for item in chosen):
        report.notes.append(f"faces are the annotations of {listed(item for item in names if item in chosen)}")
    return None if wanted is None and len(categories) < 2 else chosen


def _read_images(
    file: Path,
    pictures: list[dict[str, Any]],
    folders: Sequence[Path],
    by_id: dict[Id, Entry | None],
    report: Report,
) -> dict[Path, Entry]:
    """Return the entries of the images by path, and fill in those by id; None is one that is left out."""
    entries: dict[Path, Entry] = {}
    paths = find_images((name for item in pictures if isinstance(name := item.get("file_name"), str)), folders)
    for index, picture in enumerate(pictures):
        place, name = f"{file}: image {picture.get('id', f'number {index}')}", picture.get("file_name")
        number = picture.get("id")
        if not isinstance(name, str) or not name or type(number) not in (int, str):
            report.add(place, Kind.MALFORMED, f"id {number!r}, file_name {name!r}"[:200])
        elif number in by_id:  # whose faces they are cannot be told
            report.add(place, Kind.MALFORMED, "its id is that of another image, too")
            if entry := by_id[number]:
                entry.left_out += 1
        else:
            by_id[number] = add_entry(entries, paths[name], name, place, report)
    return entries


def _landmarks_of(category: Mapping[str, Any]) -> _Landmarks:
    """Return what the names of a category's keypoints say."""
    names = category.get("keypoints") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = []
    if not names:
        return _Landmarks()
    found: dict[tuple[str, str], list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(_part(name), []).append(index)
    columns = tuple(found[part][0] for part in _PARTS if len(found.get(part, [])) == 1)
    return _Landmarks(tuple(names), columns if len(columns) == 5 else None)


def _part(name: str) -> tuple[str, str]:
    """Return which of `_PARTS` a keypoint is called, ("", "") for any other: "left_eye", "LeftEye", "leye", "eye-l"."""
    words = re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower())
    text = "".join(words)
    if re.search("brow|lid|inner|outer|upper|lower|top|bottom", text):
        return "", ""
    part = next((part for part, word in _WORDS.items() if re.search(word, text)), "")
    rest = re.sub(_WORDS.get(part, "") + "|corner|cent(er|re)|tip", "", text)
    side = {"l": "left", "left": "left", "r": "right", "right": "right"}.get(rest, "")
    return ("", part) if part == "nose" and not rest else (side, part) if side and part != "nose" else ("", "")


def _parse_annotation(
    row: int, annotation: dict[str, Any], landmarks: _Landmarks
) -> tuple[Label | None, Kind | None, str]:
    """Return the face of an annotation, unless it is left out, what is wrong with it, if anything is, and its text."""
    box, keypoints = annotation.get("bbox"), annotation.get("keypoints") or []
    xywh = to_numbers(box) if isinstance(box, list) else None
    values = to_numbers(keypoints) if isinstance(keypoints, list) else None
    if xywh is None or len(xywh) != 4:
        return None, Kind.MALFORMED, f"bbox {box!r}"[:60]
    if annotation.get("iscrowd"):
        return None, Kind.CROWD, f"bbox {box!r}"[:60]
    if annotation.get("ignore"):
        return None, Kind.INVALID, f"bbox {box!r}"[:60]
    if values is not None and not any(visibility > 0 for visibility in values[2::3]):
        return Label(row, xywh), None, ""
    count = len(landmarks.names) or 5
    if values is None or landmarks.columns is None or len(values) != 3 * count:
        names = ", ".join(landmarks.names) or "none are named"
        given = f"{len(keypoints) / 3:g}" if isinstance(keypoints, list) else "no list"
        return Label(row, xywh), Kind.OTHER_KEYPOINTS, f"{given}; {names}"[:90]
    points = [values[3 * column : 3 * column + 3] for column in landmarks.columns]
    visible = sum(visibility > 0 for _, _, visibility in points)
    if visible < 5:
        return Label(row, xywh), Kind.PARTIAL_LANDMARKS if visible else None, f"{visible} of 5"
    places = [value for x, y, _ in points for value in (x, y)]
    landmarks.votes.append(_handedness(places))
    return Label(row, xywh, places), None, ""


def _handedness(places: Sequence[float]) -> int:
    """Return 1 if the first eye of ten numbers is the left one as seen in the image, however the face is turned.

    -1 if it is the right one, 0 if it cannot be told. The eyes lie across the way from them down to the mouth.
    """
    left, right, _, *mouth = np.reshape(places, (5, 2))
    across, down = right - left, np.mean(mouth, axis=0) - (left + right) / 2
    return int(np.sign(across[0] * down[1] - across[1] * down[0]))


def _note_order(landmarks: _Landmarks, report: Report) -> None:
    """Say what was made of the landmarks if it is not what a reader of the file would think."""
    if sum(landmarks.votes) < 0:
        swapped = f"{landmarks.votes.count(-1)} of {len(landmarks.votes)} faces"
        report.notes.append(f"left and right are the person's own in {swapped}: landmarks are put as seen in the image")
