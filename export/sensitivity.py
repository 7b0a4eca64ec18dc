"""Which layers cost accuracy in INT8, and what share of the arithmetic stays in INT8 for a given budget.

python -m export.sensitivity --weights mobilenet0.25 --calib widerface_train --recall 98.5 --plot sensitivity.png

The figures of the documentation come from
python -m export.sensitivity --calib widerface_train --data WIDERFACE --held-out 512
    --json benchmarks/results/int8_sensitivity.json --plot docs/int8_sensitivity.png
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from export.options import (
    DEMO,
    MAX_IMAGES,
    MIN_IMAGES,
    MIN_INT8_SHARE,
    CalibrationOptions,
    Int8Recipe,
    add_calibration_arguments,
    calibration_files,
    find_calibration_images,
)
from facespec.agreement import Agreement, Budget
from facespec.cli import ArgumentParser, argument, json_output, require, run, text_table
from facespec.detections import Detections
from facespec.errors import DataError, ModelFileError, SpecError
from facespec.figures import PLOT_SUFFIXES, check_plot, figure_file
from facespec.files import check_outputs, write_text
from facespec.letterbox import Frame
from facespec.samples import sample_crops
from facespec.spec import DEFAULT_SCORE_THRESHOLD, DEFAULT_WEIGHTS, ModelSpec, check_size, parse_size
from trt_runtime.kernels import decode_nms, library
from trt_runtime.measure import environment
from trt_runtime.onnx_model import open_session

if TYPE_CHECKING:
    import onnx

    from export.calibration import Calibration

PROXY_IMAGES = 8
"""Held-out images that tell the cost of a layer alone; the steps are measured on all of them."""

PROXY_LOGIT = -1.0
"""Priors count for the cost of a layer if FP32 gives them a face logit over this: a probability over 0.27."""

MAX_STEPS = 20
BARS = 16

FIGURES = {"recall": 2, "precision": 2, "mean_iou": 3, "landmark_error": 2}
"""What is recorded of an agreement, and the digits shown of it in a table."""

Heads = list[NDArray[np.float32]]
"""Head maps of one image."""


@dataclass(frozen=True)
class SensitivityOptions:
    """What to measure: `held_out` other images of the source at most, beside those a build calibrates on."""

    weights: str
    calibration: CalibrationOptions
    held_out: int = 96
    size_hw: tuple[int, int] = (640, 640)

    def __post_init__(self) -> None:
        check_size(self.size_hw)
        if not MIN_IMAGES <= self.held_out <= MAX_IMAGES:
            raise SpecError(f"--held-out {self.held_out}: give a number from {MIN_IMAGES} to {MAX_IMAGES}")


@dataclass(frozen=True)
class Layer:
    """A convolution that alone computes in INT8, and its share of the multiply-accumulates of all convolutions.

    `cost` is the RMS error of the head outputs (logits, box and landmark deltas) at priors that see a face.
    """

    name: str
    cost: float
    mac_share: float

    @property
    def priority(self) -> float:
        """Squared error that is saved by keeping it in float, per multiply-accumulate."""
        return self.cost**2 / self.mac_share


@dataclass(frozen=True)
class Step:
    """A graph on the way from INT8 to float: which convolutions are in float, and what share of the arithmetic is not.

    `agreement` is with FP32 on the held-out images, on faces over a score of 0.5.
    """

    float_layers: tuple[str, ...]
    int8_share: float
    agreement: Agreement

    def holds(self, budget: Budget) -> bool:
        """Whether recall and landmarks are within a budget; without a face in common they are not."""
        recall, error = self.agreement.recall, self.agreement.landmark_error
        if recall is None or error is None:
            return False
        return recall >= budget.recall and error <= budget.landmark_error

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON; a figure is None if no face tells it."""
        figures = {name: getattr(self.agreement, name) for name in FIGURES}
        return {"float_layers": list(self.float_layers), "int8_share": self.int8_share, "agreement": figures}


@dataclass(frozen=True)
class Sensitivity:
    """What was measured.

    Attributes:
        layers: Every convolution, the most costly first.
        steps: From everything in INT8 to everything in float, by falling share of INT8.
        default: The graph of the default recipe.
        faces: Faces of FP32 on the held-out images.
    """

    backbone: str
    weights_sha256: str
    size_hw: tuple[int, int]
    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]
    default: Step
    faces: int
    calibration_images: tuple[str, ...]
    held_out_images: tuple[str, ...]

    def step(self, budget: Budget | None = None) -> Step:
        """Return the step with the largest share of INT8 that holds a budget.

        It was chosen on the held-out images; `export.verify` tells what it loses on other images.

        Raises:
            ModelFileError: No step that counts as INT8 holds the budget.
        """
        budget = budget or Budget()
        for step in self.steps:
            if step.int8_share >= MIN_INT8_SHARE and step.holds(budget):
                return step
        raise ModelFileError(
            f"no graph with at least {100 * MIN_INT8_SHARE:.0f} % of its multiply-accumulates in INT8 holds "
            f"{_limits(budget)}: use --fp16, or a larger budget"
        )

    def recipe(self, budget: Budget | None = None) -> Int8Recipe:
        """Return the recipe of `step`."""
        return Int8Recipe(float_depthwise=False, float_layers=self.step(budget).float_layers)

    def to_json(self, budget: Budget | None = None) -> str:
        """Return everything as JSON: in `results` the step that holds a budget, and date, command and machine."""
        budget = budget or Budget()
        chosen: dict[str, Any] = {"budget": {"recall": budget.recall, "landmark_error": budget.landmark_error}}
        with suppress(ModelFileError):
            chosen |= self.step(budget).to_dict()
        steps = {"steps": [step.to_dict() for step in self.steps], "default": self.default.to_dict()}
        what = (
            f"{self.backbone} at {self.size_hw[0]}x{self.size_hw[1]}, measured on {len(self.held_out_images)} "
            f"images with {self.faces} faces of FP32 over a score of 0.5; what is not INT8 computes in FP32; layers: "
            "RMS error of the head outputs at faces with one convolution alone in INT8"
        )
        origin = environment("torch", "onnx", "onnxruntime", "numpy")
        return json.dumps({"what": what, **dataclasses.asdict(self), **steps, "results": [chosen], **origin}, indent=2)

    def __str__(self) -> str:
        layers = [[one.name, f"{one.cost:.4f}", f"{100 * one.mac_share:.2f}"] for one in self.layers[:BARS]]
        lines = [text_table(["alone in INT8", "RMS error", "% of MACs"], layers)]
        if len(self.layers) > BARS:
            lines.append(f"and {len(self.layers) - BARS} convolutions that cost less")
        rows = []
        for name, step in [(str(len(step.float_layers)), step) for step in self.steps] + [("default", self.default)]:
            figures = [(getattr(step.agreement, figure), digits) for figure, digits in FIGURES.items()]
            texts = ["none" if value is None else f"{value:.{digits}f}" for value, digits in figures]
            rows.append([name, f"{100 * step.int8_share:.1f}", *texts])
        columns = ["in float", "% of MACs in INT8", "recall %", "precision %", "mean IoU", "landmark error, % of face"]
        lines += ["", text_table(columns, rows)]
        lines.append(
            f"{self.faces} faces of FP32 on {len(self.held_out_images)} held-out images, calibrated on "
            f"{len(self.calibration_images)} others; 'default' is the recipe of --int8"
        )
        lines.append(f"one face is {100 / self.faces:.2f} % of recall: --held-out makes it finer")
        return "\n".join(lines)


def _limits(budget: Budget) -> str:
    return f"recall >= {budget.recall:g} %, landmark error <= {budget.landmark_error:g} %"


def sensitivity(options: SensitivityOptions, progress: bool = False) -> Sensitivity:
    """Quantise each convolution alone, then move them to float one after the other and measure what that brings.

    The order is by squared error per multiply-accumulate, as independent errors add up in squares. Early steps move one
    layer each, later ones more, so that there are `MAX_STEPS` at most. What is in float computes in float32 here; an
    engine computes it in float16, which adds next to nothing.

    Args:
        options: What to measure.
        progress: Whether to draw progress bars.

    Raises:
        DataError: Too few images, or no faces on them.
        MissingPackageError: torch, onnx, onnxsim or onnxruntime is not installed.
    """
    for module in ("torch", "onnx", "onnxsim", "onnxruntime"):
        require(module, "export", "export.sensitivity")
    from export.calibration import calibrate
    from export.graph import build_heads
    from export.parity import rows_from_maps
    from export.quantize import mac_shares, to_int8
    from trainer.checkpoint import load_model

    library()  # without a compiler this ends here, not after minutes
    model = load_model(options.weights)
    # the score threshold is that of the comparison: fewer candidates to decode, and the same faces over it
    spec = dataclasses.replace(
        model.spec, decode=dataclasses.replace(model.spec.decode, score_threshold=DEFAULT_SCORE_THRESHOLD)
    )
    graph = build_heads(model, options.size_hw)
    calibration = calibrate(graph, options.calibration, options.size_hw, model.spec, progress)
    names, pixels = other_images(options, calibration, model.spec)
    reference = list(head_maps(graph, pixels))
    faces = [faces_of(heads, options.size_hw, spec) for heads in reference]
    total = sum(map(len, faces))
    if not total:
        raise DataError(f"--calib {options.calibration.source}: FP32 finds no faces on {len(pixels)} held-out images")

    rows = [rows_from_maps(heads, spec.anchors.per_cell) for heads in reference]
    seen = [values[:, 5] - values[:, 4] > PROXY_LOGIT for values in rows]
    probes = [index for index, mask in enumerate(seen) if mask.any()][:PROXY_IMAGES]
    convolutions = [node.name for node in graph.graph.node if node.op_type == "Conv"]
    layers = []
    for name in tqdm(convolutions, desc="layers", unit="layer", disable=not progress):
        alone = to_int8(graph, calibration.ranges, _only(name))
        errors = [
            (rows_from_maps(heads, spec.anchors.per_cell) - rows[index])[seen[index]].ravel()
            for index, heads in zip(probes, head_maps(alone, [pixels[index] for index in probes]), strict=True)
        ]
        cost = float(np.sqrt(np.mean(np.square(np.concatenate(errors), dtype=np.float64))))
        layers.append(Layer(name, cost, mac_shares(alone, options.size_hw)["int8"]))

    def measured(recipe: Int8Recipe) -> Step:
        quantised = to_int8(graph, calibration.ranges, recipe)
        found = [faces_of(heads, options.size_hw, spec) for heads in head_maps(quantised, pixels)]
        share = mac_shares(quantised, options.size_hw).get("int8", 0.0)
        return Step(recipe.float_layers, share, Agreement.of(faces, found))

    order = [layer.name for layer in sorted(layers, key=lambda layer: -layer.priority)]
    counts = [0, *np.unique(np.geomspace(1, len(order), MAX_STEPS - 1).round().astype(int)).tolist()]
    steps: list[Step] = []
    for count in tqdm(counts, desc="steps", unit="step", disable=not progress):
        step = measured(Int8Recipe(float_depthwise=False, float_layers=tuple(order[:count])))
        # a recipe that names a layer also keeps those whose name contains it: their own turn then changes nothing
        if not steps or step.int8_share < steps[-1].int8_share:
            steps.append(step)
    return Sensitivity(
        backbone=spec.backbone,
        weights_sha256=spec.weights_sha256,
        size_hw=options.size_hw,
        layers=tuple(sorted(layers, key=lambda layer: -layer.cost)),
        steps=tuple(steps),
        default=measured(Int8Recipe()),
        faces=total,
        calibration_images=calibration.images,
        held_out_images=tuple(names),
    )


def _only(name: str) -> Int8Recipe:
    """Return a recipe that leaves all but one convolution in float."""

    class Only(Int8Recipe):
        def keeps_float(self, node: onnx.NodeProto) -> bool:
            return node.name != name

    return Only()


def other_images(
    options: SensitivityOptions, calibration: Calibration, spec: ModelSpec
) -> tuple[list[str], list[Frame]]:
    """Return names and letterboxed pixels of images of the source that were not calibrated on."""
    from export.calibration import letterboxed, readable

    source = options.calibration
    if source.source == DEMO:  # further crops of the same photographs: there are no others
        count = len(calibration.images)
        crops = itertools.islice(sample_crops(count + options.held_out, source.seed), count, None)
        return letterboxed(crops, options.size_hw, spec)
    taken = {*calibration.images, *calibration.skipped}
    left = [path for path in find_calibration_images(source) if str(path) not in taken]
    random.Random(source.seed + 1).shuffle(left)
    names, pixels = letterboxed(itertools.islice(readable(left, []), options.held_out), options.size_hw, spec)
    if len(names) < MIN_IMAGES:
        raise DataError(
            f"--calib {source.source}: {len(calibration.images)} images to calibrate on leave {len(names)} to measure "
            f"on, at least {MIN_IMAGES} are needed: add images, or give a smaller --images"
        )
    return names, pixels


def head_maps(graph: onnx.ModelProto, pixels: Sequence[Frame]) -> Iterator[Heads]:
    """Run a heads graph on letterboxed images and yield the maps of each."""
    session = open_session(graph.SerializeToString(), "the graph", why="export.sensitivity")
    for image in pixels:
        yield session.run(None, {"images": image[None]})


def faces_of(heads: Heads, size_hw: tuple[int, int], spec: ModelSpec) -> Detections:
    """Return the faces in pixels of the network input."""
    found = decode_nms(heads, size_hw, spec)
    if found["num_candidates"][0] < 0:
        raise ModelFileError("the network gives numbers that are not finite on a held-out image")
    count = int(found["num_detections"][0])
    boxes, scores, landmarks = (found[name][0, :count] for name in ("boxes", "scores", "landmarks"))
    return Detections(boxes, scores, landmarks, size_hw)


def plot(result: Sensitivity, budget: Budget, path: Path) -> None:
    """Draw disagreement against the share of INT8, and the most sensitive layers.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    with figure_file(path, "train", (12, 5)) as figure:
        left, right = figure.subplots(1, 2)
        shares = [100 * step.int8_share for step in result.steps]
        found = [step.agreement for step in (*result.steps, result.default)]
        lost, errors = [100 - (one.recall or 0) for one in found], [one.landmark_error for one in found]
        for label, colour, values, limit in (
            ("faces lost, %", "#c8373a", lost, 100 - budget.recall),
            ("landmark error, % of face size", "#2a6f9d", errors, budget.landmark_error),
        ):
            left.plot(shares, values[:-1], "o-", ms=4, color=colour, label=label)
            left.plot([100 * result.default.int8_share], values[-1:], "*", ms=13, color=colour)
            left.axhline(limit, color=colour, ls="--", lw=1)
        with suppress(ModelFileError):  # no step holds the budget: nothing to mark
            share = 100 * result.step(budget).int8_share
            left.axvline(share, color="#2a9d4b", lw=1, label=f"{share:.1f} % INT8 holds the budget (dashed)")
        left.plot([], [], "*", ms=13, color="grey", label="default recipe")
        left.set(
            xlabel="convolution multiply-accumulates in INT8, %",
            ylabel="disagreement with FP32",
            title=f"{result.backbone}, {result.size_hw[0]}x{result.size_hw[1]}, {result.faces} held-out faces",
            ylim=(0, None),
        )
        left.grid(alpha=0.3)
        left.legend(loc="upper left")
        top = result.layers[:BARS][::-1]
        bars = right.barh([_short(layer.name) for layer in top], [layer.cost for layer in top], color="#e09f1f")
        right.bar_label(bars, [f"{100 * layer.mac_share:.2f} % of MACs" for layer in top], padding=3, fontsize=7)
        right.set(xlabel="RMS error of head outputs at faces, this layer alone in INT8", title="most sensitive layers")
        right.margins(x=0.25)


def _short(name: str) -> str:
    """Return a node's name without what every name has: /body/stage1/stage1.1/stage1.1.0/Conv -> stage1.1.0."""
    parts = [part for part in name.split("/") if part]
    kept = parts[:-1] if len(parts) > 1 and parts[-1] == "Conv" else parts
    return kept[-1] if kept[:1] == ["body"] and "." in kept[-1] else "/".join(kept[:1] + kept[1:][-1:])


def parse_arguments(argv: Sequence[str] | None) -> tuple[SensitivityOptions, Budget, Namespace]:
    """Return what to measure, the budget, and the parsed arguments with the files to write: json, plot and out."""
    parser = ArgumentParser(
        prog="python -m export.sensitivity",
        description="Measure which layers cost accuracy in INT8, against FP32 on images that were not calibrated on, "
        "and find the recipe with the largest share of INT8 that holds a budget; exit code 1 if none does.",
    )
    budget = Budget()
    add = parser.add_argument
    add("--weights", default=DEFAULT_WEIGHTS, help="checkpoint (.pth), or the name of published weights")
    add_calibration_arguments(parser, required=True)
    add("--held-out", type=int, default=96, metavar="N", help="other images to measure on, at most")
    add("--size", type=argument(parse_size), default="640x640", help="HEIGHTxWIDTH, multiples of 32")
    add("--recall", type=float, default=budget.recall, help="percent of the faces of FP32 that must be found again")
    most = "mean landmark error at most, in percent of the face size"
    add("--landmark-error", type=float, default=budget.landmark_error, metavar="PERCENT", help=most)
    parser.add_json("all that was measured")
    add("--plot", type=Path, metavar="FILE", help=f"draw it ({', '.join(PLOT_SUFFIXES)})")
    add("--out", type=Path, metavar="FILE", help="write the recipe that holds the budget, for --int8-recipe")
    args = parser.parse_args(argv)
    images = CalibrationOptions(args.source, args.data, args.images, args.seed)
    options = SensitivityOptions(args.weights, images, args.held_out, args.size)
    return options, Budget(args.recall, args.landmark_error), args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options, budget, args = parse_arguments(argv)
    check_plot(args.plot, "train")
    read = [options.weights, *calibration_files(options.calibration)]
    check_outputs([("--json", args.json), ("--plot", args.plot), ("--out", args.out)], read)
    start = time.perf_counter()
    with json_output(args.json) as write:
        result = sensitivity(options, progress=sys.stderr.isatty())
        print(result)
        write(result.to_json(budget))
        if args.plot:
            plot(result, budget, args.plot)
            print(f"wrote {args.plot}")
        chosen, recipe = result.step(budget), result.recipe(budget)
        print(f"{100 * chosen.int8_share:.1f} % of multiply-accumulates in INT8 hold {_limits(budget)}; in float:")
        print("\n".join(f"  {name}" for name in recipe.float_layers or ["nothing"]))
        if args.out:
            write_text(args.out, recipe.to_json())
            calibration = dataclasses.replace(options.calibration, recipe=args.out)
            print(f"wrote {args.out}: python -m export.to_trt --int8 {shlex.join(calibration.words())}")
        print(f"{time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
