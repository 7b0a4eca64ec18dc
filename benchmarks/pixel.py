"""What the pixel-wise term of the loss brings: the same training with and without it, by the same seeds.

python -m benchmarks.pixel --data WIDERFACE --imagenet mobilenetV1X0.25_pretrain.tar [--runs build/pixel]

Each run is `trainer.fit` with the flags that are written beside its figures. One that is finished in its folder is
read, one that was stopped goes on.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.environment import benchmark_parser, parse, write_result
from benchmarks.training import read_run
from facespec.cli import run
from facespec.images import read_image, write_image
from facespec.opencv import cv2
from facespec.spec import DEFAULT_WEIGHTS
from trainer.checkpoint import load_model, read_training
from trainer.data.synthetic import sample_faces
from trainer.dense import DenseFaces, expose, sample
from trainer.fit import main as fit_command
from trainer.loop import LAST
from trainer.model import RetinaFace

PICTURE = Path("docs/meshes.jpg")
SEEDS = (0, 1)
TERMS = {"without": "", "with": " --set loss.pixel_weight=0.01"}
SHARED = "--data widerface --size 256 --batch 8 --workers 1 --evaluate-every 0 --pretrained IMAGENET --epochs 4"


def draw_meshes(detector: RetinaFace, term: DenseFaces, photograph: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a photograph with the mesh of its surest face over it."""
    height, width = (side // 32 * 32 for side in photograph.shape[:2])
    image = photograph[:height, :width].copy()
    pixels = torch.from_numpy(image - np.array(detector.spec.preprocess.mean_bgr, np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        features = detector.features(pixels)
        deltas, logits, _ = detector.heads(features)
        best = (logits[0, :, 1] - logits[0, :, 0]).argmax()[None]
        mesh = term.meshes(features, deltas, best, (height, width))
        seen = sample(pixels, torch.zeros(1), mesh.points_px) + term.pixel_mean
        colours = expose(mesh.colours, seen, mesh.visible.float())[0].numpy()
    points, visible = mesh.points_px[0].numpy(), mesh.visible[0].numpy()
    for corners in term.mesh.triangles.numpy():
        if visible[corners].all():
            shape = np.rint(points[corners] * 16).astype(np.int32)
            cv2.fillConvexPoly(image, shape, colours[corners].mean(axis=0).clip(0, 255).tolist(), cv2.LINE_AA, 4)
    return image


def draw(last: Path, path: Path, side: int = 200) -> None:
    """Draw the faces of photographs, and their meshes before and after a run whose last checkpoint is given."""
    before = load_model(DEFAULT_WEIGHTS)
    after, training = load_model(last), read_training(last)[1]
    after.load_state_dict(training["weights"])  # not their average: the branch has none
    term = DenseFaces(after.spec)
    term.load_state_dict(training["pixel_term"])
    tiles = []
    for name, (x1, y1, x2, y2) in sample_faces()[:2]:
        photograph = read_image(name)
        half = int(0.75 * max(x2 - x1, y2 - y1))
        x, y = int(x1 + x2) // 2, int(y1 + y2) // 2
        meshes = [draw_meshes(*one, photograph) for one in ((before, DenseFaces(before.spec)), (after, term))]
        shown = [image[max(y - half, 0) : y + half, max(x - half, 0) : x + half] for image in (photograph, *meshes)]
        tiles += [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in shown]
    write_image(path, np.hstack(tiles))


def main() -> int:
    """Train what is missing, print the figures, draw the meshes and write the result."""
    parser = benchmark_parser("pixel", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder: train with label.txt, val and gt")
    parser.add_argument("--imagenet", type=Path, required=True, help="ImageNet weights of mobilenet0.25")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: build/pixel, or build/quick)")
    args = parse(parser)
    runs = args.runs or Path("build/quick" if args.quick else "build/pixel")
    results: list[dict[str, Any]] = []
    for seed, (term, more) in itertools.product(SEEDS, TERMS.items()):
        folder, flags = runs / f"widerface_{term}_{seed}", f"{SHARED}{more} --seed {seed}"
        flags += " --overfit 2 --epochs 1 --batch 1" if args.quick else ""
        words = flags.replace("IMAGENET", str(args.imagenet)).split()
        fit_command([*words, "--data", str(args.data), "--out", str(folder), "--resume", "auto"])
        row = read_run(folder, flags)
        pixel = [round(epoch["pixel"], 2) for epoch in read_training(folder / LAST)[1]["history"]]
        results.append({"pixel_term": term == "with", "seed": seed, **row, "pixel": pixel})
        print(row["run"], *row["ap"].values(), *pixel, flush=True)
    draw(runs / "widerface_with_0" / LAST, Path("build/quick/meshes.jpg") if args.quick else PICTURE)
    what = (
        "WIDER FACE AP in percent at original size on 323 images, after 4 epochs of training mobilenet0.25 on 645 "
        "others at 256 px with batch 8 from an ImageNet backbone (IMAGENET), without and with the pixel-wise term; "
        "pixel: the term by epoch, in grey levels"
    )
    write_result(args, what, results, "torch", "numpy", "opencv-python")
    return 0


if __name__ == "__main__":
    run(main)
