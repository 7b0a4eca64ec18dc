"""Text labels of WIDER FACE: the official files, and label.txt, which adds five landmarks.

The official file names an image, then gives the number of its faces and a line for each (an image without faces has 0
and a line of zeros):

    0--Parade/0_Parade_marchingband_1_849.jpg
    1
    449 330 122 149 0 0 0 0 0 0

x y w h, blur, expression, illumination, invalid, occlusion, pose. label.txt, of the authors of RetinaFace, says

    # 0--Parade/0_Parade_marchingband_1_849.jpg
    449 330 122 149 488.9 373.6 0.0 542.1 376.4 0.0 515.0 412.8 0.0 485.2 425.9 0.0 538.4 431.5 0.0 0.82

x y w h, five times x y flag, quality; -1 for landmarks that are unknown, or x y w h alone. An image without lines, or
with one whose box is 0 0 0 0, has no faces.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from facespec.errors import DataError
from facespec.images import IMAGE_SUFFIXES
from trainer.data.dataset import Dataset, Entry, Kind, Label, Report, inside, make_dataset, to_numbers

_INVALID = 7
_UNKNOWN = -1.0
_NOTHING = ["0"] * 4  # the box of the only line of an image without faces, in both forms

Row = tuple[int, str]


def read_labels(file: Path, images: Path, name: str = "") -> Dataset:
    """Read a file in either of the two forms; its first line tells which.

    Args:
        file: Text file; line ends of any system.
        images: Folder that its image names are relative to.
        name: Of the data set; by default that of the file.

    Raises:
        DataError: The file cannot be read, is of neither form, or leaves nothing to train on.
    """
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
        path = inside(images, title.lstrip("# "))
        if path is None:
            report.add(f"{file}:{number}", Kind.BAD_NAME, title[:200])
            continue
        if path in entries:
            report.add(f"{file}:{number}", Kind.DUPLICATE_IMAGE, title)
        entry = entries.setdefault(path, Entry(f"{file}:{number}"))
        if not with_landmarks:
            faces, problem = _after_count(faces)
            if problem:
                report.add(f"{file}:{number}", Kind.WRONG_COUNT, problem)
        elif len(faces) == 1 and faces[0][1].split()[:4] == _NOTHING:
            faces = []
        for row, text in faces:
            label, kind = _parse(row, text, with_landmarks)
            if kind:
                report.add(f"{file}:{row}", kind, text[:60])
            if label:
                entry.labels.append(label)
            else:
                entry.left_out += 1
    return make_dataset(name or str(file), entries, f"{file}:", report)


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


def _parse(row: int, text: str, with_landmarks: bool) -> tuple[Label | None, Kind | None]:
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
