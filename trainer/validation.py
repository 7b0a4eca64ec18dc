"""Average precision while training: the official one where WIDER FACE's ground truth is, a simple one elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from facespec.cli import counted
from facespec.errors import DataError
from facespec.files import widerface_root
from facespec.letterbox import Letterbox
from trainer.average_precision import LEVELS, Array, ImageKey, ImageTruth, average_precision, load_ground_truth
from trainer.config import DataConfig
from trainer.data import Dataset, FileSample, Sample, open_dataset
from trainer.data.readers import WIDERFACE
from trainer.distributed import World
from trainer.evaluate import predict
from trainer.model import RetinaFace, TorchRetinaFace

MIN_FACE_PX = 16
"""Smallest side, in the network input, of a face that the simple average precision counts."""

SIMPLE_LEVEL = "ap"
"""Name of the only level of the simple average precision."""

Scores = dict[str, float]
"""Average precision in percent by level."""


@dataclass(frozen=True)
class WiderValidation:
    """Images of WIDER FACE, by the official protocol.

    `images` is the folder of those in `truth`; they are letterboxed to a square of `size` pixels, or with 0 have their
    own size.
    """

    levels: ClassVar = LEVELS
    images: Path
    truth: dict[ImageKey, ImageTruth]
    size: int = 0

    def samples(self) -> list[FileSample]:
        """Return the images, without faces."""
        return [FileSample(self.images / event / f"{name}.jpg") for event, name in self.truth]

    def without(self, damaged: Collection[int]) -> WiderValidation:
        """Return the same without some of the images."""
        truth = {key: value for index, (key, value) in enumerate(self.truth.items()) if index not in damaged}
        return dataclasses.replace(self, truth=truth)

    @property
    def what(self) -> str:
        """What is measured."""
        how = f"letterboxed to {self.size}" if self.size else "at their own size"
        return f"AP easy/medium/hard of WIDER FACE on {len(self.truth)} images of its val split {how}"

    def measure(self, model: RetinaFace, world: World) -> Scores:
        """Return the scores of a model in eval mode; levels of which no face counts are left out.

        Every process takes its share of the images, and gets the scores of all.
        """
        share = dict(list(self.truth.items())[world.rank :: world.size])
        detector = _detector(model, (self.size, self.size) if self.size else None)
        found = predict(detector, self.images, share, world.leads)[0].by_image if share else {}
        curves = average_precision(world.gather(found), self.truth)
        return {level: 100 * curves[level].ap for level in LEVELS if curves[level].faces}


@dataclass(frozen=True)
class LabelledValidation:
    """Any labelled images, letterboxed to the size that is trained: AP at an IoU of 0.5 over one level.

    Faces with a side under `MIN_FACE_PX` in the network input, a square of `size` pixels, count neither way.
    """

    levels: ClassVar = (SIMPLE_LEVEL,)
    dataset: Dataset
    size: int

    def samples(self) -> Sequence[Sample]:
        """Return the images."""
        return self.dataset.samples

    def without(self, damaged: Collection[int]) -> LabelledValidation:
        """Return the same without some of the images."""
        samples = [sample for index, sample in enumerate(self.dataset.samples) if index not in damaged]
        return dataclasses.replace(self, dataset=dataclasses.replace(self.dataset, samples=samples))

    @property
    def what(self) -> str:
        """What is measured."""
        return (
            f"AP at IoU 0.5 over the labels of {counted(len(self.dataset), 'image')} of {self.dataset.name}, "
            f"letterboxed to {self.size}, faces from {MIN_FACE_PX} pixels"
        )

    def measure(self, model: RetinaFace, world: World) -> Scores:
        """Return the score of a model, as `WiderValidation.measure` does."""
        size_hw = self.size, self.size
        detector = _detector(model, size_hw)
        found: dict[ImageKey, tuple[Array, ImageTruth]] = {}
        indices = range(world.rank, len(self.dataset), world.size)
        for index in tqdm(indices, unit="image", leave=False, disable=None if world.leads else True):
            frame, faces = self.dataset.samples[index].load()
            box = Letterbox.fit((frame.shape[0], frame.shape[1]), size_hw)
            in_network = box.to_network(faces.boxes)
            counts = (in_network[:, 2:] - in_network[:, :2]).min(axis=1, initial=np.inf) >= MIN_FACE_PX
            detections = detector.detect(frame)
            rows = np.column_stack([_xywh(detections.boxes), detections.scores]).astype(np.float64)
            found["", str(index)] = rows, ImageTruth(_xywh(faces.boxes), dict.fromkeys(LEVELS, counts))
        found = world.gather(found)
        rows_by_image = {key: rows for key, (rows, _) in found.items()}
        truth = {key: image for key, (_, image) in found.items()}
        curve = average_precision(rows_by_image, truth, border=0)[LEVELS[0]]
        return {SIMPLE_LEVEL: 100 * curve.ap} if curve.faces else {}


Validation = WiderValidation | LabelledValidation
"""What a model is measured on; `levels` are the keys of its scores."""


def find_validation(config: DataConfig, trained: Dataset, size: int = 0) -> Validation | None:
    """Return what a run is measured on; None if there is nothing but the images it is trained on.

    `val` names a set; otherwise it is the val split of `source`, or with `overfit` the trained images. Images are
    letterboxed to `size`; with 0, those of WIDER FACE have their own size and others that which is trained.

    Raises:
        DataError: The set that `val` names cannot be used.
    """
    if config.overfit:
        return LabelledValidation(trained, size or config.size)
    name = config.val or config.source
    folder = config.root or widerface_root() if name == WIDERFACE else name
    if found := _find_wider(Path(folder)):
        return dataclasses.replace(found, size=size)
    try:
        where = {"fallback_images" if config.val else "images": config.images}
        dataset = open_dataset(name, "val", config.root, category=config.category, **where)
    except DataError as error:
        if config.val:
            raise
        print(f"note: there is nothing to measure on: {error}")
        return None
    if not config.val and {sample.name for sample in dataset.samples} & {sample.name for sample in trained.samples}:
        return None  # a label file has no splits
    return LabelledValidation(dataset, size or config.size)


def _find_wider(root: Path) -> WiderValidation | None:
    """Return the official validation if its images and its ground truth are in a folder, in one of two layouts."""
    images = next((path for name in ("val", "WIDER_val") if (path := root / name / "images").is_dir()), None)
    files = (root / name / "wider_face_val.mat" for name in ("gt", "eval_tools/ground_truth"))
    file = next((file for file in files if file.is_file()), None)
    if images is None or file is None:
        return None
    truth = load_ground_truth(file.parent)
    there = {key: value for key, value in truth.items() if (images / key[0] / f"{key[1]}.jpg").is_file()}
    return WiderValidation(images, there) if there else None


def _detector(model: RetinaFace, size_hw: tuple[int, int] | None = None) -> TorchRetinaFace:
    return TorchRetinaFace(model, score_threshold=model.spec.decode.score_threshold, size_hw=size_hw)


def _xywh(boxes_xyxy: NDArray[np.float32]) -> Array:
    boxes = boxes_xyxy.astype(np.float64)
    return np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
