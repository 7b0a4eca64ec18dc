"""A teacher: a detector whose faces, seen on larger images, are trained towards besides the labels, or without any.

It looks at each image once, before the first step, and what it found is kept as faces of the image. So a step costs
what it costs without a teacher, whatever model it is and whatever priors it has.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from facespec.boxes import iou_matrix
from facespec.cli import quiet_libraries
from facespec.errors import DataError
from facespec.files import atomic_path
from facespec.images import IMAGE_SUFFIXES
from facespec.letterbox import Frame
from trainer.checkpoint import load_model
from trainer.config import TeacherConfig
from trainer.data import Dataset, FileSample, Sample
from trainer.data.dataset import Faces
from trainer.distributed import World
from trainer.model import TorchRetinaFace

FLOOR = 0.05
"""Least score of a face that the teacher is asked for; for a label, a lower one is as good as none."""

SAME_IOU, NEW_IOU = 0.5, 0.3
"""Least IoU of a label and the teacher's view of it; an IoU below which the teacher has found another face."""

CERTAIN = 0.5
"""Least score at which a label without landmarks gets the teacher's."""

Taught = tuple[np.ndarray, np.ndarray, np.ndarray]
"""What the teacher found in an image: (n, 4) boxes, (n, 5, 2) landmarks, (n,) scores, float32, in its pixels."""


def add_unlabelled(dataset: Dataset, folder: str) -> Dataset:
    """Return a data set with the images of a folder and those below it behind its own, without labels.

    Raises:
        DataError: There are none.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder}: teacher.images is no folder with images ({', '.join(IMAGE_SUFFIXES)})")
    notes = [*dataset.report.notes, f"{len(paths):,} more images without labels, from {folder}"]
    report = dataclasses.replace(dataset.report, notes=notes)
    return dataclasses.replace(dataset, samples=[*dataset.samples, *map(Unlabelled, paths)], report=report)


class Unlabelled(FileSample):
    """An image about whose faces nothing is known."""


def teach(dataset: Dataset, config: TeacherConfig, size: int, world: World, path: Path) -> Dataset:
    """Return a data set whose faces are what the labels and the teacher say together; see `merge`.

    Args:
        dataset: Images, with labels or `Unlabelled`.
        config: Names the teacher.
        size: Side of the square that the student is trained at.
        world: Processes share the images.
        path: File of what the teacher found: it is read if it is of the same teacher and images, otherwise written.

    Raises:
        WeightsError: The teacher's weights cannot be used.
        OutputError: The file cannot be written.
    """
    assert config.weights is not None
    model = load_model(config.weights).to(world.device)
    side = round(size * config.scale)
    key = hashlib.sha256(f"{model.spec.sha256()} {side} {FLOOR}\n{dataset.names()}".encode()).hexdigest()
    found = _read(path, key)
    if not all(world.gather({world.rank: found is not None}).values()):
        floor = max(FLOOR, model.spec.decode.score_threshold)
        detector = TorchRetinaFace(model, score_threshold=floor, size_hw=(side, side))
        mine = {}
        for index in tqdm(
            range(world.rank, len(dataset), world.size),
            desc="teacher",
            unit="image",
            leave=False,
            disable=None if world.leads else True,
        ):
            with quiet_libraries():
                faces = detector.detect(dataset.samples[index].load()[0])
            mine[index] = faces.boxes, faces.landmarks, faces.scores
        everyone = world.gather(mine)
        found = [everyone[index] for index in range(len(dataset))]
        if world.leads:
            _write(path, key, found)
    assert found is not None
    samples: list[Sample] = [
        TaughtSample(sample, faces, config) for sample, faces in zip(dataset.samples, found, strict=True)
    ]
    return dataclasses.replace(dataset, samples=samples)


@dataclass(frozen=True)
class TaughtSample:
    """An image with its labels and what the teacher found in it."""

    sample: Sample
    found: Taught
    config: TeacherConfig

    @property
    def name(self) -> str:
        """That of the image."""
        return self.sample.name

    def load(self) -> tuple[Frame, Faces]:
        """Return the image and its faces; see `Sample`."""
        image, faces = self.sample.load()
        return image, merge(faces, self.found, self.config, not isinstance(self.sample, Unlabelled))


def merge(faces: Faces, found: Taught, config: TeacherConfig, labelled: bool) -> Faces:
    """Return the labelled faces and those that the teacher alone found, with what a network should say of each.

    The teacher has `config.share` in it, the labels have the rest. Where they agree on a face, at an IoU of `SAME_IOU`,
    the box stays that of the label, and landmarks that it lacks are the teacher's. An image without labels is the
    teacher's alone.
    """
    boxes, landmarks, scores = found
    share = config.share if labelled else 1.0
    iou = iou_matrix(faces.boxes, boxes)
    same = np.where(iou >= SAME_IOU, scores[None], 0)
    says = same.max(axis=1, initial=0)
    points, known = faces.landmarks, faces.has_landmarks
    if len(boxes):
        learns = ~known & (says >= CERTAIN)
        points = np.where(learns[:, None, None], landmarks[same.argmax(axis=1)], points)
        known = known | learns
    new = (iou.max(axis=0, initial=0) < NEW_IOU) & (scores >= config.least)
    return Faces(
        np.concatenate([faces.boxes, boxes[new]]).astype(np.float32),
        np.concatenate([points, landmarks[new]]).astype(np.float32),
        np.concatenate([known, np.ones(new.sum(), bool)]),
        np.concatenate([1 - share + share * says, share * scores[new]]).astype(np.float32),
    )


def _write(path: Path, key: str, found: list[Taught]) -> None:
    parts = [np.concatenate(part) for part in zip(*found, strict=True)]
    counts = np.array([len(scores) for _, _, scores in found])
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, key=key, counts=counts, boxes=parts[0], landmarks=parts[1], scores=parts[2])


def _read(path: Path, key: str) -> list[Taught] | None:
    """Return what `_write` wrote under this key; None if there is nothing of the kind."""
    try:
        with np.load(path) as kept:
            if str(kept["key"]) != key:
                return None
            edges = kept["counts"].cumsum()[:-1]
            parts = (np.split(kept[name], edges) for name in ("boxes", "landmarks", "scores"))
            return list(zip(*parts, strict=True))
    except (OSError, ValueError, KeyError):
        return None
