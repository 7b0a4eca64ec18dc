"""What all exports are told: precision, calibration, thresholds and limits, images to compare on.

Reading a command line needs none of the packages that exporting does.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from facespec.cli import ArgumentParser
from facespec.codec import build, parse_json
from facespec.errors import DataError, SpecError
from facespec.files import widerface_root
from facespec.images import find_images, read_image
from facespec.letterbox import Frame
from facespec.samples import sample_frames
from facespec.spec import CHECKPOINT_SUFFIXES, DEFAULT_WEIGHTS, DecodeSpec

if TYPE_CHECKING:
    import onnx

WIDERFACE = {"widerface_val": "val", "widerface_train": "train"}
"""Sets of WIDER FACE that have a name, and their folders."""

DEMO = "demo"
PRECISIONS = ("fp32", "fp16", "int8")
MIN_IMAGES = 8
MAX_IMAGES = 2048
"""They are held in memory, and a hundred do as well as a thousand."""

MIN_INT8_SHARE = 0.5
"""Share of the convolutions' multiply-accumulates below which a graph is not called INT8."""

MAX_RECIPE_BYTES = 1 << 20

MAX_PARITY_IMAGES = 8

CALIBRATION_OPTIONS = {
    "--calib": "source",
    "--images": "images",
    "--seed": "seed",
    "--data": "data",
    "--int8-recipe": "recipe",
}
"""Options of every export, and the fields of `CalibrationOptions` they set."""

DECODE_OPTIONS = {
    "--score": ("score_threshold", "floor: lower scores are never seen"),
    "--iou": ("iou_threshold", "NMS drops boxes that overlap more"),
    "--top-k": ("top_k", "candidates that enter NMS"),
    "--max-detections": ("max_detections", "faces per image at most"),
}
"""Options of every export, the fields of `DecodeSpec` they set, and what --help says of them."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate on, and what to spare.

    Attributes:
        source: Key of `WIDERFACE`, "demo" (sample photographs that packages ship, cropped and mirrored: a last resort),
            or a folder of images.
        data: WIDER FACE folder; None looks at $WIDERFACE_ROOT, then at data/widerface.
        images: Images used at most.
        seed: Of the choice of images.
        recipe: File of an `export.options.Int8Recipe`; None for its defaults.
    """

    source: str
    data: Path | None = None
    images: int = 128
    seed: int = 0
    recipe: Path | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise SpecError(f"--calib: give {', '.join([*WIDERFACE, DEMO])}, or a folder of images")
        if self.seed < 0:
            raise SpecError(f"--seed {self.seed}: give a number from 0 on")
        if not MIN_IMAGES <= self.images <= MAX_IMAGES:
            raise SpecError(f"--images {self.images}: give a number from {MIN_IMAGES} to {MAX_IMAGES}")

    def words(self) -> list[str]:
        """Return the options of a command line that give this."""
        values = {option: getattr(self, name) for option, name in CALIBRATION_OPTIONS.items()}
        return [word for option, value in values.items() if value is not None for word in (option, str(value))]


def check_calibration(precision: str, calibration: CalibrationOptions | None, learned: bool = False) -> None:
    """Raise SpecError if there is no such precision, INT8 has no images to calibrate on, or another precision has.

    Weights that bring the steps of INT8 with them, as `export.train_int8` has `learned` them, need none.
    """
    if precision not in PRECISIONS:
        raise SpecError(f"no such precision: {precision}")
    if precision == "int8" and calibration is None and not learned:
        raise SpecError("--int8 needs images to calibrate on: --calib widerface_val, or --calib FOLDER")
    if precision != "int8" and calibration is not None:
        raise SpecError(f"--calib is for --int8, not for --{precision}")


def find_calibration_images(options: CalibrationOptions, *, tell: bool = False) -> list[Path]:
    """Return every image of a calibration source, sorted; `tell` as for `find_images`.

    Raises:
        DataError: The set or the folder is not there, or has no images.
    """
    part = WIDERFACE.get(options.source)
    if part is None:
        folder = Path(options.source)
        if not folder.is_dir():
            names = ", ".join([*WIDERFACE, DEMO])
            raise DataError(f"--calib {options.source}: neither a folder of images nor one of {names}")
    else:
        root = options.data or widerface_root()
        # the second is what its archives unpack to
        found = [root / name / "images" for name in (part, f"WIDER_{part}") if (root / name / "images").is_dir()]
        if not found:
            raise DataError(
                f"--calib {options.source}: no {part}/images in {root}: unpack WIDER FACE there, name its folder "
                "with --data or WIDERFACE_ROOT, or give --calib a folder of your own images"
            )
        folder = found[0]
    images = find_images(folder, tell=tell)
    if not images:
        raise DataError(f"--calib {options.source}: there are no images in {folder}")
    return images


def calibration_files(options: CalibrationOptions | None) -> list[str | Path]:
    """Return every file that calibrating reads, or may read: none of them is to be written over.

    Raises:
        DataError: The images are not there.
    """
    if options is None:
        return []
    images: list[Path] = find_calibration_images(options) if options.source != DEMO else []
    return [*images, *([options.recipe] if options.recipe else [])]


@dataclass(frozen=True)
class Export:
    """What every export of a checkpoint is told.

    Attributes:
        weights: Checkpoint, or the name of published weights.
        out: File to write.
        decode: Thresholds and limits built in.
        precision: One of `PRECISIONS`.
        calibration: Images for INT8.
        parity_images: Image file or folder for the parity report; None takes sample photographs of installed packages.
        progress: Whether to draw progress bars.
        float_first: Leave the first convolution, of three channels, in float where the others compute in INT8.
    """

    weights: str
    out: Path
    decode: DecodeSpec = field(default_factory=DecodeSpec, kw_only=True)
    precision: str = field(default="fp32", kw_only=True)
    calibration: CalibrationOptions | None = field(default=None, kw_only=True)
    parity_images: Path | None = field(default=None, kw_only=True)
    progress: bool = field(default=False, kw_only=True)
    float_first: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        # whether a checkpoint brings the steps of INT8 shows when it is read
        check_calibration(self.precision, self.calibration, Path(self.weights).suffix in CHECKPOINT_SUFFIXES)

    @property
    def calibration_list(self) -> Path:
        """The names of the images INT8 was calibrated on, one a line."""
        return Path(f"{self.out}.calibration.txt")


@dataclass(frozen=True)
class Int8Recipe:
    """How a graph becomes INT8: symmetric, weights per channel, Q/DQ on the inputs of convolutions, biases in float.

    The defaults hold the accuracy budgets of `export.verify` for the published mobilenet0.25, with 88 % of the
    multiply-accumulates in INT8; `export.sensitivity` finds others.

    Attributes:
        equalize: Even out the ranges of channels between convolutions beforehand; exact in float.
        float_depthwise: Leave depthwise convolutions in float: they are sensitive, and have few multiply-accumulates.
        float_layers: Parts of the names of others that stay in float: the earliest pointwise ones, whose few channels
            have the widest ranges, and the heads.
    """

    equalize: bool = True
    float_depthwise: bool = True
    float_layers: tuple[str, ...] = ("/stage1.1.3/", "/stage1.2.3/", "/stage1.3.3/", "/stage1.4.3/", "/heads.")

    def __post_init__(self) -> None:
        if not all(self.float_layers):
            raise SpecError("float_layers is a list of parts of names; one is empty")

    def keeps_float(self, node: onnx.NodeProto) -> bool:
        """Whether a convolution stays in float."""
        return (self.float_depthwise and is_depthwise(node)) or any(part in node.name for part in self.float_layers)

    def to_json(self) -> str:
        """Return the form of a recipe file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def is_depthwise(node: onnx.NodeProto) -> bool:
    """Whether a convolution has groups."""
    return any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)


def load_recipe(path: Path) -> Int8Recipe:
    """Return the recipe of a file: JSON with any of the fields of `Int8Recipe`.

    Raises:
        SpecError: Missing, not JSON, or with other fields or values.
    """
    try:
        with path.open("rb") as file:
            return build(Int8Recipe, parse_json(file.read(MAX_RECIPE_BYTES), "recipe"), by_hand=True)
    except OSError as error:
        raise SpecError(f"{path}: the recipe cannot be read ({error.strerror})") from None
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def add_calibration_arguments(parser: ArgumentParser, required: bool = False) -> None:
    """Add what tells the images that INT8 is calibrated on, by the names of the fields of `CalibrationOptions`."""
    names = ", ".join(WIDERFACE)
    parser.add_argument(
        "--calib",
        dest="source",
        required=required,
        metavar="NAME|PATH",
        help=f"images to calibrate INT8 on: {names}, a folder, or {DEMO} (a last resort)",
    )
    default = CalibrationOptions(DEMO)
    parser.add_argument("--images", type=int, default=default.images, help="how many of them at most")
    parser.add_argument("--seed", type=int, default=default.seed, help="of their choice")
    parser.add_argument("--data", type=Path, help="WIDER FACE folder (default: $WIDERFACE_ROOT, or data/widerface)")


def add_export_arguments(parser: ArgumentParser) -> None:
    """Add what every export takes: weights, precision, thresholds and limits, and images to compare on."""
    parser.add_argument(
        "--weights", default=DEFAULT_WEIGHTS, help="checkpoint (.pth), or the name of published weights"
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the network")
    for name, text in (
        ("fp32", "short for --precision fp32: single precision"),
        ("fp16", "short for --precision fp16: half precision; decoding and NMS stay in single"),
        ("int8", "short for --precision int8: 8-bit integers, calibrated on images, the rest in half precision"),
    ):
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=text)
    add_calibration_arguments(parser)
    parser.add_argument(
        "--int8-recipe",
        dest="recipe",
        type=Path,
        metavar="FILE",
        help="which layers --int8 leaves in half precision, as export.sensitivity --out writes it (default: what "
        "suits the published weights)",
    )
    default = DecodeSpec()
    for option, (name, text) in DECODE_OPTIONS.items():
        value = getattr(default, name)
        parser.add_argument(option, dest=name, type=type(value), default=value, help=text)
    parser.add_argument(
        "--parity",
        dest="parity_images",
        type=Path,
        help=f"image, or folder of which {MAX_PARITY_IMAGES} are taken, to compare on (default: sample photographs "
        "that packages ship)",
    )


def export_fields(args: Namespace) -> dict[str, Any]:
    """Return parsed arguments as fields of an `Export`; see `add_export_arguments`.

    Raises:
        SpecError: Impossible values, or options of the calibration without `--calib`.
    """
    given = vars(args)
    decode = DecodeSpec(**{name: given.pop(name) for name, _ in DECODE_OPTIONS.values()})
    chosen = {name: given.pop(name) for name in CALIBRATION_OPTIONS.values()}
    calibration = None
    if chosen["source"] is not None:
        calibration = CalibrationOptions(**chosen)
        if calibration.recipe:
            load_recipe(calibration.recipe)  # refused now, not after the calibration
    else:
        usual = {**asdict(CalibrationOptions(DEMO)), "source": None}
        for option, name in CALIBRATION_OPTIONS.items():
            if chosen[name] != usual[name]:
                raise SpecError(f"{option} goes with --int8 --calib")
    return {**given, "decode": decode, "calibration": calibration, "progress": sys.stderr.isatty()}


def parity_frames(source: Path | None) -> dict[str, Frame]:
    """Return the images of a parity report by name.

    Raises:
        DataError: None given, and no installed package ships photographs.
    """
    if source is None:
        frames = sample_frames()
        if not frames:
            raise DataError("no photographs to compare the export on: pip install -e '.[export]', or --parity DIR")
        return frames
    paths = find_images(source, tell=True) if source.is_dir() else [source]
    if not paths:
        raise DataError(f"{source}: no images in this folder")
    paths = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, MAX_PARITY_IMAGES).astype(int))]
    root = source if source.is_dir() else None
    return {str(path.relative_to(root)) if root else path.name: read_image(path) for path in paths}
