"""WIDER FACE average precision, as the customary Python evaluation computes it, to the last digit.

The protocol is that of the WIDER FACE development kit (Yang et al., CVPR 2016) in the form the RetinaFace community
uses: scores are normalised over the whole data set, the precision-recall curve is sampled at 1000 thresholds, boxes
match at an IoU of 0.5 with areas that count the border pixel (+1), and faces outside a difficulty level are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facespec.cli import require
from facespec.errors import DataError

LEVELS = ("easy", "medium", "hard")
THRESHOLDS = 1000
IOU_THRESHOLD = 0.5

Array = NDArray[np.float64]
ImageKey = tuple[str, str]
"""Event folder and image name without suffix."""


@dataclass(frozen=True)
class ImageTruth:
    """Ground truth of one image.

    Attributes:
        boxes_xywh: (n, 4) float64 x, y, width, height in pixels.
        counted: For each level an (n,) bool mask of the faces that count; the others are ignored.
    """

    boxes_xywh: Array
    counted: dict[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class Curve:
    """Result of one level: its average precision in 0..1, or NaN if no face counts, and the number of those that do.

    Precision and recall are (1000,), at falling thresholds.
    """

    ap: float
    precision: Array
    recall: Array
    faces: int


def load_ground_truth(folder: str | Path) -> dict[ImageKey, ImageTruth]:
    """Read the official ground truth: wider_face_val.mat and wider_{easy,medium,hard}_val.mat.

    scipy reads them, which may crash on a file made to that end: take them from the data set, not from strangers.

    Raises:
        DataError: A file is missing or is not what it should be.
    """
    scipy_io = require("scipy.io", "evaluate", "reading WIDER FACE ground truth")
    files: dict[str, Any] = {}
    for name in ("face", *LEVELS):
        path = Path(folder) / f"wider_{name}_val.mat"
        if not path.is_file():
            raise DataError(f"{path}: missing; WIDER FACE's eval_tools have the four wider_*_val.mat files; see --data")
        try:
            files[name] = scipy_io.loadmat(path)
        except PermissionError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except Exception as error:  # scipy raises many kinds for damaged files
            raise DataError(f"{path}: not a MATLAB file, or damaged ({type(error).__name__})") from None
    truth: dict[ImageKey, ImageTruth] = {}
    try:
        face = files["face"]
        for event_index, event in enumerate(face["event_list"]):
            for index, image in enumerate(face["file_list"][event_index][0]):
                key = _file_name(event[0][0]), _file_name(image[0][0])
                boxes = face["face_bbx_list"][event_index][0][index][0].astype(np.float64).reshape(-1, 4)
                if not np.isfinite(boxes).all():
                    raise ValueError(f"{'/'.join(key)} has a box that is not finite")
                counted = {}
                for level in LEVELS:
                    listed = files[level]["gt_list"][event_index][0][index][0].astype(np.int64).ravel()
                    if len(listed) and not 1 <= listed.min() <= listed.max() <= len(boxes):
                        raise ValueError(f"{'/'.join(key)} counts faces it does not have")
                    counted[level] = np.isin(np.arange(1, len(boxes) + 1), listed)
                truth[key] = ImageTruth(boxes, counted)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: the .mat files are not WIDER FACE ground truth ({error})") from None
    return truth


def present_images(folder: Path, keys: Iterable[ImageKey]) -> dict[ImageKey, Path]:
    """Return the images that exist, in a folder of event folders of .jpg files, in the order of their keys.

    Raises:
        DataError: None of them is there.
    """
    paths = {key: folder / key[0] / f"{key[1]}.jpg" for key in keys}
    present = {key: path for key, path in paths.items() if path.is_file()}
    if not present:
        raise DataError(f"{folder}: none of the {len(paths)} WIDER FACE images is there (event/name.jpg)")
    return present


def _file_name(value: object) -> str:
    """Names become paths later on: refuse those that lead elsewhere."""
    name = str(value)
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{name[:40]!r} is not a file name")
    return name


def average_precision(
    predictions: Mapping[ImageKey, Array], truth: Mapping[ImageKey, ImageTruth], border: int = 1
) -> dict[str, Curve]:
    """Return the curve of each level.

    Args:
        predictions: (n, 5) x, y, width, height, score by image, in any order; an image without an entry has none.
        truth: The images to score.
        border: Pixels that a box is wider and higher than its size says: 1 in the official evaluation.
    """
    scored = {key: predictions[key] for key in truth if key in predictions and len(predictions[key])}
    low = min([1.0, *(float(rows[:, 4].min()) for rows in scored.values())])
    high = max([0.0, *(float(rows[:, 4].max()) for rows in scored.values())])
    # a detection counts from the first threshold that is not above its score
    thresholds = np.array([1 - (t + 1) / THRESHOLDS for t in range(THRESHOLDS)])
    proposals = {level: np.zeros(THRESHOLDS, np.int64) for level in LEVELS}
    recalled = {level: np.zeros(THRESHOLDS, np.int64) for level in LEVELS}
    for key, rows in scored.items():
        image = truth[key]
        if not len(image.boxes_xywh):
            continue
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        scores = (rows[:, 4] - low) / (high - low) if high > low else np.ones(len(rows))
        since = THRESHOLDS - np.searchsorted(thresholds[::-1], scores, side="right")
        best_iou, best_face = _best_overlaps(rows[:, :4], image.boxes_xywh, border)
        matched = best_iou >= IOU_THRESHOLD
        for level in LEVELS:
            counts = image.counted[level][best_face]
            proposals[level] += np.bincount(since[~matched | counts], minlength=THRESHOLDS)
            hits = np.flatnonzero(matched & counts)
            first = hits[np.unique(best_face[hits], return_index=True)[1]]  # a face is found once
            recalled[level] += np.bincount(since[first], minlength=THRESHOLDS)
    faces = {level: sum(int(image.counted[level].sum()) for image in truth.values()) for level in LEVELS}
    return {level: _curve(proposals[level].cumsum(), recalled[level].cumsum(), faces[level]) for level in LEVELS}


def _best_overlaps(a_xywh: Array, b_xywh: Array, border: int = 1) -> tuple[Array, NDArray[np.int64]]:
    """Return for each box of `a` its largest IoU in `b` and which box that is, a border of so many pixels counted."""
    a_high, b_high = a_xywh[:, :2] + a_xywh[:, 2:], b_xywh[:, :2] + b_xywh[:, 2:]
    overlap = [
        np.minimum(a_high[:, None, axis], b_high[None, :, axis])
        - np.maximum(a_xywh[:, None, axis], b_xywh[None, :, axis])
        + border
        for axis in (0, 1)
    ]
    inter = np.where((overlap[0] > 0) & (overlap[1] > 0), overlap[0] * overlap[1], 0)
    a_area, b_area = (
        (high[:, 0] - xywh[:, 0] + border) * (high[:, 1] - xywh[:, 1] + border)
        for high, xywh in ((a_high, a_xywh), (b_high, b_xywh))
    )
    with np.errstate(all="ignore"):  # a box of width -1 has no area; it overlaps nothing
        iou = np.where(inter > 0, inter / (a_area[:, None] + b_area[None, :] - inter), 0)
    return iou.max(axis=1), iou.argmax(axis=1)


def _curve(proposals: NDArray[np.int64], recalled: NDArray[np.int64], faces: int) -> Curve:
    precision = np.divide(recalled, proposals, out=np.zeros(THRESHOLDS), where=proposals > 0)
    if not faces:
        return Curve(float("nan"), precision, np.zeros(THRESHOLDS), 0)
    recall = recalled / faces
    # area under the envelope of the curve, as in PASCAL VOC since 2010
    x = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    steps = np.flatnonzero(x[1:] != x[:-1])
    return Curve(float(np.sum((x[steps + 1] - x[steps]) * envelope[steps + 1])), precision, recall, faces)
