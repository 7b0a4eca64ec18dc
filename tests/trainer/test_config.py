from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest

from facespec.errors import RetinaFaceError
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
        f"a: &a [{'x, ' * 99}]\nb: &b [{'*a, ' * 99}]\nc: &c [{'*b, ' * 99}]\nseed: [{'*c, ' * 99}]",
    ],
)
def test_hostile_yaml_ends_in_one_short_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(read_yaml(tmp_path / "c.yaml"))
    assert len(str(caught.value)) < 1500


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
