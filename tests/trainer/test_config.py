from __future__ import annotations

import copy
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest

from facespec.errors import RetinaFaceError
from facespec.spec import ModelSpec
from trainer.config import (
    OVERFIT,
    RECIPES,
    ConfigError,
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    changed,
    from_settings,
    parse_yaml,
    read_yaml,
    resolve,
    to_settings,
    write_yaml,
)
from trainer.data import AugmentSettings


@pytest.mark.parametrize("recipe", RECIPES)
def test_yaml_gives_the_same_config_back(recipe: str, tmp_path: Path) -> None:
    config = resolve({"recipe": recipe, "model.pretrained": "a.pth", "optimizer.lr": 3e-7, "data.overfit": 3})
    write_yaml(tmp_path / "c.yaml", config)
    assert from_settings(read_yaml(tmp_path / "c.yaml")) == config
    assert from_settings(to_settings(config)) == config


def test_what_is_said_later_wins(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("recipe: original\noptimizer: {momentum: 0.8}\nschedule.epochs: 7\n")
    said = {**read_yaml(tmp_path / "c.yaml"), "schedule.epochs": 9}
    config = resolve(said)
    assert config.optimizer == OptimizerConfig(1e-3, 0.8, False, 5e-4, True, 0.0)
    assert config.schedule == ScheduleConfig(9, "step", 0.0)
    assert config.augment == AugmentSettings.original()
    assert (config.loss.extra_negatives, config.ema.decay) == (0, 0.0)


def test_a_resumed_run_keeps_what_is_not_said() -> None:
    base = resolve({"recipe": "original", "optimizer.lr": 0.5, "run.workers": 7})
    assert resolve({}, to_settings(base)) == base
    again = resolve({"run.workers": 1, "data.root": "elsewhere"}, to_settings(base))
    assert changed(base, again) == []
    assert changed(base, resolve({"recipe": "default", "seed": 4}, to_settings(base))) == ["recipe", "seed"]
    # the recipe that a run started from is said again without taking back what was said beside it
    assert resolve({"recipe": "original"}, to_settings(base)) == base
    before = copy.deepcopy((RECIPES, OVERFIT))
    few = resolve({"recipe": "original", "data.overfit": 3, "schedule.epochs": 9})
    assert resolve({"recipe": "original", "data.overfit": 3}, to_settings(few)) == few
    assert (RECIPES, OVERFIT) == before  # what is shared by all runs stays as it is


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2024-13-45",
        "data: &a {x: *a}",
        "[" * 3000,
        f"seed: {'9' * 5000}",
        f"seed: {10**30}",
        f"schedule: {{epochs: {10**18}}}",
        f"optimizer: {{lr: {10**400}}}",
        "seed: !!python/object/apply:os.system ['true']",
        "recipe: [1]",
        "- 1",
        f"seed: 0x{'f' * 999}",
        f"seed: 0x{'f' * 9999}",
        f"seed: {'59:' * 15_000}1",
        f"loss: {{box_weight: 0x{'f' * 990}}}",
        "x" * 60_000,
        "a: &a [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(30)),
        f"a: &a [{'x, ' * 99}]\nb: &b [{'*a, ' * 99}]\nc: &c [{'*b, ' * 99}]\nseed: [{'*c, ' * 99}]",
    ],
)
def test_hostile_yaml_ends_in_one_short_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        resolve(read_yaml(tmp_path / "c.yaml"))
    assert time.process_time() - start < 5  # what is refused here for its length took minutes
    assert len(str(caught.value)) < 1500


def test_a_value_is_not_repeated_by_name(tmp_path: Path) -> None:
    """885 bytes whose lists hold one another, nine times each, were still read after 25 s."""
    lists = "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9))
    (tmp_path / "c.yaml").write_text(f"a0: &a0 [{', '.join('x' * 9)}]\n{lists}seed: *a9\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: cannot be read \(\*a0: write it out, what is repeated by name"):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"^--set seed: cannot be read \(\*a: write it out"):
        parse_yaml("[&a 1, *a]", "--set seed")


def test_an_empty_section_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data:\nseed: 4\n")
    assert resolve(read_yaml(tmp_path / "c.yaml")) == TrainConfig(seed=4)


def test_overfitting_changes_defaults_that_can_be_said_otherwise() -> None:
    assert resolve({"data.overfit": 5}).optimizer.weight_decay == 0
    assert resolve({"data.overfit": 5, "optimizer.weight_decay": 1.0}).optimizer.weight_decay == 1


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("optimizer:\n  lr: 1e-3\n  clip_norm: 5\n")
    assert resolve(read_yaml(tmp_path / "c.yaml")).optimizer == OptimizerConfig(lr=1e-3, clip_norm=5.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss.box_weigth": 1}, r"unknown setting 'loss\.box_weigth': did you mean loss\.box_weight\?"),
        ({"lr": 1}, r"'lr': did you mean optimizer\.lr\?"),
        ({"optimizer": None}, "unknown setting 'optimizer'"),
        ({"nothing_like_it": 1}, "there are recipe, seed, "),
        ({"optimizer.lr": "fast"}, r"optimizer\.lr is 'fast': expected a number"),
        ({"optimizer.lr": float("nan")}, "expected a finite number"),
        ({"optimizer.lr": True}, "expected a number"),
        ({"schedule.epochs": 2.5}, "expected a whole number"),
        ({"optimizer.nesterov": 1}, "expected true or false"),
        ({"schedule.milestones": 0.5}, "expected a list"),
        ({"augment.pad_bgr": [1, 2]}, "expected 3 values"),
        ({"data.source": 3}, "expected a text"),
        ({"schedule.milestones": [0.9, 0.7]}, "ascending"),
        ({"schedule.epochs": 1, "schedule.warmup_epochs": 2}, r"0\.\.1, the epochs"),
        ({"model.backbone": "vgg"}, "choose from mobilenet0.25"),
        ({"recipe": "best"}, "choose from default, original"),
        ({"data.size": 100}, "not a multiple of 32; try 96"),
        ({"loss.extra_negatives": -1}, "extra_negatives"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, object], words: str) -> None:
    with pytest.raises(RetinaFaceError, match=words):
        resolve(settings)


@pytest.mark.parametrize("text", ["- 1\n", "a: [1\n", "just words\n"])
def test_files_that_hold_no_settings(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml: ") as caught:
        read_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().data.size = 32  # type: ignore[misc]
    assert TrainConfig().data == DataConfig()


DEFAULTS = {
    "recipe": "default", "seed": 0, "precision": "auto",
    "data.source": "widerface", "data.root": None, "data.val": None, "data.images": None,
    "data.category": None, "data.skip_damaged": False, "data.size": 640, "data.batch": 16,
    "data.overfit": 0,
    "augment.crop_scales": [0.3, 0.45, 0.6, 0.8, 1.0, 1.2, 1.4], "augment.crop_tries": 250, "augment.flip": 0.5,
    "augment.brightness": 32.0, "augment.contrast": [0.5, 1.5], "augment.saturation": [0.5, 1.5], "augment.hue": 18,
    "augment.interpolations": ["nearest", "linear", "cubic", "area", "lanczos"], "augment.pad_bgr": [104, 117, 123],
    "model.backbone": "mobilenet0.25", "model.fpn_channels": 0, "model.pretrained": None,
    "model.min_sizes": [[16, 32], [64, 128], [256, 512]],
    "model.sync_batch_norm": False, "model.freeze_batch_norm": False,
    "loss.assign": "match", "loss.box": "smooth_l1",
    "teacher.weights": None, "teacher.images": None, "teacher.scale": 2.0, "teacher.share": 0.5, "teacher.least": 0.3,
    "loss.box_weight": 2.0, "loss.landmark_weight": 1.0, "loss.pixel_weight": 0.0, "loss.negatives_per_positive": 7,
    "loss.extra_negatives": 200, "loss.positive_iou": 0.35, "loss.ignore_iou": 0.2,
    "optimizer.lr": 0.01, "optimizer.momentum": 0.9, "optimizer.nesterov": True, "optimizer.weight_decay": 5e-4,
    "optimizer.decay_all": False, "optimizer.clip_norm": 10.0,
    "schedule.epochs": 100, "schedule.kind": "cosine", "schedule.warmup_epochs": 1.0, "schedule.final": 0.01,
    "schedule.milestones": [0.7, 0.9], "schedule.gamma": 0.1,
    "ema.decay": 0.999,
    "run.output": "runs/retinaface", "run.device": "auto", "run.workers": min(8, os.cpu_count() or 1),
    "run.checkpoint_every": 200, "run.evaluate_every": 1, "run.evaluate_size": 0,
    "run.compile": False,
}  # fmt: skip
"""As docs/training.md and the papers have them: changing one of them is a decision."""


def test_defaults_and_recipes_are_those_that_are_documented() -> None:
    assert to_settings(TrainConfig()) == DEFAULTS
    assert to_settings(resolve({})) == DEFAULTS
    original = {
        **{"recipe": "original", "precision": "fp32", "data.batch": 32, "loss.extra_negatives": 0},
        **{"optimizer.lr": 1e-3, "optimizer.nesterov": False, "optimizer.decay_all": True, "optimizer.clip_norm": 0.0},
        **{"schedule.kind": "step", "schedule.warmup_epochs": 0.0, "ema.decay": 0.0},
        "augment.crop_scales": [0.3, 0.45, 0.6, 0.8, 1.0],
    }
    assert to_settings(resolve({"recipe": "original"})) == {**DEFAULTS, **original}
    finetune = {
        **{"recipe": "finetune", "model.pretrained": "mobilenet0.25", "model.freeze_batch_norm": True},
        **{"optimizer.lr": 1e-4, "schedule.epochs": 10},
    }
    assert to_settings(resolve({"recipe": "finetune"})) == {**DEFAULTS, **finetune}
    deploy640 = {
        **{"recipe": "deploy640", "loss.box": "diou", "teacher.weights": "mobilenet0.25", "run.evaluate_size": 640},
        "augment.crop_scales": [0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.0],
        "model.min_sizes": [[10, 20], [40, 80], [160, 320]],
    }
    assert to_settings(resolve({"recipe": "deploy640"})) == {**DEFAULTS, **deploy640}
    overfit = {
        **{"data.overfit": 8, "data.batch": 8, "optimizer.lr": 0.02, "optimizer.weight_decay": 0.0},
        **{"schedule.epochs": 4, "schedule.warmup_epochs": 0.2, "ema.decay": 0.0, "run.evaluate_every": 0},
    }
    assert to_settings(resolve({"data.overfit": 8})) == {**DEFAULTS, **overfit}
    both = to_settings(resolve({"recipe": "finetune", "data.overfit": 8, "seed": 3}))
    assert both == {**DEFAULTS, **finetune, **overfit, "seed": 3}  # a few images come after the recipe


BOUNDS = [
    ("data.size", [32, 4096], [0, -32, 33, 4128]),
    ("data.batch", [1], [0, -1]),
    ("data.overfit", [0, 1], [-1]),
    ("optimizer.lr", [1e-9, 5.0], [0.0, -1.0]),
    ("optimizer.momentum", [0.1, 0.999], [-0.1, 1.0, 0.0]),
    ("optimizer.weight_decay", [0.0], [-1e-9]),
    ("optimizer.clip_norm", [0.0], [-1e-9]),
    ("schedule.epochs", [1, 100_000], [0, -1, 100_001]),
    ("schedule.kind", ["cosine", "step"], ["linear", ""]),
    ("schedule.warmup_epochs", [0.0, 0.5, 100.0], [-0.1, 100.1]),
    ("schedule.final", [0.0, 1.0], [-0.01, 1.01]),
    ("schedule.milestones", [[], [0.5], [0.1, 0.1], [0.01, 0.99]], [[0.0], [1.0], [0.5, 0.4]]),
    ("schedule.gamma", [1e-6, 1.0], [0.0, 1.1]),
    ("ema.decay", [0.0, 0.9999], [-0.1, 1.0]),
    ("run.device", ["auto", "cpu", "cuda"], ["gpu"]),
    ("run.workers", [0, 64], [-1]),
    ("run.checkpoint_every", [1], [0, -1]),
    ("run.evaluate_every", [0, 1], [-1]),
    ("run.evaluate_size", [0, 32, 640, 4096], [-32, 33, 4128]),
    ("loss.assign", ["match", "atss", "simota"], ["ATSS", "", "best"]),
    ("loss.box", ["smooth_l1", "diou", "ciou"], ["giou", ""]),
    ("teacher.scale", [0.5, 1.3, 8.0], [0.49, 8.01]),
    ("teacher.share", [0.0, 1.0], [-0.01, 1.01]),
    ("teacher.least", [0.01, 0.99], [0.0, 1.0]),
    (
        "model.min_sizes",
        [[[8.0, 16.0], [32.0, 64.0], [128.0, 256.0]], [[1.0, 2.0], [2.0, 3.0], [3.0, 4096.0]]],
        [
            *([], [[8, 16], [32, 64]], [[8, 16], [32, 64], [128, 256], [512, 1024]], [[8], [16], [32]]),
            *([[8, 16, 20], [32, 64, 70], [128, 256, 300]], [[16, 8], [32, 64], [128, 256]]),
            *([[8, 40], [32, 64], [128, 256]], [[0.9, 2], [3, 4], [5, 6]], [[8, 8], [32, 64], [128, 256]]),
            *([[1, 2], [3, 4], [5, 4097]], [[8, 16], [32, 64], 128]),
        ],
    ),
    ("seed", [0, (1 << 62) - 1], [-1, 1 << 62]),
    ("precision", ["auto", "fp32", "bf16"], ["fp16"]),
    ("model.backbone", ["resnet50"], ["resnet101"]),
    ("augment.crop_scales", [[1e-6], [8.0]], [[], [0.0], [8.1]]),
    ("augment.crop_tries", [1, 10_000], [0, 10_001]),
    ("augment.flip", [0.0, 1.0], [-0.01, 1.01]),
    ("augment.brightness", [0.0, 255.0], [-0.1, 255.1]),
    ("augment.contrast", [[0.0, 10.0], [1.0, 1.0]], [[-0.1, 1.0], [1.0, 10.1], [1.0, 0.9]]),
    ("augment.saturation", [[0.0, 10.0], [1.0, 1.0]], [[-0.1, 1.0], [1.0, 10.1], [1.0, 0.9]]),
    ("augment.hue", [0, 90], [-1, 91]),
    ("augment.interpolations", [["area"]], [[], ["linear", "sharp"]]),
    ("augment.pad_bgr", [[0, 0, 0], [255, 255, 255]], [[-1, 0, 0], [0, 0, 256]]),
]


@pytest.mark.parametrize(("name", "good", "bad"), BOUNDS, ids=[name for name, _, _ in BOUNDS])
def test_settings_are_possible_up_to_their_bounds(name: str, good: list[object], bad: list[object]) -> None:
    for value in good:
        assert to_settings(resolve({name: value}))[name] == value
    for value in bad:
        with pytest.raises(RetinaFaceError, match=name.rpartition(".")[2].split("_")[-1]) as caught:
            resolve({name: value})
        assert "\n" not in str(caught.value)


def test_priors_are_written_as_those_of_the_published_model() -> None:
    assert ModelSpec(anchors=resolve({}).model.anchors).to_json() == ModelSpec().to_json()
    sizes = [[8, 16.5], [32.0, 64], [128, 256]]
    assert str(resolve({"model.min_sizes": sizes}).model.anchors.min_sizes) == "((8, 16.5), (32, 64), (128, 256))"


def test_nesterov_needs_momentum() -> None:
    assert resolve({"optimizer.momentum": 0.0, "optimizer.nesterov": False}).optimizer.momentum == 0
    first = {
        **{"recipe": "try", "data.source": "synthetic", "data.size": 128, "schedule.epochs": 2},
        **{"schedule.warmup_epochs": 0.2, "ema.decay": 0.9, "run.output": "runs/try"},
    }
    assert to_settings(resolve({"recipe": "try"})) == {**DEFAULTS, **first}
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov needs optimizer\.momentum"):
        resolve({"optimizer.momentum": 0.0})


def test_only_what_changes_nothing_that_is_computed_may_change() -> None:
    may = {name for name in DEFAULTS if name.startswith("run.")}
    may |= {"data.root", "data.val", "data.images", "data.skip_damaged"}
    other: dict[type, Any] = {
        int: lambda v: v + 1, float: lambda v: v / 2 + 0.01, bool: lambda v: not v, list: lambda v: v[:-1] + v[-1:] * 2,
        str: lambda v: "x", type(None): lambda v: "x",
    }  # fmt: skip
    special = {
        "recipe": "original", "precision": "fp32", "data.size": 320, "model.backbone": "resnet18", "run.device": "cpu",
        "schedule.kind": "step", "loss.positive_iou": 0.4, "augment.pad_bgr": [1, 2, 3],
        "augment.contrast": [0.5, 2.0], "augment.saturation": [0.5, 2.0], "run.evaluate_size": 64,
        "loss.assign": "atss", "loss.box": "diou", "teacher.scale": 1.5,
        "model.min_sizes": [[8, 16], [32, 64], [128, 256]],
    }  # fmt: skip
    taught = DEFAULTS | {"teacher.weights": "t.pth"}  # images without labels need a teacher
    base = from_settings(taught)
    for name, value in taught.items():
        new = from_settings({**taught, name: special.get(name, other[type(value)](value))})
        assert new != base, name
        assert changed(base, new) == ([] if name in may else [name])
        assert changed(base, base) == []


def test_values_become_what_a_setting_is() -> None:
    config = resolve({"optimizer.lr": 1, "schedule.milestones": [0.25, "0.5"], "augment.pad_bgr": (1, 2, 3)})
    assert (config.optimizer.lr, type(config.optimizer.lr)) == (1.0, float)
    assert config.schedule.milestones == (0.25, 0.5)
    assert config.augment.pad_bgr == (1, 2, 3)
    assert resolve({"model.pretrained": None}).model.pretrained is None
    for name, value in (("data.root", 3), ("augment.hue", 1.0), ("augment.hue", True), ("data.batch", "4")):
        with pytest.raises(ConfigError, match=f"{name} is "):
            resolve({name: value})
    for value in (float("inf"), -float("inf"), "inf"):
        with pytest.raises(ConfigError, match="expected a finite number"):
            resolve({"optimizer.lr": value})


def test_sections_and_dotted_names_mix(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data:\n  size: 96\n  batch: 2\noptimizer.lr: 0.5\nloss:\nrun: {workers: 0}\n")
    assert read_yaml(tmp_path / "c.yaml") == {
        **{"data.size": 96, "data.batch": 2, "optimizer.lr": 0.5, "run.workers": 0},
    }
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        read_yaml(tmp_path / "binary.yaml")
    write_yaml(tmp_path / "new" / "c.yaml", TrainConfig(seed=5))
    text = (tmp_path / "new" / "c.yaml").read_text()
    assert text.index("recipe:") < text.index("seed: 5") < text.index("data:") < text.index("run:")
