"""What a data set is: samples that load an image and its faces, and a report of what was wrong with the labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from facespec.cli import counted
from facespec.errors import DataError, ImageError
from facespec.images import read_image
from facespec.letterbox import Frame

EDGE_PX = 1.0
"""A landmark this little outside the image is there by rounding, and counts as on its edge."""

MAX_COORDINATE = 1e6
"""Larger numbers are no pixels."""

MAX_NAME_PARTS = 6
"""So many of the last parts of an image name are looked for where the whole is not found."""


@dataclass(frozen=True)
class Faces:
    """The labelled faces of one image, in its pixels.

    Attributes:
        boxes: (n, 4) float32 x1, y1, x2, y2.
        landmarks: (n, 5, 2) float32 left eye, right eye, nose, left and right mouth corner, as seen in the image;
            0 where there are none.
        has_landmarks: (n,) bool, whether the five landmarks are known.
        scores: (n,) float32 in 0..1, what a network should say of the face, where a teacher had a say; None is 1.
    """

    boxes: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    has_landmarks: NDArray[np.bool_]
    scores: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: Any) -> Faces:
        """Return some of the faces; `rows` is a slice, a mask or an array of indices."""
        scores = None if self.scores is None else self.scores[rows]
        return Faces(self.boxes[rows], self.landmarks[rows], self.has_landmarks[rows], scores)

    @staticmethod
    def none() -> Faces:
        """Return no faces."""
        return Faces(np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32), np.zeros(0, bool))


class Sample(Protocol):
    """One image of a data set."""

    @property
    def name(self) -> str:
        """What to call the image in messages."""

    def load(self) -> tuple[Frame, Faces]:
        """Return the image, uint8 (H, W, 3) BGR, and its faces, inside it.

        Raises:
            DataError: The image is missing or damaged.
        """


class Kind(Enum):
    """What can be wrong with a label, and what is done about it."""

    MALFORMED = "line that cannot be read: dropped"
    WRONG_COUNT = "another number of faces than announced: those that are there are used"
    NO_AREA = "box without area: dropped"
    DUPLICATE_BOX = "box given twice: used once"
    DUPLICATE_IMAGE = "image named twice: its faces are put together"
    OTHER_KEYPOINTS = "keypoints that are not the five landmarks: box used without landmarks"
    PARTIAL_LANDMARKS = "landmarks known in part: box used without landmarks"
    INVALID = "face marked invalid: left out"
    CROWD = "crowd marked as one box: left out"
    ALL_LEFT_OUT = "image none of whose faces can be used: left out, as it is no background either"
    BAD_NAME = "image name that leads out of the folder and is not found in it, or stands for another's file: left out"
    MISSING_IMAGE = "image file not there: image left out"
    DAMAGED_IMAGE = "image file that cannot be read: training refuses it, or leaves it out with data.skip_damaged"
    OUTSIDE = "box outside the image: dropped"
    CLIPPED = "box partly outside the image: cut at its edge"
    LANDMARKS_OUTSIDE = "landmarks partly outside the image: box used without landmarks"


class Problem(NamedTuple):
    """One thing wrong with a label: where (file:line, or file and annotation), what, and what is there."""

    place: str
    kind: Kind
    found: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind.value} ({self.found})"


@dataclass
class Report:
    """What a data set holds and what is wrong with it.

    Attributes:
        images: Those that are used.
        background: Those of them that are labelled as having no face.
        faces: Those that are used.
        with_landmarks: Those of them whose landmarks are known.
        problems: Everything that was dropped, changed or left out, in the order of the file.
        notes: How the file was understood, where it could be meant otherwise.
    """

    images: int = 0
    background: int = 0
    faces: int = 0
    with_landmarks: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, place: str, kind: Kind, found: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(place, kind, found))

    def counts(self) -> dict[Kind, int]:
        """Return how often each kind of problem occurs, those that do not left out."""
        found = Counter(problem.kind for problem in self.problems)
        return {kind: found[kind] for kind in Kind if kind in found}

    def summary(self) -> str:
        """Return what the set holds in one line, and one more for each kind of problem and each note."""
        images = f"{counted(self.images, 'image')} ({self.background:,} without faces)"
        faces = f"{counted(self.faces, 'face')} ({self.with_landmarks:,} with landmarks)"
        problems = [f"{count:8,d}  {kind.value}" for kind, count in self.counts().items()]
        return "\n".join([f"{images}, {faces}", *problems, *(f"note: {note}" for note in self.notes)])

    def count_faces(self, faces: Faces) -> None:
        """Count an image and its faces."""
        self.images += 1
        self.background += not len(faces)
        self.faces += len(faces)
        self.with_landmarks += int(faces.has_landmarks.sum())


@dataclass(frozen=True)
class Dataset:
    """Images with labelled faces.

    Attributes:
        name: As `open_dataset` was asked for it.
        samples: One for each image, in a fixed order.
        report: What was wrong with the labels, as far as it shows without opening the images.
    """

    name: str
    samples: Sequence[Sample]
    report: Report

    def __len__(self) -> int:
        return len(self.samples)

    def names(self) -> str:
        """Return the images' names in their order, one a line, wherever their folder lies."""
        return "\n".join(_short_name(sample) for sample in self.samples)

    def arranged(self, names: str) -> list[Sample]:
        """Return the images in an order that `names` gave; those that are not there any more cannot be loaded."""
        there = {_short_name(sample): sample for sample in self.samples}
        return [there.get(name) or FileSample(Path(name)) for name in names.split("\n")]


def _short_name(sample: Sample) -> str:
    name = "/".join(PurePath(sample.name).parts[-2:])
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace").replace("\n", "\\n")


@dataclass(frozen=True)
class FileSample:
    """An image file and its labelled faces.

    Attributes:
        path: Of the image.
        labelled: Faces as labelled: boxes may reach out of the image.
        origin: What the rows are counted in: "label.txt:" or "faces.json: annotation ".
        rows: (n,) int64 line or annotation of each face.
        ignored: (m, 4) float32 x1, y1, x2, y2 of crowds and invalid faces: whether they are found does not count.
    """

    path: Path
    labelled: Faces = field(default_factory=lambda: Faces.none())
    origin: str = ""
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    ignored: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))

    @property
    def name(self) -> str:
        """The path of the image."""
        return str(self.path)

    def load(self) -> tuple[Frame, Faces]:
        """Return the image and its faces, cut at the edges of the image; see `Sample`."""
        try:
            image = read_image(self.path)
        except ImageError as error:
            raise DataError(f"training image {error}") from None
        return image, self.faces_in((image.shape[0], image.shape[1]))

    def faces_in(self, size_hw: tuple[int, int], report: Report | None = None) -> Faces:
        """Return the faces in an image of `size_hw`: boxes cut at its edges, landmarks outside marked unknown.

        Landmarks are all or nothing: a point that lies outside shows nothing that the others could be told from.
        `report` takes what does not fit.
        """
        height, width = size_hw
        faces = self.labelled
        limit = np.array([width, height, width, height], np.float32)
        boxes = np.clip(faces.boxes, 0, limit)
        inside = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(axis=1)
        beyond = np.maximum(-faces.landmarks, faces.landmarks - limit[:2]).max(axis=(1, 2), initial=-np.inf)
        known = faces.has_landmarks & (beyond <= EDGE_PX)
        if report is not None:
            cut = inside & (boxes != faces.boxes).any(axis=1)
            for kind, rows in (
                (Kind.OUTSIDE, ~inside),
                (Kind.CLIPPED, cut),
                (Kind.LANDMARKS_OUTSIDE, inside & faces.has_landmarks & ~known),
            ):
                for row in np.flatnonzero(rows):
                    place = f"{self.origin}{self.rows[row]}"
                    values = faces.landmarks[row] if kind is Kind.LANDMARKS_OUTSIDE else faces.boxes[row]
                    numbers = " ".join(f"{value:g}" for value in values.ravel())
                    report.add(place, kind, f"{numbers} in {width}x{height} {self.path.name}")
        points = np.clip(faces.landmarks, 0, limit[:2]) * known[:, None, None]
        return Faces(boxes, points.astype(np.float32), known)[inside]


class Label(NamedTuple):
    """One face as a label file gives it, in its line or annotation `row`; `points` are ten numbers, if known."""

    row: int
    xywh: Sequence[float]
    points: Sequence[float] | None = None


def to_numbers(values: Sequence[object]) -> list[float] | None:
    """Return values of a label file as numbers, or None if one is no number that a pixel could have."""
    try:
        numbers = [float(value) for value in values]  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if all(abs(number) <= MAX_COORDINATE for number in numbers) else None  # NaN is not, either


def find_images(names: Iterable[str], folders: Sequence[Path]) -> dict[str, Path | None]:
    """Return the file of each image name of a label file, or where it is expected if there is none; see `docs/data.md`.

    Tools write names from the label file or from a folder of images on, or as a path or an address of elsewhere: in
    each folder the whole name is looked for, then its last parts. What is found lies in one of them, always. None: a
    name that leads out of them, of which nothing is found, or of which the end is what another image is called.
    """
    found: dict[str, Path | None] = {}
    whole: set[Path] = set()
    short: dict[Path, list[str]] = {}
    for name in dict.fromkeys(names):
        parts, leads_out = _split(name)
        there = ((count, path) for count in _ends(parts) for path in _paths(folders, parts[-count:]) if _is_file(path))
        count, path = next(there, (0, None))
        found[name] = path if path or leads_out or not parts else folders[0].joinpath(*parts)
        if path and count == len(parts) and not leads_out:
            whole.add(path)
        elif path:
            short.setdefault(path, []).append(name)
    for path, others in short.items():
        if path in whole or len(others) > 1:
            found |= dict.fromkeys(others)
    return found


def _split(name: str) -> tuple[tuple[str, ...], bool]:
    """Return the parts of an image name, from the last ".." on, and whether it leads out of any folder."""
    text = name.replace("\\", "/")
    if address := re.match(r"\w+://[^/]*/|(?=/data/local-files/\?d=)", text):  # Label Studio's, the second one
        text = unquote(text[address.end() :].partition("?d=")[2] or text[address.end() :].partition("?")[0])
    path = PurePosixPath(text)
    parts = [part for part in path.parts if part != "/" and not PureWindowsPath(part).drive]
    after = max((index + 1 for index, part in enumerate(parts) if part == ".."), default=0)
    return tuple(parts[after:]), bool(address or after or len(parts) < len(path.parts))


def _ends(parts: tuple[str, ...]) -> Iterable[int]:
    """Yield how many of the last parts of a name to look for."""
    return dict.fromkeys([len(parts), *range(min(len(parts), MAX_NAME_PARTS), 0, -1)] if parts else [])


def _paths(folders: Sequence[Path], parts: tuple[str, ...]) -> Iterator[Path]:
    for folder in folders:
        yield folder.joinpath(*parts)
        if "." not in parts[-1]:  # some lists leave the suffix out
            yield folder.joinpath(*parts[:-1], f"{parts[-1]}.jpg")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, a folder that is closed
        return False


@dataclass
class Entry:
    """What a label file says about one image, at `place`.

    `left_out` faces are in the image and not in `labels`; `ignored` are the boxes, x, y, width, height, of those that a
    detector may find or not.
    """

    place: str
    labels: list[Label] = field(default_factory=list)
    left_out: int = 0
    ignored: list[Sequence[float]] = field(default_factory=list)

    def add(self, label: Label | None) -> None:
        """Take a face that can be used, or count one that cannot."""
        if label:
            self.labels.append(label)
        else:
            self.left_out += 1


def add_entry(entries: dict[Path, Entry], path: Path | None, name: str, place: str, report: Report) -> Entry | None:
    """Return the entry of an image, a new one if it has none; None if `find_images` knows no path for its name."""
    if path is None:
        report.add(place, Kind.BAD_NAME, name[:200])
        return None
    if path in entries:
        report.add(place, Kind.DUPLICATE_IMAGE, name)
    return entries.setdefault(path, Entry(place))


def make_dataset(
    name: str, entries: dict[Path, Entry], origin: str, report: Report, folders: Sequence[Path]
) -> Dataset:
    """Return the data set of what a label file says; note in its report what is dropped here.

    An image that is labelled as having no faces is kept: it shows the detector what is none. `origin` is that of
    `FileSample`, `folders` are those that were searched for images.

    Raises:
        DataError: Nothing is left to train on.
    """
    samples: list[Sample] = []
    for path, entry in entries.items():
        if not _is_file(path):
            report.add(entry.place, Kind.MISSING_IMAGE, str(path)[:200])
            continue
        labels = _usable(entry, origin, report)
        if entry.left_out and not labels:
            report.add(entry.place, Kind.ALL_LEFT_OUT, path.name)
            continue
        faces = _to_faces(labels)
        rows = np.array([label.row for label in labels], np.int64)
        samples.append(FileSample(path, faces, origin, rows, _corners(entry.ignored)))
        report.count_faces(faces)
    if not report.faces:
        counts = report.counts()
        missing = counts.get(Kind.MISSING_IMAGE, 0)
        if missing and missing == len(entries):
            searched = ", ".join(dict.fromkeys(map(str, folders)))
            raise DataError(
                f"{name}: none of its {missing} images is there, for instance {str(next(iter(entries)))[:200]}; "
                f"searched: {searched[:1000]}; --images FOLDER names another"
            )
        what = f"{counted(len(report.problems), 'problem')}, the first: {report.problems[0]}" if report.problems else ""
        raise DataError(
            f"{name}: no usable face in {counted(len(entries), 'image')}; {what or 'no face is labelled in it'}"
        )
    return Dataset(name, samples, report)


def _usable(entry: Entry, origin: str, report: Report) -> list[Label]:
    """Return the labels with an area, each once; the others are noted and count as left out."""
    kept: dict[tuple[float, ...], Label] = {}
    for label in entry.labels:
        box = tuple(label.xywh)
        found = "{:g} {:g} {:g} {:g}".format(*box)
        if box[2] <= 0 or box[3] <= 0:
            report.add(f"{origin}{label.row}", Kind.NO_AREA, found)
        elif box in kept:
            report.add(f"{origin}{label.row}", Kind.DUPLICATE_BOX, found)
            if kept[box].points is None:  # of two, the one that says more
                kept[box] = label
        else:
            kept[box] = label
    entry.left_out += any(label.xywh[2] <= 0 or label.xywh[3] <= 0 for label in entry.labels)
    return list(kept.values())


def _to_faces(labels: Sequence[Label]) -> Faces:
    points = np.array([label.points or (0.0,) * 10 for label in labels], np.float32).reshape(-1, 5, 2)
    known = np.array([label.points is not None for label in labels], bool)
    return Faces(_corners(label.xywh for label in labels), points, known)


def _corners(boxes_xywh: Iterable[Sequence[float]]) -> NDArray[np.float32]:
    """Return (n, 4) float32 x1, y1, x2, y2 of boxes of x, y, width and height."""
    xywh = np.array([*boxes_xywh], np.float64).reshape(-1, 4)
    return np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]).astype(np.float32)
