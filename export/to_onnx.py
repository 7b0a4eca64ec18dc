"""Export weights to a portable ONNX detector: uint8 frames in, faces out, proven equal to PyTorch.

python -m export.to_onnx --weights mobilenet0.25 --size 640x640 --out retinaface.onnx
python -m export.to_onnx --int8 --calib widerface_val --out int8.onnx
"""

from __future__ import annotations

import dataclasses
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.int8_recipe import load_recipe
from export.options import DEMO, CalibrationOptions, check_calibration
from facespec.cli import ArgumentParser, require, run
from facespec.errors import DataError, OutputError, SpecError
from facespec.files import atomic_path, check_outputs, write_text
from facespec.images import find_images, read_image
from facespec.letterbox import Frame
from facespec.samples import sample_frames
from facespec.spec import DEFAULT_WEIGHTS, DecodeSpec, parse_size

if TYPE_CHECKING:
    from export.calibration import Calibration
    from export.parity import ParityReport

MAX_PARITY_IMAGES = 8
CALIBRATION_HW = (640, 640)
"""Size a graph of dynamic size is calibrated at."""


DECODE_OPTIONS = {
    "--score": "score_threshold",
    "--iou": "iou_threshold",
    "--top-k": "top_k",
    "--max-detections": "max_detections",
}
"""Options of every export, and the fields of `DecodeSpec` they set."""


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        weights: Name or file for `trainer.load_model`.
        out: ONNX file to write.
        size_hw: Fixed network size, or None for any multiple of 32.
        decode: Thresholds and limits built into the graph.
        parity_images: Image file or folder for the parity report; None takes sample photographs of installed packages.
        precision: "fp32", "fp16" or "int8".
        calibration: Images for INT8.
    """

    weights: str
    out: Path
    size_hw: tuple[int, int] | None
    decode: DecodeSpec
    parity_images: Path | None = None
    precision: str = "fp32"
    calibration: CalibrationOptions | None = None

    def __post_init__(self) -> None:
        check_calibration(self.precision, self.calibration)

    @property
    def calibration_list(self) -> Path:
        """The names of the images INT8 was calibrated on, one a line."""
        return Path(f"{self.out}.calibration.txt")


def parity_frames(source: Path | None) -> dict[str, Frame]:
    """Return the images of a parity report by name.

    Raises:
        DataError: None given, and no installed package ships photographs.
    """
    if source is None:
        frames = sample_frames()
        if not frames:
            raise DataError(
                "no photographs to compare the export on: pip install -e '.[export]', or --parity-images DIR"
            )
        return frames
    paths = find_images(source) if source.is_dir() else [source]
    if not paths:
        raise DataError(f"{source}: no images in this folder")
    paths = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, MAX_PARITY_IMAGES).astype(int))]
    root = source if source.is_dir() else None
    return {str(path.relative_to(root)) if root else path.name: read_image(path) for path in paths}


def export_onnx(options: ExportOptions) -> ParityReport:
    """Export, compare with PyTorch on real images, and write the file only if they agree.

    Raises:
        ParityError: The graph differs from PyTorch by more than the tolerances.
        OutputError: The file cannot be written there.
        MissingPackageError: torch, onnx or onnxsim is not installed.
    """
    if options.out.suffix.lower() != ".onnx":
        raise OutputError(f"--out {options.out}: give a name that ends in .onnx")
    names = options.calibration_list if options.calibration else None
    for module in ("torch", "onnx", "onnxsim"):
        require(module, "export", "export.to_onnx")
    from export.calibration import calibration_files

    read = [options.weights, *calibration_files(options.calibration)]
    read += [options.parity_images] if options.parity_images else []
    check_outputs([("--out", options.out), ("--out", names)], read)
    from export.parity import check_parity
    from export.portable import build_heads, build_portable, portable_of
    from export.precision import with_precision
    from trainer.checkpoint import load_model

    frames = parity_frames(options.parity_images)
    model = load_model(options.weights)
    model.spec = dataclasses.replace(model.spec, decode=options.decode)
    used = None
    if options.precision == "fp32":
        graph = build_portable(model, options.size_hw)
    else:
        heads = build_heads(model, options.size_hw)
        size_hw = options.size_hw or CALIBRATION_HW
        heads, used = with_precision(
            heads, options.precision, options.calibration, size_hw, model.spec, sys.stderr.isatty()
        )
        graph = portable_of(heads, model.spec, options.size_hw)
    report = check_parity(graph, model, frames, options.size_hw, options.precision)
    report.require_equal()
    if used:
        report_calibration(used, options.calibration_list)
    else:
        options.calibration_list.unlink(missing_ok=True)  # of what was there before
    with atomic_path(options.out) as temporary:
        temporary.write_bytes(graph.SerializeToString())
    return report


def add_precision_arguments(parser: ArgumentParser) -> None:
    """Add what every export takes about precision."""
    precision = parser.add_mutually_exclusive_group()
    for name, text in (
        ("fp32", "single precision (default)"),
        ("fp16", "half precision; decoding and NMS stay in single"),
        ("int8", "8-bit integers, calibrated on images, the rest in half precision"),
    ):
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=text)
    parser.add_argument(
        "--calib",
        metavar="NAME|PATH",
        help="images to calibrate --int8 on: widerface_val, widerface_train, a folder, or demo (a last resort)",
    )
    calibration = CalibrationOptions("demo")
    parser.add_argument("--calib-images", type=int, default=calibration.images, help="how many of them at most")
    parser.add_argument("--seed", type=int, default=calibration.seed, help="of their choice")
    parser.add_argument("--data", type=Path, help="WIDER FACE folder (default: $WIDERFACE_ROOT, or data/widerface)")
    parser.add_argument(
        "--int8-recipe",
        type=Path,
        metavar="FILE",
        help="which layers --int8 leaves in half precision, as export.sensitivity --recipe writes it (default: what "
        "suits the published weights)",
    )


def calibration_options(args: Namespace) -> CalibrationOptions | None:
    """Return what INT8 is calibrated on from parsed arguments; see `add_precision_arguments`."""
    if args.calib is None:
        default = CalibrationOptions(DEMO)
        for option, value, usual in (
            ("--int8-recipe", args.int8_recipe, None),
            ("--data", args.data, None),
            ("--calib-images", args.calib_images, default.images),
            ("--seed", args.seed, default.seed),
        ):
            if value != usual:
                raise SpecError(f"{option} goes with --int8 --calib")
        return None
    if args.int8_recipe:
        load_recipe(args.int8_recipe)  # refused now, not after the calibration
    return CalibrationOptions(args.calib, args.data, args.calib_images, args.seed, args.int8_recipe)


def report_calibration(used: Calibration, path: Path) -> None:
    """Say what was calibrated on, and write the names of the images, one a line."""
    skipped = f", {len(used.skipped)} could not be read" if used.skipped else ""
    cached = " (as before, from the cache)" if used.cached else ""
    print(f"calibrated on {len(used.images)} images{skipped}{cached}; their names are in {path}")
    if used.options.source == DEMO:
        print("note: crops of a few photographs are a last resort: calibrate on images like those to come")
    elif used.with_faces < len(used.images) / 4:
        print(f"note: the model finds faces on {used.with_faces} of them only: calibrate on images like those to come")
    write_text(path, "\n".join(used.images) + "\n")


def add_decode_arguments(parser: ArgumentParser) -> None:
    """Add what every export takes: thresholds and limits, and images to compare on."""
    default = DecodeSpec()
    texts = {
        "--score": "floor: lower scores are never seen",
        "--iou": "NMS drops boxes that overlap more",
        "--top-k": "candidates that enter NMS",
        "--max-detections": "faces per image at most",
    }
    for option, name in DECODE_OPTIONS.items():
        value = getattr(default, name)
        parser.add_argument(option, dest=name, type=type(value), default=value, help=texts[option])
    parser.add_argument(
        "--parity-images",
        type=Path,
        help=f"image, or folder of which {MAX_PARITY_IMAGES} are taken, to compare on (default: sample photographs "
        "that packages ship)",
    )


def decode_spec(args: Namespace) -> DecodeSpec:
    """Return the thresholds and limits of parsed arguments; see `add_decode_arguments`."""
    return DecodeSpec(**{name: getattr(args, name) for name in DECODE_OPTIONS.values()})


def parse_arguments(argv: Sequence[str] | None) -> ExportOptions:
    """Return the options of a command line."""
    parser = ArgumentParser(
        prog="python -m export.to_onnx",
        description="Export RetinaFace weights to one ONNX file that takes uint8 frames and gives faces, "
        "and compare it with PyTorch on real images. The file is written only if they agree.",
    )
    parser.add_argument(
        "--weights", default=DEFAULT_WEIGHTS, help="checkpoint (.pth), or the name of published weights"
    )
    parser.add_argument(
        "--size", default="640x640", help="HEIGHTxWIDTH, multiples of 32; or 'dynamic' for any such size"
    )
    parser.add_argument("--out", type=Path, default=Path("retinaface.onnx"), help="file to write")
    add_precision_arguments(parser)
    add_decode_arguments(parser)
    args = parser.parse_args(argv)
    return ExportOptions(
        weights=args.weights,
        out=args.out,
        size_hw=None if args.size == "dynamic" else parse_size(args.size),
        decode=decode_spec(args),
        precision=args.precision or "fp32",
        calibration=calibration_options(args),
        parity_images=args.parity_images,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    from export.inspect import inspect_onnx

    options = parse_arguments(argv)
    start = time.perf_counter()
    report = export_onnx(options)
    print(report)
    size = "x".join(map(str, options.size_hw)) if options.size_hw else "dynamic"
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in inspect_onnx(options.out).precision.items())
    print(
        f"wrote {options.out}: {report.spec.backbone}, {size}, convolutions {shares}, "
        f"{options.out.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
