"""Augmentation: square crops, flips and colours, as trained on WIDER FACE; an image and its faces in, the same out.

After the original (biubug6/Pytorch_Retinaface, data_augment.py), with two differences that are no settings: landmarks
that leave the crop become unknown instead of sticking to its edge, and colours change after scaling where that is less
work, which also leaves the padding at the mean colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from facespec.errors import SpecError
from facespec.letterbox import Frame
from facespec.opencv import cv2
from facespec.spec import PreprocessSpec
from trainer.data.dataset import Dataset, Faces

MIRRORED = [1, 0, 2, 4, 3]
"""Which landmark each one becomes in the mirror: left and right are those of the image."""

INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}
"""Ways to scale an image."""

_TRIES_AT_ONCE = 25  # crops tested in one go: most images take one of the first


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(f"augmentation: {message}")


@dataclass(frozen=True)
class AugmentSettings:
    """How images are varied.

    The crops of the original reach up to the short side of the image, which enlarges faces: on WIDER FACE at 640 pixels
    23 % of them end up below 16 pixels, where 45 % are in the images themselves. Larger squares, padded with the mean
    colour, were introduced for that by SCRFD (arXiv 2105.04714), up to twice the short side: then it is 60 %. The
    defaults stop at 1.4: 46 %, with the other sizes as in the images too, so that training sees faces as a detector
    that is run at the images' own size does.

    Attributes:
        crop_scales: Sides of the square crops, in short sides of the image; one is drawn.
        crop_tries: Crops drawn until one holds a whole face. If none does, the whole image is padded to a square.
        flip: Probability of a mirror image.
        brightness: Most that is added or taken away, each with a probability of a half as all changes of colour.
        contrast: Range of the factor.
        saturation: Range of the factor.
        hue: Most that it is turned, in steps of 2 degrees.
        interpolations: Of `INTERPOLATIONS`; one is drawn.
        pad_bgr: Colour of the padding.
    """

    crop_scales: tuple[float, ...] = (0.3, 0.45, 0.6, 0.8, 1.0, 1.2, 1.4)
    crop_tries: int = 250
    flip: float = 0.5
    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18
    interpolations: tuple[str, ...] = tuple(INTERPOLATIONS)
    pad_bgr: tuple[int, int, int] = PreprocessSpec().mean_bgr

    def __post_init__(self) -> None:
        _require(
            len(self.crop_scales) > 0 and all(0 < scale <= 8 for scale in self.crop_scales),
            f"crop_scales must lie above 0 and up to 8, got {self.crop_scales}",
        )
        _require(1 <= self.crop_tries <= 10_000, f"crop_tries must be in 1..10000, got {self.crop_tries}")
        _require(0 <= self.flip <= 1, f"flip must be a probability, got {self.flip}")
        _require(0 <= self.brightness <= 255, f"brightness must be in 0..255, got {self.brightness}")
        for name in ("contrast", "saturation"):
            bounds = getattr(self, name)
            _require(
                len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= 10,
                f"{name} must be two ascending factors in 0..10, got {bounds}",
            )
        _require(0 <= self.hue <= 90, f"hue must be in 0..90, got {self.hue}")
        _require(
            len(self.interpolations) > 0 and set(self.interpolations) <= INTERPOLATIONS.keys(),
            f"interpolations must be among {', '.join(INTERPOLATIONS)}, got {self.interpolations}",
        )
        PreprocessSpec(self.pad_bgr)

    @classmethod
    def original(cls) -> AugmentSettings:
        """Return the settings that the published weights were trained with."""
        return cls(crop_scales=(0.3, 0.45, 0.6, 0.8, 1.0))


class Crop(NamedTuple):
    """A square of an image, in its pixels; it may reach out of it."""

    left: int
    top: int
    side: int


def augment(
    image: Frame, faces: Faces, size: int, rng: np.random.Generator, settings: AugmentSettings
) -> tuple[Frame, Faces]:
    """Return a random view of an image, uint8 (size, size, 3) BGR, and the faces whose centre lies in it.

    Faces are kept however small: the matching leaves out those that no prior fits. The same state of `rng` gives the
    same bits.
    """
    height, width = image.shape[:2]
    crop = choose_crop((height, width), faces, rng, settings)
    view, faces = apply_crop(image, faces, crop, size, rng, settings)
    if rng.random() < settings.flip:
        view, faces = mirror(view, faces)
    return view, faces


def choose_crop(size_hw: tuple[int, int], faces: Faces, rng: np.random.Generator, settings: AugmentSettings) -> Crop:
    """Return a random square that holds at least one whole face, or any random square if there are no faces.

    Where none of `crop_tries` squares holds a face, the whole image is returned, with padding to the right or below.
    """
    height, width = size_hw
    scales = np.array(settings.crop_scales)
    for start in range(0, settings.crop_tries, _TRIES_AT_ONCE):
        count = min(_TRIES_AT_ONCE, settings.crop_tries - start)
        sides = np.maximum((rng.choice(scales, count) * min(size_hw)).astype(np.int64), 1)
        room = np.stack([width - sides, height - sides], axis=1)  # negative: the crop is larger than the image
        corners = rng.integers(np.minimum(room, 0), np.maximum(room, 0), endpoint=True)
        if len(faces):
            low, high = corners[:, None], (corners + sides[:, None])[:, None]
            whole = ((faces.boxes[:, :2] >= low) & (faces.boxes[:, 2:] <= high)).all(axis=2).any(axis=1)
        else:
            whole = np.ones(count, bool)
        if whole.any():
            best = int(whole.argmax())
            return Crop(int(corners[best, 0]), int(corners[best, 1]), int(sides[best]))
    return Crop(0, 0, max(size_hw))


def apply_crop(
    image: Frame, faces: Faces, crop: Crop, size: int, rng: np.random.Generator, settings: AugmentSettings
) -> tuple[Frame, Faces]:
    """Return a square of the image in random colours, scaled to `size` with padding, and the faces centred in it."""
    height, width = image.shape[:2]
    corner = np.array([crop.left, crop.top])
    low, high = np.maximum(corner, 0), np.minimum(corner + crop.side, [width, height])
    # where the part inside the image goes, in whole pixels; one exact factor per axis keeps boxes true to the rounding
    to_low, to_high = (np.rint((edge - corner) * (size / crop.side)).astype(int) for edge in (low, high))
    to_high = np.maximum(to_high, to_low + 1)
    to_low, to_high = to_low - (to_high > size), np.minimum(to_high, size)
    part = image[low[1] : high[1], low[0] : high[0]]
    scaled_wh = (int(to_high[0] - to_low[0]), int(to_high[1] - to_low[1]))
    interpolation = INTERPOLATIONS[settings.interpolations[rng.integers(len(settings.interpolations))]]
    colours = draw_colours(rng, settings)
    first = part.shape[0] * part.shape[1] < scaled_wh[0] * scaled_wh[1]
    if first:
        part = recolour(part, colours)
    part = np.asarray(cv2.resize(part, scaled_wh, interpolation=interpolation), np.uint8)
    if not first:
        part = recolour(part, colours)
    if scaled_wh != (size, size):
        view = np.full((size, size, 3), settings.pad_bgr, np.uint8)
        view[to_low[1] : to_high[1], to_low[0] : to_high[0]] = part
        part = view
    return part, _move(faces, low, high, to_low, to_high)


def _move(
    faces: Faces, low: NDArray[np.int64], high: NDArray[np.int64], to_low: NDArray[np.int64], to_high: NDArray[np.int64]
) -> Faces:
    """Return the faces centred in a rectangle, in pixels of where it goes; landmarks that lie outside become unknown.

    Corners are (2,) x, y: `low` and `high` of the rectangle in the image, `to_low` and `to_high` of where it goes.
    """
    centres = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2
    faces = faces[((centres > low) & (centres < high)).all(axis=1)]
    known = faces.has_landmarks & ((faces.landmarks >= low) & (faces.landmarks <= high)).all(axis=(1, 2))
    factor = (to_high - to_low) / (high - low)
    corners = (np.clip(faces.boxes.reshape(-1, 2, 2), low, high) - low) * factor + to_low
    points = ((faces.landmarks - low) * factor + to_low) * known[:, None, None]
    return Faces(corners.reshape(-1, 4).astype(np.float32), points.astype(np.float32), known, faces.scores)


def mirror(image: Frame, faces: Faces) -> tuple[Frame, Faces]:
    """Return the mirror image and its faces; what was a left eye is now a right one."""
    width = image.shape[1]
    boxes = faces.boxes.copy()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    points = faces.landmarks[:, MIRRORED].copy()
    points[..., 0] = width - points[..., 0]
    points *= faces.has_landmarks[:, None, None]
    return np.asarray(cv2.flip(image, 1), np.uint8), Faces(boxes, points, faces.has_landmarks, faces.scores)


class Colours(NamedTuple):
    """A change of colours: what is added, two factors, a turn in steps of 2 degrees; whether contrast comes last."""

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: int = 0
    contrast_last: bool = False


def draw_colours(rng: np.random.Generator, settings: AugmentSettings) -> Colours:
    """Return a random change of colours; each part of it is left out half of the time."""
    use = rng.random(5) < 0.5
    hue = int(rng.integers(-settings.hue, settings.hue, endpoint=True))
    brightness = rng.uniform(-settings.brightness, settings.brightness)
    contrast, saturation = rng.uniform(*settings.contrast), rng.uniform(*settings.saturation)
    return Colours(
        brightness if use[0] else 0.0,
        contrast if use[1] else 1.0,
        saturation if use[2] else 1.0,
        hue if use[3] else 0,
        bool(use[4]),
    )


def recolour(image: Frame, colours: Colours) -> Frame:
    """Return an image in other colours. Everything is a table of 256 values, in BGR or in HSV."""
    before = np.clip(np.arange(256) + colours.brightness, 0, 255)
    contrast = np.clip(np.arange(256) * colours.contrast, 0, 255)
    in_hsv = colours.saturation != 1 or colours.hue != 0
    last = colours.contrast_last and in_hsv
    if not last:
        before = np.clip(before * colours.contrast, 0, 255)
    image = _look_up(image, before)
    if in_hsv:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        table = np.empty((1, 256, 3), np.uint8)
        table[0, :, 0] = (np.arange(256) + colours.hue) % 180
        table[0, :, 1] = np.rint(np.clip(np.arange(256) * colours.saturation, 0, 255))
        table[0, :, 2] = np.arange(256)
        image = np.asarray(cv2.cvtColor(cv2.LUT(hsv, table), cv2.COLOR_HSV2BGR), np.uint8)
    return _look_up(image, contrast) if last else image


def _look_up(image: Frame, table: NDArray[np.float64]) -> Frame:
    whole = np.rint(table).astype(np.uint8)
    return image if (whole == np.arange(256)).all() else np.asarray(cv2.LUT(image, whole), np.uint8)


class TrainingSet:
    """Augmented samples of a data set, for a DataLoader with `trainer.data.batches.collate`.

    Item `epoch * len(dataset) + index` is sample `index` as it is shown in `epoch`. Its randomness depends on the seed
    and these two numbers alone, so neither the number of workers nor a resumed run changes what is trained on. A
    sampler yields such items; `len` is the number of samples, that is of items in an epoch. Images are squares of
    `size` pixels.
    """

    def __init__(self, dataset: Dataset, size: int, settings: AugmentSettings, seed: int) -> None:
        self.dataset, self.size, self.settings, self.seed = dataset, size, settings, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> tuple[Frame, Faces]:
        """Return an image, uint8 (size, size, 3) BGR, and its faces; DataError if the file is missing or damaged."""
        epoch, index = divmod(item, len(self.dataset))
        rng = np.random.default_rng((self.seed, epoch, index))
        return augment(*self.dataset.samples[index].load(), self.size, rng, self.settings)
