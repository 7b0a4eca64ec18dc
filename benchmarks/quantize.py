"""INT8 calibrated after training, and learned with the float model as the teacher, by the share of INT8.

    python -m benchmarks.quantize --data WIDERFACE --plot docs/quantize.png

It learns on the train images of WIDER FACE and measures on its validation images, letterboxed to 640x640. Which
convolutions are in INT8 is taken from the steps of benchmarks/results/int8_sensitivity.json, and the default recipe.
The checkpoints lie in --work: those that are there are measured and not learned again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import onnx
from tqdm import tqdm

from benchmarks.environment import benchmark_parser, parse, write_result
from benchmarks.gather import summary
from export.calibration import calibrate, letterboxed, readable
from export.graph import build_heads
from export.learned_int8 import load_learned
from export.options import CalibrationOptions, Int8Recipe, find_calibration_images
from export.quantize import emulate_fp16, mac_shares, to_fp16, to_int8, with_steps
from export.sensitivity import FIGURES, faces_of, head_maps
from export.to_onnx import ExportOptions, export_onnx
from export.train_int8 import DEFAULT_IMAGES, TrainInt8Options, train_int8
from export.verify import VerifyOptions, verify
from facespec.agreement import Agreement, Budget
from facespec.cli import run
from facespec.detections import Detections
from facespec.figures import check_plot, figure_file
from facespec.letterbox import Frame
from facespec.spec import DEFAULT_SCORE_THRESHOLD, DEFAULT_WEIGHTS, ModelSpec
from trainer.checkpoint import load_model

SIZE_HW = (640, 640)
DEFAULT = "default"
FLOATS = (11, 6)
"""Numbers of convolutions in float, of the steps of int8_sensitivity.json."""

WHAT = (
    "the published mobilenet0.25 in INT8, what is not INT8 in FP16 (its rounding emulated, ONNX Runtime): agreement "
    "with FP32 in percent on faces of a score over 0.5 of the WIDER FACE validation images at hand, letterboxed to "
    "640x640; calibrated: as --int8 does; learned: export.train_int8; both on train images; verified: by export.verify"
)


def recipes() -> dict[str, Int8Recipe]:
    """Return the recipes by their names: the default one, and the numbers of convolutions in float."""
    steps = json.loads(Path("benchmarks/results/int8_sensitivity.json").read_text())["steps"]
    layers = {len(step["float_layers"]): tuple(step["float_layers"]) for step in steps}
    others = {str(count): Int8Recipe(float_depthwise=False, float_layers=layers[count]) for count in FLOATS}
    return {DEFAULT: Int8Recipe(), **others}


def found_by(graph: onnx.ModelProto, pixels: list[Frame], spec: ModelSpec) -> list[Detections]:
    """Return the faces that a heads graph finds, the rounding of float16 emulated."""
    maps = head_maps(emulate_fp16(graph), pixels)
    return [faces_of(heads, SIZE_HW, spec) for heads in tqdm(maps, total=len(pixels), leave=False, disable=None)]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw landmark error and lost faces against the share of INT8."""
    budget = Budget()
    with figure_file(path, "train", (12, 4.5)) as figure:
        left, right = figure.subplots(1, 2)
        for axes, label, limit, value in (
            (left, "landmark error, % of face size", budget.landmark_error, lambda row: row["landmark_error"]),
            (right, "faces of FP32 lost, %", 100 - budget.recall, lambda row: 100 - row["recall"]),
        ):
            for method, colour in (("calibrated", "#c8373a"), ("learned", "#2a6f9d")):
                of_it = sorted((row for row in rows if row["method"] == method), key=lambda row: row["int8_share"])
                shares = [100 * row["int8_share"] for row in of_it]
                axes.plot(shares, [value(row) for row in of_it], "o-", ms=4, color=colour, label=method)
            axes.axhline(limit, color="grey", ls="--", lw=1, label="budget of INT8")
            axes.set(xlabel="convolution multiply-accumulates in INT8, %", ylabel=label, ylim=(0, None))
            axes.grid(alpha=0.3)
            axes.legend(loc="upper left")


def main() -> int:
    """Learn, measure, write and draw."""
    parser = benchmark_parser("quantize", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder")
    parser.add_argument("--work", type=Path, default=Path("build/quantize"), help="folder of the checkpoints")
    parser.add_argument("--updates", type=int, default=TrainInt8Options.updates, help="of each")
    parser.add_argument("--verify", nargs="*", default=[DEFAULT, "6"], metavar="NAME", help="recipes for export.verify")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="recipes (default: all)")
    parser.add_argument("--images", type=int, help="validation images at most (default: all)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it")
    args = parse(parser, only=[DEFAULT], updates=2, verify=[], images=8)
    check_plot(args.plot, "train")
    args.work.mkdir(parents=True, exist_ok=True)
    model = load_model(DEFAULT_WEIGHTS)
    decode = dataclasses.replace(model.spec.decode, score_threshold=DEFAULT_SCORE_THRESHOLD)
    spec = dataclasses.replace(model.spec, decode=decode)
    heads = build_heads(model, SIZE_HW)
    paths = find_calibration_images(CalibrationOptions("widerface_val", args.data))[: args.images]
    _, pixels = letterboxed(readable(paths, []), SIZE_HW, spec)
    reference = found_by(heads, pixels, spec)
    ranges = calibrate(heads, CalibrationOptions("widerface_train", args.data), SIZE_HW, model.spec, True).ranges
    rows, verified = [], []
    for name, recipe in recipes().items():
        if args.only is not None and name not in args.only:
            continue
        out = args.work / f"{name}.pth"
        if not out.exists():
            file = args.work / f"{name}.json"
            file.write_text(recipe.to_json())
            learned_on = CalibrationOptions("widerface_train", args.data, DEFAULT_IMAGES, recipe=file)
            options = TrainInt8Options(DEFAULT_WEIGHTS, learned_on, out, updates=args.updates)
            print(train_int8(options, progress=sys.stderr.isatty()), flush=True)
        learned = load_learned(str(out))
        assert learned is not None
        graphs = {"calibrated": to_int8(heads, ranges, recipe)}
        graphs["learned"] = with_steps(build_heads(load_model(out), SIZE_HW), learned.steps)
        for method, graph in graphs.items():
            agreement = Agreement.of(reference, found_by(to_fp16(graph), pixels, spec))
            figures = {figure: round(getattr(agreement, figure), 4) for figure in FIGURES}
            share = round(mac_shares(graph, SIZE_HW)["int8"], 4)
            rows.append({"recipe": name, "method": method, "int8_share": share, **figures, "faces": agreement.faces})
            print(rows[-1], flush=True)
        if name in args.verify:
            exported = args.work / f"{name}.onnx"
            export_onnx(ExportOptions(str(out), exported, None, precision="int8"))
            found = verify(VerifyOptions(DEFAULT_WEIGHTS, str(exported), args.data, protocol="both"))
            print(found, flush=True)
            verified += [{"recipe": name, **row} for row in summary(json.loads(found.to_json()))]
    more = {"updates": args.updates, "images": len(pixels), "verified": verified}
    write_result(args, WHAT, rows, "torch", "onnx", "onnxruntime", "numpy", **more)
    if args.plot:
        plot(rows, args.plot)
        print(f"wrote {args.plot}")
    return 0


if __name__ == "__main__":
    run(main)
