"""Finding a data set by the name or path that a command is given, and reading the text files of WIDER FACE.

The official text file of WIDER FACE names an image, then gives the number of its faces and a line for each (an image
without faces has 0 and a line of zeros):

    0--Parade/0_Parade_marchingband_1_849.jpg
    1
    449 330 122 149 0 0 0 0 0 0

x y w h, blur, expression, illumination, invalid, occlusion, pose. label.txt, of the authors of RetinaFace, says

    # 0--Parade/0_Parade_marchingband_1_849.jpg
    449 330 122 149 488.9 373.6 0.0 542.1 376.4 0.0 515.0 412.8 0.0 485.2 425.9 0.0 538.4 431.5 0.0 0.82

x y w h, five times x y flag, quality; -1 for landmarks that are unknown, or x y w h alone. An image without lines, or
with one whose box is 0 0 0 0, has no faces. `trainer.data.coco` reads the other form of labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from facespec.errors import DataError, NoLabelsError
from facespec.files import widerface_root
from facespec.images import IMAGE_SUFFIXES
from trainer.data.coco import read_coco
from trainer.data.dataset import (
    Dataset,
    Entry,
    Kind,
    Label,
    Report,
    add_entry,
    find_images,
    make_dataset,
    to_numbers,
)
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


def open_dataset(
    name_or_path: str,
    split: Split = "train",
    root: str | Path | None = None,
    *,
    images: str | Path | None = None,
    fallback_images: str | Path | None = None,
    category: str | None = None,
) -> Dataset:
    """Open a data set.

    Args:
        name_or_path: "widerface", "synthetic", the path of a label.txt, of a WIDER FACE *_bbx_gt.txt or of a COCO
            .json, or a folder: of WIDER FACE, with a label.txt or with COCO files.
        split: "train" or "val". A file is what it is, whatever the split.
        root: Folder of WIDER FACE: with train/images and train/label.txt, or as its archives unpack: WIDER_train/images
            and wider_face_split. By default $WIDERFACE_ROOT, or data/widerface.
        images: Folder of the images of a label file, instead of the usual places, which docs/data.md lists.
        fallback_images: Another one, for images that are not there.
        category: Of the faces in a COCO file; see `trainer.data.coco.read_coco`.

    Raises:
        DataError: There is no such data set, or it cannot be used.
    """
    if name_or_path == SYNTHETIC:
        return synthetic(split)
    for folder in (images, fallback_images):
        if folder is not None and not Path(folder).is_dir():
            raise DataError(f"--images {folder}: no such folder")
    named = name_or_path == WIDERFACE
    path = Path((root or widerface_root()) if named else name_or_path)
    file, usual = path, list[Path]()
    if named or path.is_dir():
        if found := _find_widerface(path, split):
            file, usual = found[0], [found[1]]
        elif named:
            raise DataError(f"--data {WIDERFACE}: no labelled {split} images in {path}: {HELP}")
        else:
            file = _find_coco(path, split)
    elif not path.is_file():
        raise DataError(f"--data {name_or_path}: no such file or folder, and not one of {WIDERFACE}, {SYNTHETIC}")
    is_coco = file.suffix.lower() == ".json"
    usual = [Path(images)] if images else usual or (_places_of_coco(file) if is_coco else _places_of_text(file))
    folders = [*usual, *([Path(fallback_images)] if fallback_images else [])]
    if is_coco:
        return read_coco(file, folders, category)
    return _read_text(file, folders, name=WIDERFACE if named else str(path))


def _places_of_text(file: Path) -> list[Path]:
    """Return the folders that may hold the images of a text file."""
    unpacked = file.parent.parent / f"WIDER_{'val' if '_val_' in file.name else 'train'}" / "images"
    return _folders([unpacked] * (file.parent.name == "wider_face_split") + [file.parent / "images", file.parent])


def _places_of_coco(file: Path) -> list[Path]:
    """Return the folders that may hold the images of a COCO file: beside it, in ../images, in ../SPLIT.

    The split is what its name ends in: train2017 of instances_train2017.json, default of instances_default.json.
    """
    beside, above, split = file.parent, file.parent.parent, re.split(r"[_.]", file.stem)[-1]
    places = [beside, beside / "images", above / "images" / split, above / "images", above / split, above]
    return _folders([*places, beside / "images" / split, beside / split])


def _folders(places: Iterable[Path]) -> list[Path]:
    return [place for place in places if place.is_dir()]


def _find_coco(root: Path, split: Split) -> Path:
    """Return the COCO file of a split in a folder: the only one that is named so, or the only one."""
    files = [
        file for pattern in ("*.json", "annotations/*.json", "*/_annotations.coco.json") for file in root.glob(pattern)
    ]
    words = {"train": ("train",), "val": ("val", "valid", "validation")}
    of_split = {
        name: [file for file in files if set(those) & set(re.findall("[a-z]+", str(file.relative_to(root)).lower()))]
        for name, those in words.items()
    }
    found = of_split[split] or [file for file in files if not any(file in those for those in of_split.values())]
    found = [file for file in found if file.name.startswith("instances")] or found  # COCO has captions beside them
    if not files:
        raise NoLabelsError(
            f"--data {root}: no label.txt, no COCO .json and no labelled {split} images of WIDER FACE there"
        )
    names = ", ".join(str(file.relative_to(root)) for file in sorted(found or files)[:5])
    if not found:
        raise DataError(f"--data {root}: no COCO .json of the split {split} ({names} are): name one with its path")
    if len(found) > 1:
        raise DataError(f"--data {root}: which of its {len(found)} files is it ({names})? Name one with its path")
    return found[0]


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


def _read_text(file: Path, folders: Sequence[Path], name: str) -> Dataset:
    """Read a text file in either of the two forms, its images in some of the folders; its first line tells which."""
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
    paths = find_images((title.lstrip("# \t") for (_, title), _ in _by_image(rows)), folders)
    for (number, title), faces in _by_image(rows):
        title = title.lstrip("# \t")
        entry = add_entry(entries, paths[title], title, f"{file}:{number}", report)
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
            if kind is Kind.INVALID:
                entry.ignored.append(to_numbers(text.split()[:4]) or ())
            entry.add(label)
    return make_dataset(name, entries, f"{file}:", report, folders)


def _is_name(text: str) -> bool:
    """Whether a line names an image. Damaged numbers do not, or the faces after them would go to no image."""
    return text.startswith("#") or "/" in text or "\\" in text or text.lower().endswith(IMAGE_SUFFIXES)


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
