"""COCO's average precision, by its own implementation, pycocotools."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from facespec.cli import require
from facespec.detections import Detections
from trainer.average_precision import Curve
from trainer.data import FileSample, Sample, SyntheticSample

LEVELS = ("ap50", "ap50_95")
"""Average precision at an IoU of 0.5, and the mean over 0.5, 0.55, ... 0.95."""

MIN_DETECTIONS = 100
"""COCO counts that many of an image; where a detector has more, all of them count: crowds of faces are larger."""


class Truth(NamedTuple):
    """Faces of an image, (n, 4) x1, y1, x2, y2, and (m, 4) others that a detector may find or not."""

    boxes: NDArray[np.float32]
    ignored: NDArray[np.float32]

    @classmethod
    def of(cls, sample: Sample) -> Truth:
        """Return the faces of a sample as they are labelled, without reading its image if it is a file."""
        if isinstance(sample, FileSample):
            return cls(sample.labelled.boxes, sample.ignored)
        faces = sample.faces() if isinstance(sample, SyntheticSample) else sample.load()[1]
        return cls(faces.boxes, np.zeros((0, 4), np.float32))


def coco_average_precision(found: Sequence[Detections], truth: Sequence[Truth]) -> dict[str, Curve]:
    """Return the two of `LEVELS`; the curve of "ap50_95" is the mean of its ten. NaN where no face is labelled.

    Args:
        found: What a detector finds on each image.
        truth: The labelled faces of the same images.

    Raises:
        MissingPackageError: pycocotools is not installed.
    """
    coco = require("pycocotools.coco", "evaluate", "COCO's average precision")
    cocoeval = require("pycocotools.cocoeval", "evaluate", "COCO's average precision")
    labelled: list[dict[str, Any]] = []
    detected: list[dict[str, Any]] = []
    for index, (faces, image) in enumerate(zip(found, truth, strict=True)):
        for boxes, crowd in ((image.boxes, 0), (image.ignored, 1)):
            for box in boxes.astype(np.float64).tolist():
                labelled.append({**_annotation(len(labelled), index, box), "iscrowd": crowd, "ignore": crowd})
        for box, score in zip(faces.boxes.astype(np.float64).tolist(), faces.scores.tolist(), strict=True):
            detected.append({**_annotation(len(detected), index, box), "score": score, "iscrowd": 0})
    sides = [coco.COCO(), coco.COCO()]
    with redirect_stdout(io.StringIO()):  # it prints how far it is
        for side, annotations in zip(sides, (labelled, detected), strict=True):
            images = [{"id": index} for index in range(len(truth))]
            side.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
            side.createIndex()
        run = cocoeval.COCOeval(*sides, "bbox")
        run.params.maxDets = [max(MIN_DETECTIONS, *(len(faces) for faces in found))]
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], ["all"]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, 0, 0, 0]  # by IoU and recall; -1 where no face is labelled
    count = sum(not item["iscrowd"] for item in labelled)
    rows = {"ap50": precision[0], "ap50_95": precision.mean(axis=0)}
    return {
        level: Curve(float(row.mean()) if count else float("nan"), row, run.params.recThrs, count)
        for level, row in rows.items()
    }


def _annotation(number: int, image: int, box_xyxy: list[float]) -> dict[str, Any]:
    x1, y1, x2, y2 = box_xyxy
    width, height = x2 - x1, y2 - y1
    # pycocotools takes an id of 0 for none
    return {"id": number + 1, "image_id": image, "category_id": 1, "bbox": [x1, y1, width, height],
            "area": width * height}  # fmt: skip
