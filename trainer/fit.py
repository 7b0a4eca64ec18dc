"""Train a RetinaFace.

python -m trainer.fit --data data/widerface --pretrained mobilenetV1X0.25_pretrain.tar
python -m trainer.fit --data synthetic --size 128 --epochs 2
python -m trainer.fit --resume auto
torchrun --nproc-per-node 4 -m trainer.fit --data widerface
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facespec.cli import ArgumentParser, require, run

if TYPE_CHECKING:
    from trainer.config import TrainConfig

AUTO = "auto"

FLAGS: dict[str, tuple[str, type, str]] = {
    "--recipe": ("recipe", str, "default, original (as the published weights were trained), or finetune"),
    "--data": (
        "data.source",
        str,
        "folder, label file, synthetic, or widerface ($WIDERFACE_ROOT, or data/widerface)",
    ),
    "--val": ("data.val", str, "what is evaluated on (default: the val split of --data)"),
    "--size": ("data.size", int, "side of the square network input in pixels"),
    "--batch": ("data.batch", int, "images of a step, over all processes together"),
    "--overfit": ("data.overfit", int, "train on the first N images alone, as they are, and evaluate on them"),
    "--backbone": ("model.backbone", str, "mobilenet0.25, mobilenet0.5, mobilenet1.0, resnet18, resnet34 or resnet50"),
    "--pretrained": ("model.pretrained", str, "ImageNet weights of the backbone, or a detector to go on from"),
    "--epochs": ("schedule.epochs", int, "passes over the data"),
    "--lr": ("optimizer.lr", float, "highest learning rate"),
    "--precision": ("precision", str, "fp32, bf16, or auto: bf16 where the processor computes in it"),
    "--seed": ("seed", int, "of weights, order and augmentation"),
    "--out": ("run.output", str, "folder of checkpoints and logs"),
    "--device": ("run.device", str, "cpu, cuda or auto"),
    "--workers": ("run.workers", int, "processes that read images, for each training process"),
    "--checkpoint-every": ("run.checkpoint_every", int, "steps between checkpoints"),
    "--evaluate-every": ("run.evaluate_every", int, "epochs between evaluations; 0 evaluates the last alone"),
}
"""Options, the settings they stand for, their types, and what they say."""


@dataclass(frozen=True)
class FitOptions:
    """What a command line asks for.

    Attributes:
        settings: Those given by flags.
        config: YAML file of more settings.
        resume: "auto" for last.pth in the output folder if it is there, a checkpoint, or None for a new run.
        check_data: Look at the data instead of training.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None
    resume: str | None = None
    check_data: bool = False


def parse_arguments(argv: Sequence[str] | None) -> FitOptions:
    """Return the options of a command line."""
    parser = ArgumentParser(
        prog="python -m trainer.fit",
        description="Train a RetinaFace. Settings: defaults, then the recipe, then the YAML file, then the flags.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    for flag, (_, kind, text) in FLAGS.items():
        parser.add_argument(flag, type=kind, help=text)
    parser.add_argument("--compile", action="store_true", default=None, help="run the network through torch.compile")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting, such as loss.box_weight=1"
    )
    parser.add_argument(
        "--resume", metavar="auto|FILE", help="go on from OUTPUT/last.pth if it is there, or a checkpoint"
    )
    parser.add_argument("--check-data", action="store_true", help="look at the data instead of training")
    args = parser.parse_args(argv)
    given = vars(args)
    settings = {name: given[flag[2:].replace("-", "_")] for flag, (name, _, _) in FLAGS.items()}
    settings["run.compile"] = args.compile
    settings = {name: value for name, value in settings.items() if value is not None}
    for item in args.set:
        name, equals, text = item.partition("=")
        if not equals:
            parser.error(f"--set {item}: expected NAME=VALUE")
        require("torch", "train", "training")
        from trainer.config import parse_yaml

        settings[name] = parse_yaml(text, f"--set {name}")
    return FitOptions(settings, args.config, args.resume, args.check_data)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(argv)
    require("torch", "train", "training")
    from trainer.checkpoint import read_training
    from trainer.config import read_yaml, resolve
    from trainer.loop import LAST, fit

    said = {**(read_yaml(options.config) if options.config else {}), **options.settings}
    if options.check_data:
        return _check_data(resolve(said))
    resume = Path(options.resume) if options.resume else None
    if options.resume == AUTO:
        said["run.output"] = resolve(said).run.output
        resume = Path(said["run.output"]) / LAST
        if not resume.exists():
            print(f"nothing to resume in {said['run.output']}: a new run")
            resume = None
    base = read_training(resume)[1]["settings"] if resume else None
    fit(resolve(said, base), resume=resume)
    return 0


def _check_data(config: TrainConfig) -> int:
    """Report on the training data; return 1 if training would stop at some of it."""
    from trainer.data import Kind, check_data, open_dataset

    data, picture = config.data, Path(config.run.output) / "data.png"
    dataset = open_dataset(data.source, "train", Path(data.root) if data.root else None)
    report = check_data(dataset, picture, data.size, config.augment, config.seed, sys.stderr.isatty())
    for line in report.lines():
        print(line)
    print(f"{dataset.name}: {report.summary()}")
    print(f"some of it, as it is trained: {picture}")
    return int(Kind.DAMAGED_IMAGE in report.counts())


if __name__ == "__main__":
    sys.exit(run(main))
