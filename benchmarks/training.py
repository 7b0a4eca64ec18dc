"""Training on WIDER FACE images from an ImageNet backbone: the original's schedule and ours; and fine-tuning.

python -m benchmarks.training --data WIDERFACE --imagenet mobilenetV1X0.25_pretrain.tar [--runs build/training]

Each run is `trainer.fit` with the flags that are written beside its figures. One that is finished in its folder is
read, one that was stopped goes on.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from benchmarks.environment import benchmark_parser, parse, write_result
from facespec.cli import run
from facespec.figures import figure_file
from facespec.spec import DEFAULT_WEIGHTS
from trainer.average_precision import LEVELS
from trainer.checkpoint import read_training
from trainer.evaluate import EvaluateOptions, evaluate
from trainer.fit import main as fit_command
from trainer.loop import LAST
from trainer.validation import SIMPLE_LEVEL

PUBLISHED = {"easy": 75.38, "medium": 71.54, "hard": 52.03}
"""What the original implementation reaches by its schedule with the same images, epochs, batch and size."""

PLOT = Path("docs/training.png")
MEASURED = (*LEVELS, SIMPLE_LEVEL)
TERMS = ("total", "classification", "box", "landmark")

RUNS = {
    "original": "--recipe original --pretrained IMAGENET --epochs 12",
    "default": "--pretrained IMAGENET --epochs 12",
    "finetune": "--recipe finetune --epochs 3",
    "overfit": "--overfit 8 --pretrained IMAGENET",
}
"""Flags of each run, beside `SHARED`."""

SHARED = "--data widerface --batch 8 --evaluate-every 3"


def read_run(folder: Path, flags: str) -> dict[str, Any]:
    """Return the figures of a run that has ended."""
    history = read_training(folder / LAST)[1]["history"]
    with (folder / "epochs.csv").open() as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    return {
        "run": folder.name,
        "flags": f"python -m trainer.fit {flags}",
        "ap": {level: round(history[-1][level], 2) for level in MEASURED if level in history[-1]},
        "minutes_of_steps": round(sum(seconds) / 60, 1),
        "epochs": [{name: round(row[name], 4) for name in (*TERMS, *MEASURED) if name in row} for row in history],
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and hard AP by epoch, of the runs that are measured by it."""
    with figure_file(path, "train", (11, 4), dpi=130) as figure:
        left, right = figure.subplots(1, 2)
        left.set(xlabel="epoch", ylabel="classification loss", title="645 images of WIDER FACE, batch 8, 640 px")
        right.set(xlabel="epoch", ylabel="AP hard, %", title="323 other images, at their own size")
        results = [result for result in results if "hard" in result["ap"]]
        for result, colour in zip(results, ("#c8373a", "#2a6f9d", "#2a9d4b"), strict=True):
            epochs = range(1, len(result["epochs"]) + 1)
            left.plot(epochs, [row["classification"] for row in result["epochs"]], color=colour, label=result["run"])
            measured = [
                (epoch, row["hard"]) for epoch, row in zip(epochs, result["epochs"], strict=True) if "hard" in row
            ]
            right.plot(*zip(*measured, strict=True), "o-", color=colour, label=result["run"])
        right.axhline(PUBLISHED["hard"], color="#c8373a", ls="--", lw=1, label="original implementation, 12 epochs")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend()


def main() -> int:
    """Train what is missing, print the figures, draw them and write the result."""
    parser = benchmark_parser("training", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder: train with label.txt, val and gt")
    parser.add_argument("--imagenet", type=Path, required=True, help="ImageNet weights of mobilenet0.25")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: build/training, or build/quick)")
    args = parse(parser)
    runs = args.runs or Path("build/quick" if args.quick else "build/training")
    results = []
    for name, own in RUNS.items():
        folder, flags = runs / name, f"{SHARED} {own}"
        flags += " --overfit 2 --epochs 1 --batch 1 --size 160" if args.quick else ""
        words = flags.replace("IMAGENET", str(args.imagenet)).split()
        fit_command([*words, "--data", str(args.data), "--out", str(folder), "--resume", "auto"])
        results.append(read_run(folder, flags))
        print(name, *results[-1]["ap"].values(), flush=True)
    what = (
        "WIDER FACE AP in percent at original size on 323 images, after training mobilenet0.25 on 645 others at 640 px "
        "with batch 8: 12 epochs from an ImageNet backbone by the original's schedule and by the default recipe, and "
        "3 epochs of fine-tuning from the published weights; overfit: on 8 images as they are, AP on these, faces "
        "from 16 pixels; original_implementation: what its own code reaches by its schedule, measured elsewhere; "
        "IMAGENET: the weights of the backbone"
    )
    more: dict[str, Any] = {"original_implementation": PUBLISHED}
    if not args.quick:
        plot(results, PLOT)
        start = evaluate(EvaluateOptions(args.data / "gt", detector=DEFAULT_WEIGHTS, data=args.data))
        more["start_of_finetune"] = {name: round(start[name], 2) for name in LEVELS}
    write_result(args, what, results, "torch", "numpy", "opencv-python", **more)
    return 0


if __name__ == "__main__":
    run(main)
