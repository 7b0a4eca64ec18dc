"""Augmentation: ms per image on one core, beside that of biubug6/Pytorch_Retinaface where a checkout of it is at hand.

python -m benchmarks.augment --data WIDERFACE [--original CHECKOUT] [--out benchmarks/results/augment.json]

Training images of WIDER FACE, one after the other, cropped and scaled to 640x640. "pixels" starts from the decoded
image; "file" also reads it, with facespec.images.read_image here and cv2.imread there. The original returns float32
with the mean taken off, as planes; ours returns uint8, and the rest is done to whole batches where the network is. The
checkout may be named by RETINAFACE_ORIGINAL instead; only two of its files are run, unchanged.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import benchmark_parser, parse, write_result
from facespec.cli import run
from facespec.errors import DataError
from facespec.images import read_image
from facespec.letterbox import Frame
from facespec.spec import PreprocessSpec
from facespec.tables import text_table
from trainer.data import AugmentSettings, FileSample, open_dataset
from trainer.data.augment import augment
from trainer.data.targets import Faces

SIZE = 640
SETTINGS = {"ours": AugmentSettings(), "ours, original settings": AugmentSettings.original()}

STARTS = ("pixels", "file")

Run = Callable[[Path, Frame, Faces, int], object]


def load_original(checkout: Path) -> Callable[[Any, NDArray[np.float64]], object]:
    """Return the original's augmentation: BGR image and (n, 15) rows of x1, y1, x2, y2, landmarks and label."""
    modules = {}
    for name, file in (("utils.box_utils", "utils/box_utils.py"), ("original_augment", "data/data_augment.py")):
        spec = importlib.util.spec_from_file_location(name, checkout / file)
        if spec is None or spec.loader is None:
            raise DataError(f"--original {checkout}: no {file} in it")
        modules[name] = importlib.util.module_from_spec(spec)
        with patch.dict(sys.modules, {"utils": ModuleType("utils"), **modules}):  # the second imports the first
            spec.loader.exec_module(modules[name])
    return modules["original_augment"].preproc(SIZE, PreprocessSpec().mean_bgr)


def to_rows(faces: Faces) -> NDArray[np.float64]:
    """Return faces as the original's data loader gives them."""
    landmarks = np.where(faces.has_landmarks[:, None], faces.landmarks.reshape(-1, 10), -1)
    labels = np.where(faces.has_landmarks, 1, -1)[:, None]
    return np.hstack([faces.boxes, landmarks, labels]).astype(np.float64)


def runs(checkout: Path | None) -> dict[str, Run]:
    """Return what is timed, by name: it takes the file, its pixels, its faces and a seed."""

    def ours(settings: AugmentSettings) -> tuple[Run, Run]:
        def from_pixels(path: Path, image: Frame, faces: Faces, seed: int) -> object:
            return augment(image, faces, SIZE, np.random.default_rng(seed), settings)

        return from_pixels, lambda path, image, faces, seed: from_pixels(path, read_image(path), faces, seed)

    pairs = {name: ours(settings) for name, settings in SETTINGS.items()}
    if checkout:
        original = load_original(checkout)
        pairs["original"] = (
            lambda path, image, faces, seed: original(image, to_rows(faces)),
            lambda path, image, faces, seed: original(cv2.imread(str(path)), to_rows(faces)),
        )
    return {f"{name}, {start}": run for name, pair in pairs.items() for start, run in zip(STARTS, pair, strict=True)}


def main() -> int:
    """Run the benchmark, print a table and write the result."""
    parser = benchmark_parser("augment", __doc__)
    checkout = os.environ.get("RETINAFACE_ORIGINAL")
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder with train/images and labels")
    parser.add_argument("--original", type=Path, default=checkout, help="checkout of biubug6/Pytorch_Retinaface")
    parser.add_argument("--count", type=int, default=300, help="number of images")
    args = parse(parser, count=8)
    cv2.setNumThreads(1)
    random.seed(0)  # the original draws from it
    samples = [sample for sample in open_dataset(str(args.data), "train").samples if isinstance(sample, FileSample)]
    samples = [sample for sample in samples if len(sample.labelled)]  # the original refuses the others
    chosen = [samples[index] for index in np.linspace(0, len(samples) - 1, args.count).astype(int)]
    timed = runs(args.original)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for seed, sample in enumerate([chosen[0], *chosen]):
        image, faces = sample.load()
        for name, call in timed.items():
            start = time.perf_counter()
            call(sample.path, image, faces, seed)
            if seed:  # the first warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    results: list[dict[str, Any]] = [
        {
            "run": name,
            "ms": {
                "mean": round(float(np.mean(values)), 2),
                **{f"p{q}": round(float(np.percentile(values, q)), 2) for q in (50, 95)},
            },
        }
        for name, values in times.items()
    ]
    what = f"ms per image of augmentation to {SIZE}x{SIZE} on one core, from decoded pixels or from the JPEG file"
    write_result(args.out, what, results, "opencv-python", "numpy", "torch", images=args.count)
    columns = ["mean", "p50", "p95"]
    lines = [[row["run"], *(f"{row['ms'][name]:.2f}" for name in columns)] for row in results]
    print(text_table(["ms per image", *columns], lines))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
