"""Which layers cost accuracy in INT8, and what share of the arithmetic stays in INT8 for a given budget.

python -m export.sensitivity --weights mobilenet0.25 --calib widerface_train --budget 98.5 --plot sensitivity.png
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from export.graph import HEAD_NAMES
from export.int8_recipe import MIN_INT8_SHARE, Int8Recipe
from export.options import DEMO, MAX_IMAGES, MIN_IMAGES, WIDERFACE, CalibrationOptions
from facespec.agreement import INT8_LANDMARK_ERROR, INT8_RECALL, landmark_errors, match_faces
from facespec.cli import ArgumentParser, require, run
from facespec.errors import DataError, ImageError, ModelFileError, OutputError, SpecError
from facespec.files import atomic_path, check_outputs, write_text
from facespec.images import read_image
from facespec.letterbox import Frame
from facespec.spec import DEFAULT_SCORE_THRESHOLD, DEFAULT_WEIGHTS, ModelSpec, check_size, parse_size
from trt_runtime.kernels import decode_nms, library
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
PLOT_SUFFIXES = (".png", ".svg", ".pdf")

Heads = list[NDArray[np.float32]]
"""Head maps of one image."""


@dataclass(frozen=True)
class Budget:
    """What a graph may lose against FP32.

    Attributes:
        recall: Least share of the faces of FP32 that are found again, in percent.
        landmark_error: Greatest mean distance of landmarks, in percent of the face size.
    """

    recall: float = INT8_RECALL
    landmark_error: float = INT8_LANDMARK_ERROR

    def __post_init__(self) -> None:
        if not 0 <= self.recall <= 100:
            raise SpecError(f"--budget {self.recall:g}: recall is a percentage from 0 to 100")
        if not 0 <= self.landmark_error < math.inf:
            raise SpecError(f"--landmark-budget {self.landmark_error:g}: give a percentage of the face size from 0 on")

    def __str__(self) -> str:
        return f"recall >= {self.recall:g} %, landmark error <= {self.landmark_error:g} %"


@dataclass(frozen=True)
class SensitivityOptions:
    """What to measure.

    Attributes:
        weights: Name or file for `trainer.load_model`.
        calibration: Images to calibrate on, the very ones of a build with the same options.
        held_out: Other images of the same source, at most, to measure on.
        size_hw: Network size.
    """

    weights: str
    calibration: CalibrationOptions
    held_out: int = 96
    size_hw: tuple[int, int] = (640, 640)

    def __post_init__(self) -> None:
        check_size(self.size_hw)
        if not MIN_IMAGES <= self.held_out <= MAX_IMAGES:
            raise SpecError(f"--held-out {self.held_out}: give a number from {MIN_IMAGES} to {MAX_IMAGES}")


@dataclass(frozen=True)
class Agreement:
    """How far faces over a score of 0.5 are those of FP32. A face is found again if an own box overlaps it by half.

    Attributes:
        recall: Percent of the faces of FP32 that are found again.
        precision: Percent of the faces found that FP32 has, too.
        mean_iou: Of the faces found again; 0 if there are none.
        landmark_error: Their mean distance of landmarks in percent of the face size, which is the root of the area of
            its box; 100 if there are none.
    """

    recall: float
    precision: float
    mean_iou: float
    landmark_error: float

    def holds(self, budget: Budget) -> bool:
        """Whether this is within a budget."""
        return self.recall >= budget.recall and self.landmark_error <= budget.landmark_error


@dataclass(frozen=True)
class Layer:
    """A convolution that alone computes in INT8.

    Attributes:
        name: Of the node.
        cost: RMS error of the head outputs (logits, box and landmark deltas) at priors that see a face.
        mac_share: Its share of the multiply-accumulates of all convolutions.
    """

    name: str
    cost: float
    mac_share: float

    @property
    def priority(self) -> float:
        """Squared error that its staying in float saves, per multiply-accumulate."""
        return self.cost**2 / self.mac_share


@dataclass(frozen=True)
class Step:
    """A graph on the way from INT8 to float.

    Attributes:
        float_layers: Names of the convolutions in float, for an `Int8Recipe`.
        int8_share: Share of the multiply-accumulates of convolutions in INT8.
        agreement: With FP32 on the held-out images.
    """

    float_layers: tuple[str, ...]
    int8_share: float
    agreement: Agreement


@dataclass(frozen=True)
class Sensitivity:
    """What was measured.

    Attributes:
        backbone: Of the model.
        weights_sha256: Of the model.
        size_hw: Network size.
        layers: Every convolution, the most costly first.
        steps: From everything in INT8 to everything in float, by falling share of INT8.
        default: The graph of the default recipe.
        faces: Faces of FP32 on the held-out images.
        calibration_images: Names of the images calibrated on.
        held_out_images: Names of the images measured on.
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

        It was chosen on the held-out images: what it loses on other images is for `export.verify` to say.

        Raises:
            ModelFileError: None does that can be called INT8.
        """
        budget = budget or Budget()
        for step in self.steps:
            if step.int8_share >= MIN_INT8_SHARE and step.agreement.holds(budget):
                return step
        raise ModelFileError(
            f"no graph with at least {100 * MIN_INT8_SHARE:.0f} % of its multiply-accumulates in INT8 holds {budget}: "
            "use --fp16, or a larger budget"
        )

    def recipe(self, budget: Budget | None = None) -> Int8Recipe:
        """Return the recipe of `step`.

        Raises:
            ModelFileError: There is none.
        """
        return Int8Recipe(float_depthwise=False, float_layers=self.step(budget).float_layers)

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers[:BARS])
        lines = [f"{'alone in INT8':{width}}  RMS error  % of MACs"]
        lines += [
            f"{layer.name:{width}}  {layer.cost:9.4f}  {100 * layer.mac_share:9.2f}" for layer in self.layers[:BARS]
        ]
        if len(self.layers) > BARS:
            lines.append(f"and {len(self.layers) - BARS} convolutions that cost less")
        lines += ["", "in float  % of MACs in INT8  recall %  precision %  mean IoU  landmark error, % of face"]
        rows = [(str(len(step.float_layers)), step) for step in self.steps] + [("default", self.default)]
        for name, step in rows:
            found = step.agreement
            lines.append(
                f"{name:>8}  {100 * step.int8_share:17.1f}  {found.recall:8.2f}  {found.precision:11.2f}  "
                f"{found.mean_iou:8.3f}  {found.landmark_error:25.2f}"
            )
        lines.append(
            f"{self.faces} faces of FP32 on {len(self.held_out_images)} held-out images, calibrated on "
            f"{len(self.calibration_images)} others; 'default' is the recipe of --int8"
        )
        lines.append(f"one face is {100 / self.faces:.2f} % of recall: --held-out makes it finer")
        return "\n".join(lines)


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
    from export.parity import rows_from_maps
    from export.portable import build_heads
    from export.quantize import conv_macs, mac_shares, to_int8
    from trainer.checkpoint import load_model

    library()  # without a compiler this ends here, not after minutes
    model = load_model(options.weights)
    # the score threshold is that of the comparison: fewer candidates to decode, and the same faces over it
    spec = dataclasses.replace(
        model.spec, decode=dataclasses.replace(model.spec.decode, score_threshold=DEFAULT_SCORE_THRESHOLD)
    )
    graph = build_heads(model, options.size_hw)
    calibration = calibrate(graph, options.calibration, options.size_hw, model.spec, progress)
    names, pixels = _held_out(options, calibration, model.spec)
    reference = _run(graph, pixels)
    faces = [_faces(heads, options.size_hw, spec) for heads in reference]
    total = sum(len(boxes) for boxes, _ in faces)
    if not total:
        raise DataError(f"--calib {options.calibration.source}: FP32 finds no faces on {len(pixels)} held-out images")

    rows = [rows_from_maps(heads, spec.anchors.per_cell) for heads in reference]
    seen = [values[:, 5] - values[:, 4] > PROXY_LOGIT for values in rows]
    probes = [index for index, mask in enumerate(seen) if mask.any()][:PROXY_IMAGES]
    convolutions = [node.name for node in graph.graph.node if node.op_type == "Conv"]
    all_macs = sum(conv_macs(graph, options.size_hw).values())
    layers = []
    for name in tqdm(convolutions, desc="layers", unit="layer", disable=not progress):
        alone = to_int8(graph, calibration.ranges, _only(name))
        errors = [
            (rows_from_maps(heads, spec.anchors.per_cell) - rows[index])[seen[index]].ravel()
            for index, heads in zip(probes, _run(alone, [pixels[index] for index in probes]), strict=True)
        ]
        cost = float(np.sqrt(np.mean(np.square(np.concatenate(errors), dtype=np.float64))))
        layers.append(Layer(name, cost, conv_macs(alone, options.size_hw)["int8"] / all_macs))

    def measured(recipe: Int8Recipe) -> Step:
        quantised = to_int8(graph, calibration.ranges, recipe)
        found = [_faces(heads, options.size_hw, spec) for heads in _run(quantised, pixels)]
        share = mac_shares(quantised, options.size_hw).get("int8", 0.0)
        return Step(recipe.float_layers, share, agreement(faces, found))

    order = [layer.name for layer in sorted(layers, key=lambda layer: -layer.priority)]
    counts = [0, *np.unique(np.geomspace(1, len(order), MAX_STEPS - 1).round().astype(int)).tolist()]
    steps: list[Step] = []
    for count in tqdm(counts, desc="steps", unit="step", disable=not progress):
        step = measured(Int8Recipe(float_depthwise=False, float_layers=tuple(order[:count])))
        # a name that is part of another takes that one along: its own turn then changes nothing
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


def _held_out(options: SensitivityOptions, calibration: Calibration, spec: ModelSpec) -> tuple[list[str], list[Frame]]:
    """Return names and letterboxed pixels of images of the source that were not calibrated on."""
    from export.calibration import demo_frames, find_calibration_images, letterboxed

    source = options.calibration
    if source.source == DEMO:  # further crops of the same photographs: there are no others
        count = len(calibration.images)
        crops = itertools.islice(demo_frames(count + options.held_out, source.seed), count, None)
        return letterboxed(crops, options.size_hw, spec)
    taken = {*calibration.images, *calibration.skipped}
    left = [path for path in find_calibration_images(source) if str(path) not in taken]
    random.Random(source.seed + 1).shuffle(left)
    names, pixels = letterboxed(itertools.islice(_readable(left), options.held_out), options.size_hw, spec)
    if len(names) < MIN_IMAGES:
        raise DataError(
            f"--calib {source.source}: {len(calibration.images)} images to calibrate on leave {len(names)} to measure "
            f"on, at least {MIN_IMAGES} are needed: add images, or give a smaller --calib-images"
        )
    return names, pixels


def _readable(paths: Iterable[Path]) -> Iterator[tuple[str, Frame]]:
    for path in paths:
        with suppress(ImageError):
            yield str(path), read_image(path)


def _run(graph: onnx.ModelProto, pixels: Sequence[Frame]) -> list[Heads]:
    session = open_session(graph.SerializeToString(), "the graph", why="export.sensitivity")
    return [session.run(list(HEAD_NAMES), {"images": image[None]}) for image in pixels]


Faces = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Boxes (N, 4) and landmarks (N, 5, 2) of one image, in pixels."""


def _faces(heads: Heads, size_hw: tuple[int, int], spec: ModelSpec) -> Faces:
    found = decode_nms(heads, size_hw, spec)
    if found["num_candidates"][0] < 0:
        raise ModelFileError("the network gives numbers that are not finite on a held-out image")
    count = int(found["num_detections"][0])
    return found["boxes"][0, :count], found["landmarks"][0, :count]


def agreement(reference: Sequence[Faces], found: Sequence[Faces]) -> Agreement:
    """Return how far the faces of images are those of a reference; each is matched once, the best overlap first."""
    overlaps: list[float] = []
    errors: list[float] = []
    for (boxes, points), (own_boxes, own_points) in zip(reference, found, strict=True):
        matches = match_faces(boxes, own_boxes)
        same = matches.reference
        overlaps += matches.iou.tolist()
        errors += landmark_errors(boxes[same], points[same], own_points[matches.candidate]).tolist()
    total, own = (sum(len(boxes) for boxes, _ in faces) for faces in (reference, found))
    return Agreement(
        recall=100 * len(overlaps) / total if total else 100.0,
        precision=100 * len(overlaps) / own if own else 100.0,
        mean_iou=float(np.mean(overlaps)) if overlaps else 0.0,
        landmark_error=float(np.mean(errors)) if errors else 100.0,
    )


def plot(result: Sensitivity, budget: Budget, path: Path) -> None:
    """Draw disagreement against the share of INT8, and the most sensitive layers.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    figure_module = require("matplotlib.figure", "train", "--plot")
    backend = require("matplotlib.backends.backend_agg", "train", "--plot")
    figure = figure_module.Figure(figsize=(12, 5), layout="constrained")
    backend.FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    shares = [100 * step.int8_share for step in result.steps]
    lines = (
        ("faces lost, %", "#c8373a", lambda found: 100 - found.recall, 100 - budget.recall),
        ("landmark error, % of face size", "#2a6f9d", lambda found: found.landmark_error, budget.landmark_error),
    )
    for label, colour, value, limit in lines:
        left.plot(shares, [value(step.agreement) for step in result.steps], "o-", ms=4, color=colour, label=label)
        left.plot(100 * result.default.int8_share, value(result.default.agreement), "*", ms=13, color=colour)
        left.axhline(limit, color=colour, ls="--", lw=1)
    try:
        chosen = result.step(budget)
        share = 100 * chosen.int8_share
        left.axvline(share, color="#2a9d4b", lw=1, label=f"{share:.1f} % INT8 holds the budget (dashed)")
    except ModelFileError:
        pass  # nothing to mark
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
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _short(name: str) -> str:
    """Return a node's name without what every name has: /body/stage1/stage1.1/stage1.1.0/Conv -> stage1.1.0."""
    parts = [part for part in name.split("/") if part]
    kept = parts[:-1] if len(parts) > 1 and parts[-1] == "Conv" else parts
    return kept[-1] if kept[:1] == ["body"] and "." in kept[-1] else "/".join(kept[:1] + kept[1:][-1:])


@dataclass(frozen=True)
class OutputFiles:
    """Files to write: all that was measured, a plot, and the recipe that holds the budget."""

    json: Path | None = None
    plot: Path | None = None
    recipe: Path | None = None


def parse_arguments(argv: Sequence[str] | None) -> tuple[SensitivityOptions, Budget, OutputFiles]:
    """Return what to measure, the budget and the files of a command line."""
    parser = ArgumentParser(
        prog="python -m export.sensitivity",
        description="Measure which layers cost accuracy in INT8, against FP32 on images that were not calibrated on, "
        "and find the recipe with the largest share of INT8 that holds a budget; exit code 1 if none does.",
    )
    budget = Budget()
    parser.add_argument(
        "--weights", default=DEFAULT_WEIGHTS, help="checkpoint (.pth), or the name of published weights"
    )
    names = ", ".join([*WIDERFACE, DEMO])
    parser.add_argument("--calib", required=True, metavar="NAME|PATH", help=f"{names}, or a folder of images")
    parser.add_argument("--data", type=Path, help="WIDER FACE folder (default: $WIDERFACE_ROOT or data/widerface)")
    images = CalibrationOptions(DEMO).images
    parser.add_argument("--calib-images", type=int, default=images, metavar="N", help="images to calibrate on, at most")
    parser.add_argument("--held-out", type=int, default=96, metavar="N", help="other images to measure on, at most")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the choice of images")
    parser.add_argument("--size", default="640x640", help="HEIGHTxWIDTH, multiples of 32")
    parser.add_argument(
        "--budget",
        type=float,
        default=budget.recall,
        metavar="RECALL",
        help="percent of the faces of FP32 that must be found again",
    )
    parser.add_argument(
        "--landmark-budget",
        type=float,
        default=budget.landmark_error,
        metavar="PERCENT",
        help="mean landmark error at most, of the face size",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw it ({', '.join(PLOT_SUFFIXES)})")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="write what holds the budget, for export.to_trt --int8-recipe FILE"
    )
    args = parser.parse_args(argv)
    options = SensitivityOptions(
        weights=args.weights,
        calibration=CalibrationOptions(args.calib, args.data, args.calib_images, args.seed),
        held_out=args.held_out,
        size_hw=parse_size(args.size),
    )
    return options, Budget(args.budget, args.landmark_budget), OutputFiles(args.json, args.plot, args.recipe)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options, budget, files = parse_arguments(argv)
    if files.plot:
        require("matplotlib", "train", "--plot")
        if files.plot.suffix.lower() not in PLOT_SUFFIXES:
            raise OutputError(f"--plot {files.plot}: give a name that ends in {', '.join(PLOT_SUFFIXES)}")
    require("onnx", "export", "export.sensitivity")
    from export.calibration import calibration_files

    read = [options.weights, *calibration_files(options.calibration)]
    check_outputs([("--json", files.json), ("--plot", files.plot), ("--recipe", files.recipe)], read)
    start = time.perf_counter()
    result = sensitivity(options, progress=sys.stderr.isatty())
    print(result)
    if files.json:
        write_text(files.json, result.to_json())
    if files.plot:
        plot(result, budget, files.plot)
    chosen, recipe = result.step(budget), result.recipe(budget)
    print(f"{100 * chosen.int8_share:.1f} % of multiply-accumulates in INT8 hold {budget}; in float:")
    print("".join(f"  {name}\n" for name in recipe.float_layers) or "  nothing\n", end="")
    if files.recipe:
        write_text(files.recipe, recipe.to_json())
        print(f"wrote {files.recipe}: python -m export.to_trt {_flags(options.calibration, files.recipe)}")
    print(f"{time.perf_counter() - start:.1f} s")
    return 0


def _flags(calibration: CalibrationOptions, recipe: Path) -> str:
    """Return the options of an export that does what was measured."""
    words = ["--int8", "--calib", calibration.source, "--calib-images", str(calibration.images)]
    words += ["--seed", str(calibration.seed), *(["--data", str(calibration.data)] if calibration.data else [])]
    return shlex.join([*words, "--int8-recipe", str(recipe)])


if __name__ == "__main__":
    sys.exit(run(main))
