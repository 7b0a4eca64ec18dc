"""Settings of a training run: frozen and validated, from recipes, YAML files and flags.

A setting has a dotted name, `optimizer.lr`. What is said later wins: defaults, the recipe, the YAML file, the flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from facespec.cli import DEVICE, require
from facespec.codec import build, short
from facespec.errors import ConfigError, SpecError
from facespec.files import write_text
from facespec.spec import DEFAULT_WEIGHTS, MAX_NETWORK_PIXELS, SIZE_MULTIPLE, AnchorSpec, check_size
from trainer.data import AugmentSettings
from trainer.losses import LossSettings
from trainer.model import BACKBONES

MAX_PRIOR = 4096
"""Longest side of a prior in pixels: that of the largest square a network takes."""

Settings = dict[str, Any]
"""Dotted name -> plain value."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} is {short(value)}: choose from {', '.join(choices)}")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
        source: Name or path for `trainer.data.open_dataset`.
        root: Folder of a named data set; None looks where `open_dataset` says.
        val: Name or path of what is evaluated on; None takes the val split of `source`.
        images: Folder of the images of a label file; None takes the usual places beside it. Images of `val` that are
            not in their usual places are sought there, too.
        category: Of the faces in a COCO file, or several with commas between them; None takes "face".
        skip_damaged: Leave out images that cannot be read, instead of refusing to start; others are shown in their
            place, so that a run that is resumed may leave out more or fewer.
        size: Side of the square network input in pixels.
        batch: Images of a step, over all processes together.
        overfit: Train on the first so many images alone, as they are, and evaluate on them; 0 trains as usual.
    """

    source: str = "widerface"
    root: str | None = None
    val: str | None = None
    images: str | None = None
    category: str | None = None
    skip_damaged: bool = False
    size: int = 640
    batch: int = 16
    overfit: int = 0

    def __post_init__(self) -> None:
        check_size((self.size, self.size))
        _require(self.batch > 0, f"data.batch is {self.batch}: a step needs an image")
        _require(self.overfit >= 0, f"data.overfit is {self.overfit}: a number of images, or 0")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Attributes:
        backbone: Name in `trainer.model.BACKBONES`.
        fpn_channels: Channels of the pyramid; 0 takes those of the published models.
        min_sizes: Sides in pixels of the priors of a cell, for each of the strides 8, 16 and 32. Detectors that are
            trained further get their heads expressed for them, and find the same faces at first.
        pretrained: ImageNet weights of the backbone, or a whole detector; None starts from random weights.
        sync_batch_norm: Batch statistics over all processes; needs CUDA.
        freeze_batch_norm: Keep the running statistics of the pretrained weights, and normalise by them, as is usual
            where batches are small.
    """

    backbone: str = "mobilenet0.25"
    fpn_channels: int = 0
    min_sizes: tuple[tuple[float, ...], ...] = ((16.0, 32.0), (64.0, 128.0), (256.0, 512.0))
    pretrained: str | None = None
    sync_batch_norm: bool = False
    freeze_batch_norm: bool = False

    def __post_init__(self) -> None:
        _one_of("model.backbone", self.backbone, tuple(BACKBONES))
        sizes = self.min_sizes
        _require(
            len(sizes) == 3
            and all(len(level) == 2 and 1 <= level[0] < level[1] <= MAX_PRIOR for level in sizes)
            and all(low <= high for low, high in pairwise(size for level in sizes for size in level)),
            f"model.min_sizes is {[list(level) for level in sizes]}: two ascending sides in 1..{MAX_PRIOR} pixels for "
            "each of three strides, as in [[8, 16], [32, 64], [128, 256]]",
        )

    @property
    def anchors(self) -> AnchorSpec:
        """The priors; whole sides as integers, as everywhere, so that equal specs are equal in writing."""
        sizes = (tuple(int(side) if side == int(side) else side for side in level) for level in self.min_sizes)
        return AnchorSpec(min_sizes=tuple(sizes))


@dataclass(frozen=True)
class TeacherConfig:
    """A detector that is learned from beside the labels; see `trainer.teacher`.

    Attributes:
        weights: Its weights, as for `trainer.load_model`; None trains on the labels alone.
        images: Folder of images without labels, which are trained on by what the teacher finds in them.
        scale: How many times larger than the student it sees images, letterboxed.
        share: Its part in what is to be said of a face that is labelled, or that it alone found in a labelled image.
        least: Lowest score of a face that it alone found.
    """

    weights: str | None = None
    images: str | None = None
    scale: float = 2.0
    share: float = 0.5
    least: float = 0.3

    def __post_init__(self) -> None:
        _require(
            self.weights is not None or self.images is None,
            f"teacher.images is {self.images}: images without labels need teacher.weights, --teacher {DEFAULT_WEIGHTS}",
        )
        _require(0.5 <= self.scale <= 8, f"teacher.scale is {self.scale:g}: it must lie in 0.5..8")
        _require(0 <= self.share <= 1, f"teacher.share is {self.share:g}: it must lie in 0..1")
        _require(0 < self.least < 1, f"teacher.least is {self.least:g}: it must lie between 0 and 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent.

    Attributes:
        lr: Highest learning rate.
        momentum: Of the gradient.
        nesterov: Look ahead by the momentum.
        weight_decay: Pull of the weights towards zero.
        decay_all: Pull biases and the scales of batch normalisation, too.
        clip_norm: Longest gradient; longer ones are shortened to it. 0 leaves all as they are.
    """

    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_all: bool = False
    clip_norm: float = 10.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optimizer.lr is {self.lr}: it must be positive")
        _require(0 <= self.momentum < 1, f"optimizer.momentum is {self.momentum}: it must lie in 0..1")
        _require(self.momentum > 0 or not self.nesterov, "optimizer.nesterov needs optimizer.momentum")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}: it must not be negative")
        _require(self.clip_norm >= 0, f"optimizer.clip_norm is {self.clip_norm}: it must not be negative")


@dataclass(frozen=True)
class ScheduleConfig:
    """Course of the learning rate, step by step.

    Attributes:
        epochs: Passes over the data.
        kind: "cosine" falls to `final` along half a wave, "step" by `gamma` at each milestone.
        warmup_epochs: Length of the linear rise at the start.
        final: Last learning rate of the cosine, as a fraction of the highest.
        milestones: Fractions of the epochs.
        gamma: Factor at a milestone.
    """

    epochs: int = 100
    kind: str = "cosine"
    warmup_epochs: float = 1.0
    final: float = 0.01
    milestones: tuple[float, ...] = (0.7, 0.9)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _require(0 < self.epochs <= 100_000, f"schedule.epochs is {self.epochs}: it must lie in 1..100000")
        _one_of("schedule.kind", self.kind, ("cosine", "step"))
        _require(
            0 <= self.warmup_epochs <= self.epochs,
            f"schedule.warmup_epochs is {self.warmup_epochs:g}: it must lie in 0..{self.epochs}, the epochs",
        )
        _require(0 <= self.final <= 1, f"schedule.final is {self.final}: it must lie in 0..1")
        _require(
            all(0 < value < 1 for value in self.milestones) and list(self.milestones) == sorted(self.milestones),
            f"schedule.milestones is {list(self.milestones)}: ascending fractions of the epochs, between 0 and 1",
        )
        _require(0 < self.gamma <= 1, f"schedule.gamma is {self.gamma}: it must lie in 0..1")


@dataclass(frozen=True)
class EmaConfig:
    """Moving average of the weights: it is what is evaluated and exported.

    Attributes:
        decay: Share of the old average that a step keeps; it rises to this from 0.1. 0 switches averaging off.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, f"ema.decay is {self.decay}: it must lie in 0..1, 1 left out")


@dataclass(frozen=True)
class RunConfig:
    """How and where it runs. All of it may change when a run is resumed.

    Attributes:
        output: Folder of checkpoints and logs.
        device: "cpu", "cuda", "cuda:N" for the GPU of that index, or "auto" for CUDA where there is some.
        workers: Processes that read images, for each training process; 0 reads in the training process.
        checkpoint_every: Steps between checkpoints; there is one after every epoch, too.
        evaluate_every: Epochs between evaluations; the last is always evaluated; 0 evaluates that alone.
        evaluate_size: Side of the square that images are letterboxed to for an evaluation, as where the model will
            run; with 0, images of WIDER FACE have their own size, and others that of `data.size`.
        compile: Run the network through torch.compile.
    """

    output: str = "runs/retinaface"
    device: str = "auto"
    workers: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    checkpoint_every: int = 200
    evaluate_every: int = 1
    evaluate_size: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        _require(
            DEVICE.fullmatch(self.device) is not None,
            f"run.device is {self.device!r}: choose from auto, cpu, cuda, cuda:N",
        )
        _require(self.workers >= 0, f"run.workers is {self.workers}: it must not be negative")
        _require(self.checkpoint_every > 0, f"run.checkpoint_every is {self.checkpoint_every}: it must be positive")
        _require(self.evaluate_every >= 0, f"run.evaluate_every is {self.evaluate_every}: it must not be negative")
        if self.evaluate_size:
            check_size((self.evaluate_size, self.evaluate_size))


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run.

    Attributes:
        recipe: Name in `RECIPES` of what the other settings started from.
        seed: Of the initial weights, the order of the images and their augmentation.
        precision: Of the network: "fp32", "bf16", or "auto" for bf16 where the processor computes in it. The loss is
            always fp32.
    """

    recipe: str = "default"
    seed: int = 0
    precision: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossSettings = field(default_factory=LossSettings)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _one_of("recipe", self.recipe, tuple(RECIPES))
        _one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        _require(self.seed >= 0, f"seed is {self.seed}: it must not be negative")
        if self.teacher.weights is not None:
            scale, side = self.teacher.scale, self.data.size * self.teacher.scale
            _require(
                side % SIZE_MULTIPLE == 0 and side * side <= MAX_NETWORK_PIXELS,
                f"teacher.scale is {scale:g}: times data.size it must be a multiple of {SIZE_MULTIPLE} up to "
                f"{MAX_PRIOR}, not {side:g}",
            )


def settings_table() -> list[tuple[str, str, str]]:
    """Return every setting: its dotted name, its default, and what it is, as the docstrings of the classes say."""
    config, rows = TrainConfig(), []
    for item in dataclasses.fields(config):
        part = getattr(config, item.name)
        parts = [(f"{item.name}.", part)] if dataclasses.is_dataclass(part) else [("", config)]
        for prefix, owner in parts:
            said = dict(re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", owner.__doc__ or "", re.MULTILINE))
            names = [field.name for field in dataclasses.fields(owner)] if prefix else [item.name]
            values = to_settings(owner)
            rows += [(f"{prefix}{n}", str(values[n]), " ".join(said[n].split())) for n in names]
    return rows


def to_settings(config: Any) -> Settings:
    """Return the settings of a config, tuples as lists."""
    return _flatten(_plain(config))


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Settings:
    """Return settings from nested sections."""
    settings: Settings = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        settings |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return settings


def _plain(config: Any) -> dict[str, Any]:
    """Return a config as dicts and lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


RECIPES: dict[str, Settings] = {
    # what the fields above say
    "default": {},
    # Deng et al. (CVPR 2020), as its PyTorch implementations train it
    "original": {
        "precision": "fp32",
        "data.batch": 32,
        "loss.extra_negatives": 0,
        "optimizer.lr": 1e-3,
        "optimizer.nesterov": False,
        "optimizer.decay_all": True,
        "optimizer.clip_norm": 0.0,
        "schedule.kind": "step",
        "schedule.warmup_epochs": 0.0,
        "ema.decay": 0.0,
        **{f"augment.{name}": value for name, value in to_settings(AugmentSettings.original()).items()},
    },
    # to see that it works: two minutes on two cores, without a download
    "try": {
        "data.source": "synthetic",
        "data.size": 128,
        "schedule.epochs": 2,
        "schedule.warmup_epochs": 0.2,
        "ema.decay": 0.9,
        "run.output": "runs/try",
    },
    # with the fourth term of the paper
    "dense": {"loss.pixel_weight": 0.01},
    # a trained detector goes on with other faces
    "finetune": {
        "model.pretrained": DEFAULT_WEIGHTS,
        "model.freeze_batch_norm": True,
        "optimizer.lr": 1e-4,
        "schedule.epochs": 10,
    },
    # frames letterboxed to 640: as many small faces in training as a detector sees there, and priors that fit them
    "deploy640": {
        "augment.crop_scales": (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.0),
        "model.min_sizes": ((10, 20), (40, 80), (160, 320)),
        "loss.box": "diou",
        "teacher.weights": DEFAULT_WEIGHTS,
        "run.evaluate_size": 640,
    },
}

OVERFIT: Settings = {
    "data.batch": 8,
    "optimizer.lr": 0.02,
    "optimizer.weight_decay": 0.0,
    "schedule.epochs": 4,
    "schedule.warmup_epochs": 0.2,
    "ema.decay": 0.0,
    "run.evaluate_every": 0,  # the last epoch only
}
"""What `data.overfit` starts from: a few images are seen often, and nothing holds the weights back."""

MAX_YAML, MAX_SCALAR = 50_000, 1_000
"""Characters of YAML text, and of one value in it: Python takes long for integers of more digits, or refuses them."""

MAY_CHANGE = ("run.", "data.root", "data.val", "data.images", "data.skip_damaged")
"""Settings that a resumed run may have other values of: none changes what is computed of images that can be read."""


def resolve(said: Settings, base: Settings | None = None) -> TrainConfig:
    """Return the config of what was said in a YAML file and by flags.

    Args:
        said: Settings given by the user.
        base: What holds where nothing is said, beneath the recipe: the settings of a run that is resumed.

    Raises:
        ConfigError: A setting is unknown or impossible.
    """
    base = base or {}
    recipe, overfit = said.get("recipe", "default"), said.get("data.overfit", 0)
    _one_of("recipe", recipe, tuple(RECIPES))
    # what a run that is resumed started from is in its settings already
    recipes = RECIPES[recipe] if recipe != base.get("recipe") else {}
    few = OVERFIT if overfit and overfit != base.get("data.overfit") else {}
    return from_settings({**base, **recipes, **few, **said})


def from_settings(settings: Settings) -> TrainConfig:
    """Return the config with these settings, and defaults for the others.

    Raises:
        ConfigError: A setting is unknown, of another type, or impossible.
    """
    known = list(to_settings(TrainConfig()))
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, last = name.rpartition(".")
        if name not in known:
            same_end = [full for full in known if f".{full}".endswith(f".{last}")]
            near = difflib.get_close_matches(name, known, 1) or same_end
            hint = f": did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise ConfigError(f"unknown setting {name!r}{hint}")
        values = nested.setdefault(section, {}) if section else nested
        values[last] = value
    try:
        return build(TrainConfig, nested, by_hand=True)
    except SpecError as error:
        raise ConfigError(str(error)) from None


def changed(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Return the names of the settings that differ and must not when a run is resumed."""
    before, after = to_settings(old), to_settings(new)
    return [name for name in before if before[name] != after[name] and not name.startswith(MAY_CHANGE)]


def read_yaml(path: Path) -> Settings:
    """Return the settings a YAML file gives: sections, or dotted names.

    Raises:
        ConfigError: The file cannot be read or is not a mapping.
        MissingPackageError: PyYAML is not installed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    content = parse_yaml(text, str(path))
    content = {} if content is None else content
    _require(isinstance(content, dict), f"{path}: expected settings by name, found {short(content)}")
    sections = [name for name, value in _plain(TrainConfig()).items() if isinstance(value, dict)]
    try:
        return _flatten({name: value for name, value in content.items() if value is not None or name not in sections})
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read (it contains itself)") from None


def parse_yaml(text: str, where: str) -> Any:
    """Return what YAML text says; plain values alone, no code is run.

    Raises:
        ConfigError: It is no such text; `where` says whose.
        MissingPackageError: PyYAML is not installed.
    """
    yaml = require("yaml", "train", f"reading {where}")
    try:
        if len(text) > MAX_YAML:
            raise ValueError(f"more than {MAX_YAML} characters are no settings")
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # a few lines of them may stand for gigabytes
                raise ValueError(f"*{event.anchor}: write it out, what is repeated by name is not taken")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR:
                raise ValueError(f"a value of more than {MAX_SCALAR} characters")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: cannot be read ({' '.join(str(error).split())[:200]})") from None


def write_yaml(path: Path, config: TrainConfig) -> None:
    """Write all settings, so that `read_yaml` gives the same config back."""
    yaml = require("yaml", "train", f"writing {path}")
    write_text(path, yaml.safe_dump(_plain(config), sort_keys=False))
