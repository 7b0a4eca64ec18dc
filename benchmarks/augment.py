"""Augmentation: ms per image on one core, beside that of biubug6/Pytorch_Retinaface where a checkout of it is at hand.

python -m benchmarks.augment --data WIDERFACE [--original CHECKOUT] [--out benchmarks/results/augment.json]

Training images of WIDER FACE, one after the other, cropped and scaled to 640x640. "pixels" starts from the decoded
image; "file" also reads it, with facespec.images.read_image here and cv2.imread there. The original returns float32
with the mean taken off, as planes; ours returns uint8, and the rest is done to whole batches where the network is. The
checkout may be named by RETINAFACE_ORIGINAL instead; only two of its files are run, unchanged.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import benchmark_parser, parse, write_result
from benchmarks.loss import add_original, load_original
from facespec.cli import run, text_table
from facespec.images import read_image
from facespec.letterbox import Frame
from facespec.spec import PreprocessSpec
from trainer.data import AugmentSettings, FileSample, open_dataset
from trainer.data.augment import augment
from trainer.data.dataset import Faces
from trt_runtime.measure import Latency

SIZE = 640


def to_rows(faces: Faces) -> NDArray[np.float64]:
    """Return faces as the original's data loader gives them: (n, 15) x1, y1, x2, y2, landmarks and label."""
    landmarks = np.where(faces.has_landmarks[:, None], faces.landmarks.reshape(-1, 10), -1)
    labels = np.where(faces.has_landmarks, 1, -1)[:, None]
    return np.hstack([faces.boxes, landmarks, labels]).astype(np.float64)


def ours(settings: AugmentSettings, image: Frame, faces: Faces, seed: int) -> object:
    """Augment an image and its faces by a seed."""
    return augment(image, faces, SIZE, np.random.default_rng(seed), settings)


def main() -> int:
    """Run the benchmark, print a table and write the result."""
    parser = benchmark_parser("augment", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder with train/images and labels")
    add_original(parser)
    parser.add_argument("--count", type=int, default=300, help="number of images")
    args = parse(parser, count=8)
    cv2.setNumThreads(1)
    random.seed(0)  # the original draws from it
    samples = [sample for sample in open_dataset(str(args.data), "train").samples if isinstance(sample, FileSample)]
    samples = [sample for sample in samples if len(sample.labelled)]  # the original refuses the others
    chosen = [samples[index] for index in np.linspace(0, len(samples) - 1, args.count).astype(int)]
    ways: dict[str, tuple[Callable[[Path], Any], Callable[[Any, Faces, int], object]]] = {}
    for name, settings in (("ours", AugmentSettings()), ("ours, original settings", AugmentSettings.original())):
        ways[name] = read_image, partial(ours, settings)
    if args.original:
        original = load_original(args.original, "data/data_augment.py").preproc(SIZE, PreprocessSpec().mean_bgr)
        ways["original"] = (
            lambda path: cv2.imread(str(path)),
            lambda image, faces, _: original(image, to_rows(faces)),
        )
    times: dict[str, list[float]] = defaultdict(list)
    for seed, sample in enumerate([chosen[0], *chosen]):
        image, faces = sample.load()
        for name, (read, call) in ways.items():
            for source in ("pixels", "file"):
                start = time.perf_counter()
                call(image if source == "pixels" else read(sample.path), faces, seed)
                if seed:  # the first warms up
                    times[f"{name}, {source}"].append((time.perf_counter() - start) * 1e3)
    latencies = {name: Latency.of(np.array(values)) for name, values in times.items()}
    results = [{"run": name, "ms": latency.to_dict()} for name, latency in latencies.items()]
    what = f"ms per image of augmentation to {SIZE}x{SIZE} on one core, from decoded pixels or from the JPEG file"
    write_result(args, what, results, "opencv-python", "numpy", "torch", images=args.count)
    lines = [[name, *(f"{ms:.2f}" for ms in (one.mean, one.p50, one.p95))] for name, one in latencies.items()]
    print(text_table(["ms per image", "mean", "p50", "p95"], lines))
    return 0


if __name__ == "__main__":
    run(main)
