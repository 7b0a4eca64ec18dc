"""What each part of the recipes for a deployed size is worth: fine-tuning, and training from an ImageNet backbone.

python -m benchmarks.ablation --data WIDERFACE --imagenet mobilenetV1X0.25_pretrain.tar [--runs build/ablation]

Each run is `trainer.fit` with the flags that are written beside its figures. One that is finished in its folder is
read, one that was stopped goes on, and `--only` takes some of them; the result file holds those that are finished.
What the teacher sees is the same in all runs of a size, so it looks once.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.environment import benchmark_parser, parse, write_result
from benchmarks.training import read_run
from facespec.cli import run
from facespec.errors import ConfigError
from facespec.files import write_text
from facespec.images import read_image
from facespec.spec import DEFAULT_WEIGHTS, AnchorSpec
from trainer.average_precision import LEVELS, load_ground_truth
from trainer.checkpoint import read_training
from trainer.config import changed, from_settings, resolve
from trainer.data import open_dataset
from trainer.data.augment import choose_crop
from trainer.data.dataset import Faces
from trainer.evaluate import EvaluateOptions, evaluate
from trainer.fit import main as fit_command
from trainer.fit import parse_arguments
from trainer.loop import LAST, TAUGHT
from trainer.matching import overlapping_priors

SIZE = 640
SHARED = f"--data widerface --batch 8 --evaluate-every 4 --set run.evaluate_size={SIZE}"

PARTS = {
    "priors": "--set model.min_sizes=[[10,20],[40,80],[160,320]]",
    "crops": "--set augment.crop_scales=[0.4,0.6,0.8,1.0,1.2,1.5,1.8,2.0]",
    "diou": "--set loss.box=diou",
    "atss": "--set loss.assign=atss",
    "simota": "--set loss.assign=simota",
    "teacher": f"--teacher {DEFAULT_WEIGHTS}",
}
"""Each part alone, as flags beside those of the recipe it is added to."""

BACKBONE = "--pretrained IMAGENET --epochs 12"
FINETUNE = "--recipe finetune --epochs 3"
TOGETHER = (
    f"{FINETUNE} --lr 2e-4 --evaluate-every 1 --teacher {DEFAULT_WEIGHTS} --set teacher.share=0.7 --set loss.box=diou "
    "--set loss.landmark_weight=0.5 --set model.min_sizes=[[10,28],[64,128],[256,512]] --set ema.decay=0.99 "
    "--set augment.crop_scales=[0.8,1.0,1.2,1.4,1.5,1.6,1.8,2.0]"
)
"""Fine-tuning with all parts: priors that keep the published model's outputs, crops near what is deployed."""


PRIORS = (
    ((16, 32), (64, 128), (256, 512)),
    ((12, 24), (48, 96), (192, 384)),
    ((10, 20), (40, 80), (160, 320)),
    ((8, 16), (32, 64), (128, 256)),
)
"""Sizes of priors that are compared, for strides 8, 16 and 32."""

PRIOR_IOU = 0.35
"""The least IoU at which a prior is trained for a face."""


PATHS = ("data.source", "model.pretrained")
"""Settings that name places, which are others on another machine."""


def plan() -> dict[str, str]:
    """Return the flags of each run, beside `SHARED`, by its name; those that decide come first, for two seeds."""
    runs = {}
    for seed in (0, 1):
        runs[f"backbone_default_{seed}"] = f"{BACKBONE} --seed {seed}"
        runs[f"backbone_deploy640_{seed}"] = f"--recipe deploy640 {BACKBONE} --seed {seed}"
        runs[f"finetune_{seed}"] = f"{FINETUNE} --seed {seed}"
        runs[f"finetune_together_{seed}"] = f"{TOGETHER} --seed {seed}"
    for name, flags in PARTS.items():
        runs[f"finetune_{name}_0"] = f"{FINETUNE} {flags} --seed 0"
        runs[f"backbone_{name}_0"] = f"{BACKBONE} {flags} --seed 0"
    return runs


def finished(folder: Path, words: list[str]) -> bool:
    """Whether a run has taken all its steps, with the settings that a command line stands for, by whatever recipe."""
    if not (folder / LAST).exists():
        return False
    training = read_training(folder / LAST)[1]
    wanted = dataclasses.replace(resolve(parse_arguments(words).settings), precision=training["settings"]["precision"])
    others = [name for name in changed(from_settings(training["settings"]), wanted) if name not in ("recipe", *PATHS)]
    if others:
        raise ConfigError(f"{folder} holds a run with another {', '.join(others)}: remove it, or choose other --runs")
    return len(training["history"]) == training["settings"]["schedule.epochs"]


def measure(folder: Path, flags: str, data: Path) -> dict[str, Any]:
    """Return the figures of a run that has ended: of its last epoch letterboxed, and of the same at original size."""
    row = read_run(folder, flags)
    row[f"ap_{SIZE}"] = row.pop("ap")
    kept = folder / "original.json"
    if not kept.exists():
        found = evaluate(EvaluateOptions(data / "gt", detector=str(folder / LAST), data=data))
        write_text(kept, json.dumps({level: round(found[level], 2) for level in LEVELS}))
    row["ap_original"] = json.loads(kept.read_text())
    return row


def prior_coverage(data: Path) -> list[dict[str, Any]]:
    """Return, by the sizes of priors, how many letterboxed faces have one with an IoU of `PRIOR_IOU`, in percent."""
    boxes, masks = [], []
    for (event, name), truth in load_ground_truth(data / "gt").items():
        path = data / "val" / "images" / event / f"{name}.jpg"
        if path.is_file():
            xywh = truth.boxes_xywh
            boxes.append(_letterboxed(np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]), read_image(path).shape))
            masks.append(np.stack([truth.counted[level] for level in LEVELS], axis=1))
    groups = [np.concatenate(boxes), np.concatenate([faces for faces, _ in _train_faces(data)])]
    rows = []
    for sizes in PRIORS:
        covered = []
        for faces in map(torch.from_numpy, groups):
            usable = ((faces[:, 2:] - faces[:, :2]) > 0).all(dim=1)
            pairs = overlapping_priors(faces[usable], AnchorSpec(min_sizes=sizes), (SIZE, SIZE), PRIOR_IOU)
            found = torch.zeros(int(usable.sum()), dtype=torch.bool)
            found[pairs.face[pairs.iou >= PRIOR_IOU]] = True
            covered.append(np.zeros(len(faces), bool))
            covered[-1][usable.numpy()] = found.numpy()
        row: dict[str, Any] = {"min_sizes": sizes, "train": round(100 * float(covered[1].mean()), 1)}
        counted = np.concatenate(masks)
        row |= {level: round(100 * float(covered[0][counted[:, i]].mean()), 1) for i, level in enumerate(LEVELS)}
        rows.append(row)
    return rows


def face_sizes(data: Path) -> list[dict[str, Any]]:
    """Return how many trained faces are below 8 and 16 px in the network input, in percent: letterboxed, in crops."""

    def row(name: str, sides: list[NDArray[np.float64]]) -> dict[str, Any]:
        every = np.concatenate(sides)
        return {"view": name, **{f"below_{px}": round(100 * float((every < px).mean()), 1) for px in (8, 16)}}

    images = _train_faces(data)
    rows = [row("letterboxed", [_sides(boxes) for boxes, _ in images])]
    for recipe in ("original", "default", "deploy640"):
        settings, rng, sides = resolve({"recipe": recipe}).augment, np.random.default_rng(0), []
        for boxes, size_hw in images:
            own = boxes * (max(size_hw) / SIZE)
            faces = Faces(own, np.zeros((len(own), 5, 2), np.float32), np.zeros(len(own), bool))
            for _ in range(3):
                left, top, side = choose_crop(size_hw, faces, rng, settings)
                centres = (own[:, :2] + own[:, 2:]) / 2 - (left, top)
                sides.append(_sides(own[((centres > 0) & (centres < side)).all(axis=1)]) * SIZE / side)
        rows.append(row(f"crops of {recipe}", sides))
    return rows


def _train_faces(data: Path) -> list[tuple[NDArray[np.float32], tuple[int, int]]]:
    """Return the letterboxed faces of each image that is trained on, and its height and width."""
    found = []
    for sample in open_dataset(str(data), "train").samples:
        image, faces = sample.load()
        found.append((_letterboxed(faces.boxes, image.shape), (image.shape[0], image.shape[1])))
    return found


def _letterboxed(boxes_xyxy: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    return (boxes_xyxy * (SIZE / max(shape[:2]))).astype(np.float32)


def _sides(boxes_xyxy: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.sqrt((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1).astype(np.float64))


def main() -> int:
    """Train what is missing and asked for, print the figures of what is finished, and write the result."""
    parser = benchmark_parser("ablation", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder: train with label.txt, val and gt")
    parser.add_argument("--imagenet", type=Path, required=True, help="ImageNet weights of mobilenet0.25")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: build/ablation, or build/quick)")
    parser.add_argument("--only", nargs="*", metavar="RUN", help="train these alone; none: read what is finished")
    args = parse(parser)
    runs, all_runs = args.runs or Path("build/quick" if args.quick else "build/ablation"), plan()
    if unknown := set(args.only or ()) - all_runs.keys():
        raise ConfigError(f"--only {sorted(unknown)[0]}: there are {', '.join(all_runs)}")
    results, missing = [], []
    for name, own in all_runs.items():
        folder, flags = runs / name, f"{SHARED} {own}"
        flags += " --overfit 2 --epochs 1 --batch 1 --size 160" if args.quick else ""
        words = flags.replace("IMAGENET", str(args.imagenet)).split()
        if not finished(folder, words) and (args.only is None or name in args.only):
            share_teacher(runs, folder)
            fit_command([*words, "--data", str(args.data), "--out", str(folder), "--resume", "auto"])
        if finished(folder, words):
            results.append(measure(folder, flags, args.data))
            print(name, *results[-1][f"ap_{SIZE}"].values(), *results[-1]["ap_original"].values(), flush=True)
        else:
            missing.append(name)
    what = (
        f"WIDER FACE AP in percent on 323 images after training mobilenet0.25 on 645 others at {SIZE} px with batch 8: "
        f"ap_{SIZE} letterboxed, ap_original at their own size, both of the last epoch; from an ImageNet backbone, and "
        "fine-tuned from the published weights; each part alone is added to the recipe it is compared with; the number "
        "at the end of a name is the seed; IMAGENET: the weights of the backbone; missing: runs that are not finished"
    )
    more: dict[str, Any] = {"missing": missing}
    if not args.quick:
        more |= {"prior_iou": PRIOR_IOU, "priors": prior_coverage(args.data), "face_sizes": face_sizes(args.data)}
        for name, size_hw in ((f"published_{SIZE}", (SIZE, SIZE)), ("published_original", None)):
            protocol = "letterbox" if size_hw else "original"
            start = evaluate(
                EvaluateOptions(
                    args.data / "gt", detector=DEFAULT_WEIGHTS, data=args.data, protocol=protocol, size_hw=size_hw
                )
            )
            more[name] = {level: round(start[level], 2) for level in LEVELS}
    write_result(args, what, results, "torch", "numpy", "opencv-python", **more)
    return 0


def share_teacher(runs: Path, folder: Path) -> None:
    """Give a run that has not started what a teacher of the same images has found for another."""
    known = next(iter(sorted(runs.glob(f"*/{TAUGHT}"))), None)
    if known is not None and not (folder / TAUGHT).exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(known, folder / TAUGHT)


if __name__ == "__main__":
    run(main)
