"""What INT8 is made from; apart from `export.calibration`, so that a command line is read without its packages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from facespec.errors import SpecError

WIDERFACE = {"widerface_val": "val", "widerface_train": "train"}
"""Sets of WIDER FACE that have a name, and their folders."""

DEMO = "demo"
MIN_IMAGES = 8
MAX_IMAGES = 2048
"""They are held in memory, and a hundred do as well as a thousand."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate on, and what to spare.

    Attributes:
        source: Key of `WIDERFACE`, "demo" (sample photographs that packages ship, cropped and mirrored: a last resort),
            or a folder of images.
        data: WIDER FACE folder; None looks at $WIDERFACE_ROOT, then at data/widerface.
        images: Images used at most.
        seed: Of the choice of images.
        recipe: File of an `export.int8_recipe.Int8Recipe`; None for its defaults.
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
            raise SpecError(f"--calib-images {self.images}: give a number from {MIN_IMAGES} to {MAX_IMAGES}")


def check_calibration(precision: str, calibration: CalibrationOptions | None) -> None:
    """Raise SpecError if INT8 has no images to calibrate on, or another precision has."""
    if precision == "int8" and calibration is None:
        raise SpecError("--int8 needs images to calibrate on: --calib widerface_val, or --calib FOLDER")
    if precision != "int8" and calibration is not None:
        raise SpecError(f"--calib is for --int8, not for --{precision}")
