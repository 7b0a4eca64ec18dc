"""Export weights to a portable ONNX detector: uint8 frames in, faces out, proven equal to PyTorch.

python -m export.to_onnx --weights mobilenet0.25 --size 640x640 --out retinaface.onnx
python -m export.to_onnx --int8 --calib widerface_val --out int8.onnx
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.options import (
    CalibrationOptions,
    add_decode_arguments,
    add_precision_arguments,
    calibration_options,
    check_calibration,
    decode_spec,
    parity_frames,
)
from facespec.cli import ArgumentParser, require, run
from facespec.errors import OutputError
from facespec.files import atomic_path, check_outputs
from facespec.spec import DEFAULT_WEIGHTS, DecodeSpec, parse_size

if TYPE_CHECKING:
    from export.parity import ParityReport

CALIBRATION_HW = (640, 640)
"""Size a graph of dynamic size is calibrated at."""


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
    from export.calibration import calibration_files, report_calibration, with_precision

    read = [options.weights, *calibration_files(options.calibration)]
    read += [options.parity_images] if options.parity_images else []
    check_outputs([("--out", options.out), ("--out", names)], read)
    from export.parity import check_parity
    from export.portable import build_heads, build_portable, portable_of
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
        precision=args.precision,
        calibration=calibration_options(args),
        parity_images=args.parity,
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
