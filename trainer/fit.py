"""Train a RetinaFace.

python -m trainer.fit --data data/widerface --pretrained mobilenetV1X0.25_pretrain.tar
python -m trainer.fit --recipe try
python -m trainer.fit --resume auto
torchrun --nproc-per-node 4 -m trainer.fit --data widerface
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facespec.cli import ArgumentParser, make_callable, require, run
from facespec.errors import MissingPackageError

if TYPE_CHECKING:
    from trainer.config import TrainConfig

FLAGS: dict[str, tuple[str, type, str]] = {
    "--recipe": (
        "recipe",
        str,
        "default, deploy640 (for frames letterboxed to 640), original (as the published weights were trained), dense "
        "(with a pixel-wise term), finetune, or try (two minutes)",
    ),
    "--data": ("data.source", str, "folder, label file, synthetic, or widerface ($WIDERFACE_ROOT, or data/widerface)"),
    "--val": ("data.val", str, "what is evaluated on (default: the val split of --data)"),
    "--images": ("data.images", str, "folder of the images of a label file (default: beside it)"),
    "--category": ("data.category", str, "of the faces in a COCO file (default: face, or the only one)"),
    "--size": ("data.size", int, "side of the square network input in pixels"),
    "--batch": ("data.batch", int, "images of a step, over all processes together"),
    "--overfit": ("data.overfit", int, "train on the first N images alone, as they are, and evaluate on them"),
    "--backbone": ("model.backbone", str, "mobilenet0.25, mobilenet0.5, mobilenet1.0, resnet18, resnet34 or resnet50"),
    "--pretrained": ("model.pretrained", str, "weights of a detector, or ImageNet's of the backbone (default: none)"),
    "--teacher": ("teacher.weights", str, "weights of a detector that is learned from, beside the labels"),
    "--unlabelled": ("teacher.images", str, "folder of images without labels, in which the teacher finds the faces"),
    "--epochs": ("schedule.epochs", int, "passes over the data"),
    "--lr": ("optimizer.lr", float, "highest learning rate"),
    "--precision": ("precision", str, "fp32, bf16, or auto: bf16 where the processor computes in it"),
    "--seed": ("seed", int, "of weights, order and augmentation"),
    "--out": ("run.output", str, "folder of checkpoints and logs"),
    "--device": ("run.device", str, "auto, cpu, cuda or cuda:N"),
    "--workers": ("run.workers", int, "processes that read images, for each training process"),
    "--checkpoint-every": ("run.checkpoint_every", int, "steps between checkpoints"),
    "--evaluate-every": ("run.evaluate_every", int, "epochs between evaluations; 0 evaluates the last alone"),
}
"""Options, the settings they stand for, their types, and what they say."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what a command line asks for: `settings` by their names, `config`, `resume` and `check_data`."""
    defaults: dict[str, Any] = {}
    with suppress(MissingPackageError):  # without torch there is --help all the same
        require("torch", "train", "training")
        from trainer.config import TrainConfig, to_settings

        defaults = to_settings(TrainConfig())
    parser = ArgumentParser(
        prog="python -m trainer.fit",
        description="Train a RetinaFace. Settings: defaults, then the recipe, then the YAML file, then the flags.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    for flag, (name, kind, text) in FLAGS.items():
        shown = "" if defaults.get(name) is None else f" (default: {defaults[name]})"
        typed: dict[str, Any] = {"type": kind, "metavar": flag.removeprefix("--").upper(), "help": text + shown}
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, **typed)
    compiling = "run the network through torch.compile"
    parser.add_argument("--compile", dest="run.compile", action="store_true", default=argparse.SUPPRESS, help=compiling)
    other = "any other setting, such as loss.box_weight=1"
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help=other)
    resume = "go on from OUTPUT/last.pth if it is there, or a checkpoint"
    parser.add_argument("--resume", metavar="auto|FILE", help=resume)
    parser.add_argument("--check-data", action="store_true", help="look at the data instead of training")
    parser.add_argument("--list-settings", action="store_true", help="say what --set takes, with defaults, and end")
    settings = vars(parser.parse_args(argv))
    options = {name: settings.pop(name) for name in ("config", "resume", "check_data", "list_settings")}
    for item in settings.pop("set") or ():
        name, equals, text = item.partition("=")
        if not equals:
            parser.error(f"--set {item}: expected NAME=VALUE")
        require("torch", "train", "training")
        from trainer.config import parse_yaml

        settings[name] = parse_yaml(text, f"--set {name}")
    return argparse.Namespace(settings=settings, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(argv)
    require("torch", "train", "training")
    from trainer.checkpoint import read_training
    from trainer.config import read_yaml, resolve, settings_table
    from trainer.loop import LAST, check_training, fit

    said = {**(read_yaml(options.config) if options.config else {}), **options.settings}
    if options.list_settings:
        for name, default, text in settings_table():
            print(f"{name} = {default}\n    {text}")
        return 0
    if options.check_data:
        return _check_data(resolve(said))
    resume = Path(options.resume) if options.resume else None
    if options.resume == "auto":
        said["run.output"] = resolve(said).run.output
        resume = Path(said["run.output"]) / LAST
        if not resume.exists():
            print(f"nothing to resume in {said['run.output']}: a new run")
            resume = None
    base = None
    if resume:
        _, training = read_training(resume)
        check_training(resume, training)
        base = training["settings"]
    fit(resolve(said, base), resume=resume)
    return 0


def _check_data(config: TrainConfig) -> int:
    """Report on the training data; return 1 if training would refuse some of it."""
    from trainer.data import Kind, check_data, open_dataset

    data, picture = config.data, Path(config.run.output) / "data.png"
    dataset = open_dataset(data.source, "train", data.root, images=data.images, category=data.category)
    report = check_data(dataset, picture, data.size, config.augment, config.seed)
    for problem in report.problems:
        print(problem)
    print(f"{dataset.name}: {report.summary()}")
    print(f"some of it, as it is trained: {picture}")
    return int(Kind.DAMAGED_IMAGE in report.counts() and not data.skip_damaged)


def _fit(config: TrainConfig, **options: Any) -> list[dict[str, float]]:
    """Train as `trainer.loop.fit` does: that imports torch, which this module does without until then."""
    require("torch", "train", "training")
    from trainer.loop import fit

    return fit(config, **options)


make_callable(__name__, _fit)

if __name__ == "__main__":
    sys.exit(run(main))
