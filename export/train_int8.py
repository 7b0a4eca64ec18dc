"""Learn the weights and the steps of an INT8 model, with the float model as the teacher, on images without labels.

python -m export.train_int8 --calib widerface_train --data WIDERFACE --out q.pth
python -m export.to_trt --weights q.pth --int8 --out face.engine
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.options import (
    CalibrationOptions,
    add_calibration_arguments,
    calibration_files,
    load_recipe,
)
from export.sensitivity import FIGURES, SensitivityOptions, faces_of, head_maps, other_images
from facespec.agreement import Agreement
from facespec.cli import ArgumentParser, argument, require, run, text_table
from facespec.errors import ModelFileError, OutputError, SpecError
from facespec.files import check_outputs, write_text
from facespec.spec import DEFAULT_SCORE_THRESHOLD, DEFAULT_WEIGHTS, parse_size

DEFAULT_IMAGES = 512


@dataclass(frozen=True)
class TrainInt8Options:
    """What to learn from.

    Attributes:
        weights: Checkpoint of the teacher, or the name of published weights.
        calibration: Images to calibrate and to learn on, and which convolutions stay in float.
        out: Checkpoint to write.
        held_out: Other images of the source at most, to measure on before and after.
        size_hw: Network size that the images are letterboxed to.
        updates: Updates of the weights.
        batch: Crops of each.
        lr: Highest learning rate: how far an update moves a weight, in 127ths of the largest of its filter.
    """

    weights: str
    calibration: CalibrationOptions
    out: Path
    held_out: int = 64
    size_hw: tuple[int, int] = (640, 640)
    updates: int = 600
    batch: int = 8
    lr: float = 0.003

    def __post_init__(self) -> None:
        self.measured()
        if self.out.suffix.lower() != ".pth":
            raise OutputError(f"--out {self.out}: give a name that ends in .pth")
        for option, value in (("--updates", self.updates), ("--batch", self.batch)):
            if value < 1:
                raise SpecError(f"{option} {value}: give a number from 1 on")
        if not 0 < self.lr <= 10:
            raise SpecError(f"--lr {self.lr:g}: give a number over 0, at most 10")

    def measured(self) -> SensitivityOptions:
        """Return which images are measured on."""
        return SensitivityOptions(self.weights, self.calibration, self.held_out, self.size_hw)

    @property
    def image_list(self) -> Path:
        """The names of the images learned on, one a line."""
        return Path(f"{self.out}.calibration.txt")


@dataclass(frozen=True)
class TrainedInt8:
    """What learning brought: agreement with the teacher on images that were not learned on; `str()` gives a table.

    `before` is INT8 as `--int8` makes it; what is not INT8 computes in FP32 in both.
    """

    int8_share: float
    images: int
    held_out: int
    before: Agreement
    after: Agreement

    def __str__(self) -> str:
        table = []
        for name, agreement in (("calibrated", self.before), ("learned", self.after)):
            values = [(getattr(agreement, figure), digits) for figure, digits in FIGURES.items()]
            table.append([name, *("none" if value is None else f"{value:.{digits}f}" for value, digits in values)])
        columns = ["INT8", "recall %", "precision %", "mean IoU", "landmark error, % of face"]
        return (
            f"{text_table(columns, table)}\n{100 * self.int8_share:.1f} % of multiply-accumulates in INT8; learned on "
            f"{self.images} images, measured on {self.held_out} others with {self.before.faces} faces of the teacher"
        )


def train_int8(options: TrainInt8Options, progress: bool = False) -> TrainedInt8:
    """Calibrate, learn, measure before and after, and write the checkpoint.

    Raises:
        DataError: The images are no calibration set, or too few are left to measure on.
        ModelFileError: The weights cannot be read, or were trained for INT8 already.
        MissingPackageError: torch, onnx, onnxsim or onnxruntime is not installed.
        OutputError: The checkpoint cannot be written.
    """
    for module in ("torch", "onnx", "onnxsim", "onnxruntime"):
        require(module, "export", "learning INT8")
    from export.calibration import calibrate, chosen_recipe, load_inputs
    from export.distillation import Pace, learn
    from export.graph import build_heads
    from export.learned_int8 import LearnedInt8, Lesson, load_learned, save_learned
    from export.quantize import calibrated_steps, equalize, mac_shares, with_steps
    from trainer.checkpoint import load_model

    read = [options.weights, *calibration_files(options.calibration)]
    check_outputs([("--out", options.out), ("--out", options.image_list)], read)
    calibration, size_hw = options.calibration, options.size_hw
    if load_learned(options.weights):
        raise ModelFileError(f"{options.weights} was trained for INT8: give the weights that it was made from")
    model = load_model(options.weights)
    # the score threshold is that of the comparison: fewer candidates to decode, and the same faces over it
    spec = dataclasses.replace(
        model.spec, decode=dataclasses.replace(model.spec.decode, score_threshold=DEFAULT_SCORE_THRESHOLD)
    )
    teacher = build_heads(model, size_hw)
    recipe = chosen_recipe(calibration, [node.name for node in teacher.graph.node if node.op_type == "Conv"])
    used = calibrate(teacher, calibration, size_hw, model.spec, progress)
    _, held_out = other_images(options.measured(), used, model.spec)
    graph, ranges = equalize(teacher, used.ranges) if recipe.equalize else (teacher, used.ranges)
    steps = calibrated_steps(graph, ranges, recipe)
    quantised = with_steps(graph, steps)
    if not steps:
        raise ModelFileError(f"{calibration.recipe}: nothing is left in INT8")
    reference = [faces_of(heads, size_hw, spec) for heads in head_maps(teacher, held_out)]
    before = Agreement.of(reference, [faces_of(heads, size_hw, spec) for heads in head_maps(quantised, held_out)])

    _, pixels, _ = load_inputs(calibration, size_hw, model.spec)
    boxes = [faces_of(heads, size_hw, spec).boxes for heads in head_maps(teacher, pixels)]
    centres = [np.asarray((each[:, :2] + each[:, 2:]) / 2, np.float32) for each in boxes]
    pace = Pace(options.updates, options.batch, options.lr)
    graph, steps = learn(graph, steps, teacher, pixels, centres, pace, calibration.seed, progress)
    quantised = with_steps(graph, steps)
    after = Agreement.of(reference, [faces_of(heads, size_hw, spec) for heads in head_maps(quantised, held_out)])
    lesson = Lesson(calibration.source, len(pixels), calibration.seed, options.updates, model.spec.weights_sha256)
    write_text(options.image_list, "\n".join(used.images) + "\n")
    save_learned(options.out, graph, LearnedInt8(steps, lesson))
    share = mac_shares(quantised, size_hw)["int8"]
    return TrainedInt8(share, len(pixels), len(held_out), before, after)


def parse_arguments(argv: Sequence[str] | None) -> TrainInt8Options:
    """Return the options of a command line."""
    default = {field.name: field.default for field in dataclasses.fields(TrainInt8Options)}
    parser = ArgumentParser(
        prog="python -m export.train_int8",
        description="Train the weights for INT8, with the float model as the teacher and images without labels. What "
        "is written is exported with --int8 and without --calib.",
    )
    add = parser.add_argument
    add("--weights", default=DEFAULT_WEIGHTS, help="checkpoint (.pth), or the name of published weights")
    add_calibration_arguments(parser, required=True)
    parser.set_defaults(images=DEFAULT_IMAGES)
    layers = "which layers stay in half precision, as export.sensitivity --out writes it (default: as for --int8)"
    add("--int8-recipe", dest="recipe", type=Path, metavar="FILE", help=layers)
    add("--held-out", type=int, default=default["held_out"], metavar="N", help="other images to measure on, at most")
    add("--size", dest="size_hw", type=argument(parse_size), default="640x640", help="HEIGHTxWIDTH, multiples of 32")
    add("--updates", type=int, default=default["updates"], metavar="N", help="of the weights")
    add("--batch", type=int, default=default["batch"], metavar="N", help="crops of each update")
    moves = "how far an update may move a weight, in 127ths of the largest of its filter; it falls to 0"
    add("--lr", type=float, default=default["lr"], help=moves)
    add("--out", type=Path, default=Path("int8.pth"), help="checkpoint to write")
    given = vars(parser.parse_args(argv))
    fields = [field.name for field in dataclasses.fields(CalibrationOptions)]
    calibration = CalibrationOptions(**{name: given.pop(name) for name in fields})
    if calibration.recipe:
        load_recipe(calibration.recipe)  # refused now, not after the calibration
    return TrainInt8Options(calibration=calibration, **given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(argv)
    start = time.perf_counter()
    print(train_int8(options, progress=sys.stderr.isatty()))
    seconds = time.perf_counter() - start
    print(f"wrote {options.out}, {seconds:.0f} s: python -m export.to_trt --weights {options.out} --int8")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
