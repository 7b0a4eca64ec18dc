"""Export weights to a portable ONNX detector: uint8 frames in, faces out, proven equal to PyTorch.

python -m export.to_onnx --weights mobilenet0.25 --size 640x640 --out retinaface.onnx
python -m export.to_onnx --int8 --calib widerface_val --out int8.onnx
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.options import Export, add_export_arguments, calibration_files, export_fields, parity_frames
from facespec.cli import ArgumentParser, argument, require, run
from facespec.errors import OutputError, SpecError
from facespec.files import atomic_path, check_outputs
from facespec.spec import ModelSpec, parse_size
from trt_runtime.gpu.sidecar import Convolutions, precision_shares

if TYPE_CHECKING:
    from export.learned_int8 import Lesson
    from export.parity import ParityReport

CALIBRATION_HW = (640, 640)
"""Size a graph of dynamic size is calibrated at."""


@dataclass(frozen=True)
class ExportOptions(Export):
    """What to export; see `Export` for the other fields.

    Attributes:
        size_hw: Fixed network size, or None for any multiple of 32.
    """

    size_hw: tuple[int, int] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out.suffix.lower() != ".onnx":
            raise OutputError(f"--out {self.out}: give a name that ends in .onnx")


@dataclass(frozen=True)
class ExportedGraph:
    """An ONNX file that was written, and its comparison with PyTorch; `calibration` is as in a `Sidecar`."""

    path: Path
    content: bytes
    spec: ModelSpec
    convolutions: Convolutions
    calibration: dict[str, Any]
    report: ParityReport

    @property
    def shares(self) -> str:
        """What the convolutions compute in, by multiply-accumulates: "88% int8, 12% fp16"."""
        return ", ".join(f"{share:.0%} {kind}" for kind, share in precision_shares(self.convolutions).items())


def check_files(options: Export, outputs: Iterable[tuple[str, Path | None]]) -> None:
    """Refuse, before any work, outputs that cannot be written or are read, and missing packages.

    The outputs are those of `facespec.files.check_outputs`; the list of calibration images is one, too.
    """
    for module in ("torch", "onnx", "onnxsim"):
        require(module, "export", "the export")
    read = [options.weights, *calibration_files(options.calibration)]
    read += [options.parity_images] if options.parity_images else []
    check_outputs([*outputs, ("--out", options.calibration_list if options.calibration else None)], read)


def export_graph(
    options: Export,
    path: Path,
    size_hw: tuple[int, int] | None,
    best_hw: tuple[int, int],
    *,
    plugin: bool = False,
    channels_last: bool = False,
) -> ExportedGraph:
    """Write the graph of a checkpoint if it finds the faces that PyTorch finds, and print the comparison.

    Args:
        options: What both exports are told.
        path: File to write.
        size_hw: Fixed network size, or None for any multiple of 32.
        best_hw: Size that INT8 is calibrated and multiply-accumulates are counted at.
        plugin: Write the plugin form, which is compared at `best_hw`; portable graphs are compared at `size_hw`.
        channels_last: Of the plugin form; see `export.graph.build_plugin_form`.

    Raises:
        ParityError: It differs by more than the tolerances of its precision.
        BuildError: The host kernels, which stand in for the plugin in the comparison, cannot be compiled.
    """
    from export.calibration import report_calibration, with_precision
    from export.graph import build_heads, build_plugin_form, build_portable
    from export.learned_int8 import load_learned
    from export.parity import check_parity
    from export.quantize import convolutions
    from trainer.checkpoint import load_model

    frames = parity_frames(options.parity_images)
    learned = load_learned(options.weights)
    if learned and options.calibration:
        raise SpecError(f"{options.weights} brings its steps of int8, learned with its weights: leave out --calib")
    model = load_model(options.weights)
    spec = model.spec = dataclasses.replace(model.spec, decode=options.decode)
    heads, used = with_precision(
        build_heads(model, size_hw),
        options.precision,
        options.calibration,
        best_hw,
        spec,
        options.progress,
        learned=learned.steps if learned else None,
        float_first=options.float_first,
    )
    graph = build_portable(heads, spec, size_hw)
    if plugin:
        graph = build_plugin_form(heads, spec, size_hw, channels_last)
    report = check_parity(graph, model, frames, best_hw if plugin else size_hw, options.precision)
    print(report, flush=True)
    report.require_equal()
    record: dict[str, Any] = {}
    if used and used.recipe:
        report_calibration(used, options.calibration_list)
        record = {"source": used.options.source, "images": len(used.images), "seed": used.options.seed}
        record["recipe"] = dataclasses.asdict(used.recipe)
    else:
        if learned:
            record = _tell_learned(options, learned.lesson)
        options.calibration_list.unlink(missing_ok=True)  # of what was there before
    content = graph.SerializeToString()
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return ExportedGraph(path, content, spec, convolutions(graph, best_hw), record, report)


def _tell_learned(options: Export, lesson: Lesson) -> dict[str, Any]:
    """Say what becomes of weights that were trained for INT8, and return what a sidecar records of that."""
    if options.precision != "int8":
        print(
            f"note: {options.weights} was trained for INT8, and {options.precision} is not what it was measured in: "
            "take --int8, or for more precision the weights that it was made from"
        )
        return {}
    print(f"INT8 with the steps that {options.weights} brings, learned on {lesson.images} images of {lesson.source}")
    return dataclasses.asdict(lesson)


def export_onnx(options: ExportOptions) -> ExportedGraph:
    """Export, compare with PyTorch on real images, and write the file only if they agree.

    Raises:
        ParityError: The graph differs from PyTorch by more than the tolerances.
        OutputError: The file cannot be written there.
        MissingPackageError: torch, onnx or onnxsim is not installed.
    """
    check_files(options, [("--out", options.out)])
    return export_graph(options, options.out, options.size_hw, options.size_hw or CALIBRATION_HW)


def parse_network_size(text: str) -> tuple[int, int] | None:
    """Return (height, width), or None for "dynamic"; see `facespec.spec.parse_size`."""
    return None if text == "dynamic" else parse_size(text)


def parse_arguments(argv: Sequence[str] | None) -> ExportOptions:
    """Return the options of a command line."""
    parser = ArgumentParser(
        prog="python -m export.to_onnx",
        description="Export RetinaFace weights to one ONNX file that takes uint8 frames and gives faces, "
        "and compare it with PyTorch on real images. The file is written only if they agree.",
    )
    parser.add_argument(
        "--size",
        dest="size_hw",
        type=argument(parse_network_size),
        default="640x640",
        help="HEIGHTxWIDTH, multiples of 32; or 'dynamic' for any such size",
    )
    parser.add_argument("--out", type=Path, default=Path("retinaface.onnx"), help="file to write")
    add_export_arguments(parser)
    return ExportOptions(**export_fields(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(argv)
    start = time.perf_counter()
    graph = export_onnx(options)
    size = "x".join(map(str, options.size_hw)) if options.size_hw else "dynamic"
    print(
        f"wrote {options.out}: {graph.spec.backbone}, {size}, convolutions {graph.shares}, "
        f"{len(graph.content) / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
