"""Checking a data set before training on it: what is wrong with its labels, and a picture of what training will see."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from facespec.cli import quiet_libraries
from facespec.errors import DataError
from facespec.images import write_image
from facespec.letterbox import Frame
from facespec.opencv import cv2
from facespec.samples import tiled
from trainer.data.augment import AugmentSettings, TrainingSet
from trainer.data.dataset import Dataset, Faces, FileSample, Kind, Problem, Report, Sample

TILES = (4, 6)
"""Rows and columns of the picture."""

TILE_PX = 320

_LEFT, _RIGHT, _NOSE = (60, 60, 255), (255, 120, 40), (0, 230, 255)
_POINTS = (_LEFT, _RIGHT, _NOSE, _LEFT, _RIGHT)
_KNOWN, _UNKNOWN, _BORDER = (80, 220, 60), (0, 140, 255), (40, 40, 40)
_LEGEND = (
    ("box, landmarks known", _KNOWN),
    ("box, landmarks unknown", _UNKNOWN),
    ("left eye and mouth corner", _LEFT),
    ("right eye and mouth corner", _RIGHT),
    ("nose", _NOSE),
)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def check_data(
    dataset: Dataset, picture: Path, size: int = 640, settings: AugmentSettings | None = None, seed: int = 0
) -> Report:
    """Load every image, compare the labels with it, and draw some samples as training will see them.

    Images are decoded, not only their headers read: it takes 2 ms each on a core, and a file that cannot be decoded
    would otherwise end a training that has run for hours.

    Args:
        dataset: From `open_dataset`.
        picture: Image to write: `TILES` augmented samples with their boxes and landmarks.
        size: Side of the images in training.
        settings: Augmentation; by default `AugmentSettings()`.
        seed: Of the augmentation.

    Returns:
        What the data set holds, and its problems: those of its own report and what only the images show.

    Raises:
        DataError: No image can be read.
        OutputError: The picture cannot be written.
    """
    report, good = Report(problems=list(dataset.report.problems)), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # cv2 decodes outside of Python's lock
        checked = pool.map(_check, dataset.samples)
        bar = tqdm(checked, desc="checking", total=len(dataset), unit="image", disable=None)
        for index, (faces, problems) in enumerate(bar):
            report.problems += problems
            if faces is not None:
                report.count_faces(faces)
                good.append(index)
    if not good:
        raise DataError(f"{dataset.name}: none of its {len(dataset)} images can be read; {report.problems[-1]}")
    training_set = TrainingSet(dataset, size, settings or AugmentSettings(), seed)
    count = min(TILES[0] * TILES[1], len(good))
    chosen = [good[index] for index in np.linspace(0, len(good) - 1, count).astype(int)]
    write_image(picture, contact_sheet([training_set[index] for index in chosen]))
    return report


def find_damaged(samples: Sequence[Sample], indices: Iterable[int], progress: bool = True) -> dict[int, str]:
    """Read the image files among some samples; return what is wrong with those that cannot be read, by index."""

    def read(index: int) -> tuple[int, str]:
        sample = samples[index]
        try:
            if isinstance(sample, FileSample):  # others are made when they are needed
                sample.load()
        except DataError as error:
            return index, str(error)
        return index, ""

    with ThreadPoolExecutor(os.cpu_count()) as pool, quiet_libraries():
        found = pool.map(read, indices := list(indices))
        bar = tqdm(found, "reading images", len(indices), leave=False, unit="image", disable=None if progress else True)
        return {index: problem for index, problem in bar if problem}


def replace_damaged(samples: Sequence[Sample], damaged: Collection[int]) -> list[Sample]:
    """Return the samples with the next one that is sound, round the end, in the place of each that is damaged.

    Every sound image keeps its place, and with it the steps in which it is trained.

    Raises:
        DataError: All are damaged.
    """
    sound = [index for index in range(len(samples)) if index not in damaged]
    if not sound:
        raise DataError(f"none of the {len(samples)} images can be read")
    return [samples[sound[bisect_left(sound, index) % len(sound)]] for index in range(len(samples))]


def _check(sample: Sample) -> tuple[Faces | None, list[Problem]]:
    """Return the faces of an image, None if it is damaged, and what is wrong with them."""
    try:
        image, faces = sample.load()
    except DataError as error:
        return None, [Problem(sample.name, Kind.DAMAGED_IMAGE, str(error))]
    found = Report()
    if isinstance(sample, FileSample):
        faces = sample.faces_in((image.shape[0], image.shape[1]), found)
    return faces, found.problems


def contact_sheet(samples: list[tuple[Frame, Faces]]) -> Frame:
    """Return a picture of square images in rows, with their faces and a legend; at most as many as `TILES`."""
    rows, columns = TILES
    tiles = [_tile(image, faces) for image, faces in samples]
    tiles += [np.full((TILE_PX, TILE_PX, 3), 40, np.uint8)] * (rows * columns - len(tiles))
    sheet = tiled(tiles, columns)
    legend = np.full((32, sheet.shape[1], 3), 255, np.uint8)
    for index, (text, colour) in enumerate(_LEGEND):
        x = 12 + index * (sheet.shape[1] // len(_LEGEND))
        cv2.rectangle(legend, (x, 9), (x + 14, 23), colour, -1)
        cv2.putText(legend, text, (x + 22, 22), _FONT, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([sheet, legend])


def _tile(image: Frame, faces: Faces) -> Frame:
    """Return a small copy of an image with its faces drawn and a border."""
    scale = TILE_PX / len(image)
    tile = cv2.resize(image, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA)
    boxes = np.rint(faces.boxes * scale).astype(int).tolist()
    points = np.rint(faces.landmarks * scale).astype(int).tolist()
    for box, face, known in zip(boxes, points, faces.has_landmarks, strict=True):
        cv2.rectangle(tile, box[:2], box[2:], _KNOWN if known else _UNKNOWN, 1)
        if known:
            for point, colour in zip(face, _POINTS, strict=True):
                cv2.circle(tile, point, (box[2] - box[0]) // 30, colour, -1)
    cv2.rectangle(tile, (0, 0), (TILE_PX - 1, TILE_PX - 1), _BORDER, 1)
    return np.asarray(tile, np.uint8)
