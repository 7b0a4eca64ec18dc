"""A data set without a download: the faces of sample photographs, pasted into images without faces.

It shows that training works, on any machine and in minutes: there are three people in it, in both splits, so what is
learned from it says nothing about other faces.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from facespec.errors import DataError
from facespec.images import read_image
from facespec.letterbox import Frame
from facespec.opencv import cv2
from trainer.data.augment import MIRRORED
from trainer.data.dataset import Dataset, Faces, Report

IMAGES = {"train": 1000, "val": 100}
SIDE_RANGE = (448, 704)
FACE_RANGE = (16.0, 300.0)
"""Heights of faces in pixels."""

MIN_LANDMARKS_PX = 20.0
"""Lower faces have no landmarks, as in WIDER FACE, where nobody could have placed them."""

_LARGEST_SCALE = 1.6  # of a photograph: past it faces are mush
_HEAD = (1.0, 0.9)  # half axes of what is cut out, in widths and heights of the face: hair and collar belong to it
_MOST_FACES = 8
_PLACES_TRIED = 4


# package and file of a sample photograph; box and landmarks of its face, as the published mobilenet0.25 finds it at the
# photograph's own size
_PORTRAITS = (
    (
        "skimage",
        "data/astronaut.png",
        (177.9, 56.8, 273.1, 177.2),
        ((204.8, 100.8), (247.4, 103.4), (223.6, 129.2), (202.5, 138.1), (244.2, 140.6)),
    ),
    (
        "matplotlib",
        "mpl-data/sample_data/grace_hopper.jpg",
        (177.7, 106.5, 353.9, 327.7),
        ((219.0, 187.6), (303.4, 186.8), (259.6, 247.2), (231.9, 273.1), (299.2, 272.7)),
    ),
    (
        "skimage",
        "data/camera.png",
        (195.0, 113.9, 256.3, 195.3),
        ((235.8, 149.3), (248.5, 148.1), (250.3, 168.8), (228.8, 177.3), (237.8, 176.8)),
    ),
)
_SCENERY = ("brick", "chelsea", "coffee", "grass", "gravel", "hubble_deep_field", "ihc", "moon", "rocket")


@dataclass(frozen=True)
class _Cutout:
    """Something to paste: a patch with soft edges, in halvings, and the face in the middle of it, if it is one.

    Attributes:
        pyramid: uint8 (h, w, 4) BGR and opacity; each half as large as the one before.
        face_wh: Size of the face; of the patch without its rim where there is none.
        landmarks: (5, 2) from the centre of the patch, or None.
    """

    pyramid: tuple[Frame, ...]
    face_wh: tuple[float, float]
    landmarks: NDArray[np.float64] | None


class _Paste(NamedTuple):
    """What is pasted where.

    Attributes:
        linear: (2, 2) map of distances from the centre of the patch to distances in the image.
        centre: (2,) x, y in the image.
        gain: Factor of its colours.
    """

    cutout: _Cutout
    linear: NDArray[np.float64]
    centre: NDArray[np.float64]
    gain: float
    blur: bool

    def extent(self, half_wh: tuple[float, float]) -> NDArray[np.float64]:
        """Return half the width and height of the upright box around an ellipse of these half axes, pasted."""
        return np.sqrt((self.linear * half_wh) ** 2 @ np.ones(2))


@dataclass(frozen=True)
class SyntheticSample:
    """An image that is made when it is asked for, the same every time: of the split "train" or "val"."""

    split: str
    index: int

    @property
    def name(self) -> str:
        """The split and the index."""
        return f"synthetic {self.split} {self.index}"

    def load(self) -> tuple[Frame, Faces]:
        """Return the image and its faces; see `Sample`."""
        rng = self._rng()
        size_hw, pastes = _plan(rng)
        image = _background(size_hw, rng)
        for paste in pastes:
            _paste(image, paste)
        return image, _faces(pastes)

    def faces(self) -> Faces:
        """Return the faces without making the image."""
        return _faces(_plan(self._rng())[1])

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng((sorted(IMAGES).index(self.split), self.index))


def synthetic(split: str) -> Dataset:
    """Return the synthetic data set.

    Raises:
        DataError: No installed package ships a photograph with a face.
    """
    samples = [SyntheticSample(split, index) for index in range(IMAGES[split])]
    report = Report()
    for sample in samples:
        report.count_faces(sample.faces())
    return Dataset("synthetic", samples, report)


def _find(package: str, inside: str) -> list[Path]:
    """Return the path of a file that a package ships, or nothing; the package is located, not imported."""
    spec = find_spec(package)
    path = Path(spec.origin).parent / inside if spec and spec.origin else None
    return [path] if path and path.is_file() else []


def sample_faces() -> list[tuple[Path, tuple[float, float, float, float]]]:
    """Return the photographs with a face that installed packages ship, and its box in each: x1, y1, x2, y2."""
    return [(path, box) for package, inside, box, _ in _PORTRAITS for path in _find(package, inside)]


@cache
def _people() -> tuple[_Cutout, ...]:
    found = []
    for package, inside, box, points in _PORTRAITS:
        for path in _find(package, inside):
            corners = np.array(box).reshape(2, 2)
            centre, face_wh = corners.mean(axis=0), corners[1] - corners[0]
            patch, offset = _cut(read_image(path), centre, face_wh * _HEAD)
            landmarks = np.array(points) - centre + offset
            found.append(_Cutout(_pyramid(patch), (face_wh[0], face_wh[1]), landmarks))
    if not found:
        raise DataError("--data synthetic: no package with sample photographs is installed: pip install -e '.[demo]'")
    return tuple(found)


@cache
def _scenery() -> tuple[Frame, ...]:
    names = [f"data/{name}.{suffix}" for name in _SCENERY for suffix in ("png", "jpg")]
    return tuple(read_image(path) for name in names for path in _find("skimage", name))


@cache
def _things() -> tuple[_Cutout, ...]:
    """Cutouts of scenery: without them a soft oval rim would be enough to tell a face."""
    found = []
    for image in _scenery():
        half = min(image.shape[:2]) * 0.4
        middle = np.array([image.shape[1], image.shape[0]]) / 2
        patch, _ = _cut(image, middle, np.array([half, half]))
        found.append(_Cutout(_pyramid(patch), (half, half), None))
    return tuple(found)


def _cut(image: Frame, centre: NDArray[np.float64], half_wh: NDArray[np.float64]) -> tuple[Frame, NDArray[np.float64]]:
    """Return a patch with an opacity that fades towards the rim of an ellipse, and the way from its centre to `centre`.

    Its sides are multiples of 32, so that it can be halved five times without a shift.
    """
    half = np.maximum(np.ceil(half_wh / 16), 1).astype(int) * 16
    start = np.rint(centre - half).astype(int)
    rows, columns = (np.arange(start[i], start[i] + 2 * half[i]) for i in (1, 0))
    patch = image[np.clip(rows, 0, image.shape[0] - 1)[:, None], np.clip(columns, 0, image.shape[1] - 1)]
    distance = np.hypot((rows[:, None] + 0.5 - centre[1]) / half_wh[1], (columns + 0.5 - centre[0]) / half_wh[0])
    opacity = np.clip((1 - distance) / 0.2, 0, 1)
    return np.dstack([patch, np.rint(255 * opacity).astype(np.uint8)]), centre - (start + half)


def _pyramid(patch: Frame) -> tuple[Frame, ...]:
    levels = [patch]
    while len(levels) < 6:
        height, width = levels[-1].shape[:2]
        half = cv2.resize(levels[-1], (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        levels.append(np.asarray(half, np.uint8))
    return tuple(levels)


def _plan(rng: np.random.Generator) -> tuple[tuple[int, int], list[_Paste]]:
    """Return the size of an image and what is pasted into it, apart from each other; the faces may be none."""
    height, width = (int(side) for side in rng.integers(*SIDE_RANGE, 2))
    people, things = _people(), _things()
    count = int(rng.integers(0, _MOST_FACES, endpoint=True))
    cutouts = [people[i] for i in rng.integers(0, len(people), count)]
    if things:
        cutouts += [things[i] for i in rng.integers(0, len(things), int(rng.integers(0, 4)))]
    pastes: list[_Paste] = []
    taken = np.zeros((0, 4))
    for cutout in cutouts:
        for _ in range(_PLACES_TRIED):
            paste = _place(cutout, (height, width), rng)
            half = paste.extent((cutout.face_wh[0] * 0.75, cutout.face_wh[1] * 0.75))
            low, high = paste.centre - half, paste.centre + half
            apart = ((high <= taken[:, :2]) | (low >= taken[:, 2:])).any(axis=1).all()
            if apart and (low >= 0).all() and (high <= (width, height)).all():
                pastes.append(paste)
                taken = np.vstack([taken, [*low, *high]])
                break
    return (height, width), pastes


def _place(cutout: _Cutout, size_hw: tuple[int, int], rng: np.random.Generator) -> _Paste:
    most = min(FACE_RANGE[1], _LARGEST_SCALE * cutout.face_wh[1])
    scale = np.exp(rng.uniform(np.log(FACE_RANGE[0]), np.log(most))) / cutout.face_wh[1]
    angle, stretch, flip = np.deg2rad(rng.normal(0, 12)), rng.uniform(0.9, 1.1), rng.choice([-1, 1])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = scale * turn @ np.diag([stretch * flip, 1 / stretch])
    centre = rng.uniform(0, [size_hw[1], size_hw[0]])
    return _Paste(cutout, linear, centre, rng.uniform(0.6, 1.25), bool(rng.random() < 0.2))


def _faces(pastes: list[_Paste]) -> Faces:
    """Return the faces among what is pasted: boxes around the ellipses that the faces are taken for."""
    found = [(paste, paste.cutout.landmarks) for paste in pastes if paste.cutout.landmarks is not None]
    if not found:
        return Faces.none()
    boxes, landmarks = [], []
    for paste, points in found:
        half = paste.extent((paste.cutout.face_wh[0] / 2, paste.cutout.face_wh[1] / 2))
        boxes.append([*(paste.centre - half), *(paste.centre + half)])
        moved = points @ paste.linear.T + paste.centre
        landmarks.append(moved[MIRRORED] if np.linalg.det(paste.linear) < 0 else moved)
    corners: NDArray[np.float32] = np.array(boxes, np.float32)
    points_xy: NDArray[np.float32] = np.array(landmarks, np.float32)
    known = corners[:, 3] - corners[:, 1] >= MIN_LANDMARKS_PX
    points_xy[~known] = 0
    return Faces(corners, points_xy, known)


def _background(size_hw: tuple[int, int], rng: np.random.Generator) -> Frame:
    """Return part of a photograph without faces, a gradient or noise."""
    height, width = size_hw
    scenery, kind = _scenery(), rng.random()
    if scenery and kind < 0.8:
        image = scenery[rng.integers(len(scenery))]
        share = rng.uniform(0.3, 1.0, 2)
        sides = np.maximum(image.shape[:2] * share, 16).astype(int)
        top, left = rng.integers(0, image.shape[:2] - sides, endpoint=True)
        image = image[top : top + sides[0], left : left + sides[1]]
    else:  # coarse noise, scaled up: from a gradient of four corners to a texture
        coarse = 2 if kind < 0.9 else int(rng.integers(8, 128))
        image = rng.integers(0, 256, (coarse, coarse, 3), np.uint8)
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def _paste(image: Frame, paste: _Paste) -> None:
    """Draw a cutout over an image, in place."""
    pyramid = paste.cutout.pyramid
    scale = np.sqrt(abs(np.linalg.det(paste.linear)))
    level = min(max(int(np.floor(-np.log2(scale))), 0), len(pyramid) - 1)  # nothing is shrunk by more than a half
    patch = pyramid[level]
    height, width = patch.shape[:2]
    linear = paste.linear * 2**level
    half = np.abs(linear) @ [width / 2, height / 2]
    low = np.maximum(np.floor(paste.centre - half), 0).astype(int)
    high = np.minimum(np.ceil(paste.centre + half), [image.shape[1], image.shape[0]]).astype(int)
    # cv2 counts pixel centres, everything else here continuous coordinates: half a pixel between them
    offset = paste.centre - low - linear @ [width / 2 - 0.5, height / 2 - 0.5] - 0.5
    place = np.hstack([linear, offset[:, None]])
    size_wh = int(high[0] - low[0]), int(high[1] - low[1])
    moved = cv2.warpAffine(patch, place, size_wh, flags=cv2.INTER_LINEAR)
    colours = cv2.convertScaleAbs(moved[..., :3], alpha=paste.gain)
    if paste.blur:
        colours = cv2.GaussianBlur(colours, (3, 3), 0)
    opacity = moved[..., 3].astype(np.float32) / 255
    region = image[low[1] : high[1], low[0] : high[0]]
    region[:] = cv2.blendLinear(colours, np.ascontiguousarray(region), opacity, 1 - opacity)
