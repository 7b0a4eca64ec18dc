from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from export.calibration import calibrate, demo_frames
from export.calibration_options import DEMO, CalibrationOptions
from export.int8_recipe import Int8Recipe, load_recipe
from export.portable import build_heads
from export.quantize import mac_shares, to_int8
from export.sensitivity import (
    Agreement,
    Budget,
    Faces,
    Sensitivity,
    SensitivityOptions,
    Step,
    _faces,
    _held_out,
    _run,
    agreement,
    main,
    parse_arguments,
    plot,
    sensitivity,
)
from facespec.errors import DataError, ModelFileError, OutputError, RetinaFaceError, SpecError
from facespec.images import write_image
from trainer import load_model

SIZE = (160, 192)
SENSITIVE = ("stage1.1.3", "stage1.2.0", "stage1.1.0", "stage1.2.3", "stage1.3.3", "stage1.4.3")
"""The most sensitive of mobilenet0.25, measured on WIDER FACE."""


def _options(source: str = DEMO, images: int = 16) -> SensitivityOptions:
    return SensitivityOptions("mobilenet0.25", CalibrationOptions(source, images=images), held_out=16, size_hw=SIZE)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Sensitivity:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return sensitivity(_options())


def test_known_layers_are_found(measured: Sensitivity) -> None:
    graph = build_heads(load_model(), SIZE)
    names = [layer.name for layer in measured.layers]
    assert sorted(names) == sorted(node.name for node in graph.graph.node if node.op_type == "Conv")
    third = names[: len(names) // 3]
    assert all(any(f"/{layer}/" in name for name in third) for layer in SENSITIVE)
    costs = [layer.cost for layer in measured.layers]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] > 0
    assert sum(layer.mac_share for layer in measured.layers) == pytest.approx(1)
    assert len(measured.calibration_images) == len(measured.held_out_images) == 16
    assert not set(measured.calibration_images) & set(measured.held_out_images)


def test_steps_lead_from_int8_to_float(measured: Sensitivity) -> None:
    first, last = measured.steps[0], measured.steps[-1]
    assert (first.float_layers, first.int8_share) == ((), 1)
    assert (len(last.float_layers), last.int8_share) == (len(measured.layers), 0)
    assert (last.agreement.recall, last.agreement.precision) == (100, 100)
    assert last.agreement.landmark_error == pytest.approx(0, abs=0.01)  # equalised: other roundings
    assert first.agreement.landmark_error > 0.3
    for one, next_ in zip(measured.steps, measured.steps[1:], strict=False):
        assert one.int8_share > next_.int8_share
        assert next_.float_layers[: len(one.float_layers)] == one.float_layers
    share = {layer.name: layer.mac_share for layer in measured.layers}
    for step in measured.steps:
        assert step.int8_share == pytest.approx(1 - sum(share[name] for name in step.float_layers))
    assert measured.default.float_layers == Int8Recipe().float_layers


def test_a_recipe_holds_what_it_says(measured: Sensitivity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    budget = Budget(recall=90, landmark_error=0.7 * measured.steps[0].agreement.landmark_error)
    step = measured.step(budget)
    assert step.float_layers
    assert step.agreement.holds(budget)
    assert not any(before.agreement.holds(budget) for before in measured.steps[: measured.steps.index(step)])
    recipe = measured.recipe(budget)
    assert recipe == Int8Recipe(float_depthwise=False, float_layers=step.float_layers)
    # again through the calibration and the transformation of a build
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = load_model()
    graph = build_heads(model, SIZE)
    calibration = calibrate(graph, _options().calibration, SIZE, model.spec)
    assert calibration.images == measured.calibration_images
    quantised = to_int8(graph, calibration.ranges, recipe)
    assert mac_shares(quantised, SIZE)["int8"] == pytest.approx(step.int8_share)
    in_float = [
        node.name for node in quantised.graph.node if node.op_type == "Conv" and not node.input[0].endswith("_dq")
    ]
    assert sorted(in_float) == sorted(step.float_layers)
    names, pixels = _held_out(_options(), calibration, model.spec)
    assert tuple(names) == measured.held_out_images
    spec = dataclasses.replace(model.spec, decode=dataclasses.replace(model.spec.decode, score_threshold=0.5))
    faces, found = ([_faces(heads, SIZE, spec) for heads in _run(form, pixels)] for form in (graph, quantised))
    again = agreement(faces, found)
    assert again.recall == pytest.approx(step.agreement.recall)
    assert again.landmark_error == pytest.approx(step.agreement.landmark_error, rel=1e-3)


def test_budgets(measured: Sensitivity) -> None:
    assert measured.recipe(Budget(0, 100)).float_layers == ()
    with pytest.raises(ModelFileError, match=r"no graph with at least 50 % .* landmark error <= 0 %: use --fp16"):
        measured.step(Budget(100, 0))
    with pytest.raises(SpecError, match="--budget 101"):
        Budget(101)
    with pytest.raises(SpecError, match="--landmark-budget nan"):
        Budget(98, float("nan"))


def test_table_json_and_plot(measured: Sensitivity, tmp_path: Path) -> None:
    lines = str(measured).splitlines()
    assert lines[1].startswith(measured.layers[0].name)
    assert f"{measured.faces} faces of FP32 on 16 held-out images, calibrated on 16 others" in lines[-2]
    read = json.loads(measured.to_json())
    assert read["layers"][0] == dataclasses.asdict(measured.layers[0])
    assert len(read["steps"]) == len(measured.steps)
    for budget in (Budget(0, 100), Budget(100, 0)):  # one that is held, one that is not
        plot(measured, budget, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_command(
    measured: Sensitivity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def remembered(options: SensitivityOptions, progress: bool = False) -> Sensitivity:
        calls.append(options)
        return measured

    monkeypatch.setattr("export.sensitivity.sensitivity", remembered)
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    files += ["--recipe", str(tmp_path / "recipe.json")]
    arguments = ["--calib", "demo", "--size", "160x192", "--calib-images", "16", "--held-out", "16", *files]
    assert main([*arguments, "--budget", "50", "--landmark-budget", "50"]) == 0
    assert calls == [_options()]
    assert json.loads((tmp_path / "a.json").read_text())["faces"] == measured.faces
    assert (tmp_path / "a.svg").is_file()
    printed = capsys.readouterr().out
    assert "100.0 % of multiply-accumulates in INT8 hold recall >= 50 %, landmark error <= 50 %" in printed
    assert f"--int8-recipe {tmp_path / 'recipe.json'}" in printed
    assert load_recipe(tmp_path / "recipe.json") == measured.recipe(Budget(50, 50))
    # what was measured is written even where no recipe holds the budget
    (tmp_path / "a.json").unlink()
    with pytest.raises(ModelFileError, match="no graph"):
        main([*arguments, "--budget", "100", "--landmark-budget", "0"])
    assert (tmp_path / "a.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calib", "demo", "--budget", "-1"], "--budget -1: recall is a percentage"),
        (["--calib", "demo", "--size", "100x100"], "100 is not a multiple of 32"),
        (["--calib", "demo", "--held-out", "3"], "--held-out 3: give a number from 8"),
        (["--calib", "demo", "--calib-images", "1"], "--calib-images 1: give a number from 8"),
        (["--calib", "demo", "--plot", "p.txt"], "--plot p.txt: give a name that ends in .png"),
        (["--calib", "nowhere"], "--calib nowhere: neither a folder"),
        (["--calib", "widerface_train", "--data", "nowhere"], "no train/images in nowhere"),
        (["--calib", "demo", "--weights", "nowhere.pth"], "nowhere.pth: no such weights file"),
    ],
)
def test_wrong_arguments_take_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(RetinaFaceError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_calib_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments([])
    assert caught.value.code == 1
    assert "--calib" in capsys.readouterr().err


def test_folders_that_do_not_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, noise = tmp_path / "crops", tmp_path / "noise"
    rng = np.random.default_rng(0)
    for name, frame in demo_frames(20, 0):
        write_image(folder / f"{name}.png", frame)
        write_image(noise / f"{name}.png", rng.integers(0, 256, (64, 64, 3), np.uint8))
    with pytest.raises(DataError, match=r"16 images to calibrate on leave 4 to measure on, at least 8 are needed"):
        sensitivity(_options(str(folder)))
    with pytest.raises(DataError, match="no face on any of the 8 images"):
        sensitivity(_options(str(noise), images=8))
    # an output must not be one of the images
    with pytest.raises(OutputError, match="is a file that is read"):
        main(["--calib", str(folder), "--plot", str(next(folder.iterdir()))])


def _face(x: float, side: float = 10) -> Faces:
    points = np.full((1, 5, 2), x + side / 2, np.float32)
    return np.array([[x, 0, x + side, side]], np.float32), points


def test_agreement() -> None:
    nobody = np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32)
    assert agreement([_face(0)], [_face(0)]) == Agreement(100, 100, 1, 0)
    assert agreement([_face(0), _face(0)], [_face(0), nobody]) == Agreement(50, 100, 1, 0)
    assert agreement([_face(0), nobody], [_face(0), _face(0)]) == Agreement(100, 50, 1, 0)
    assert agreement([_face(0)], [_face(6)]) == Agreement(0, 0, 0, 100)  # an overlap too small
    assert agreement([nobody], [nobody]) == Agreement(100, 100, 0, 100)
    moved = agreement([_face(0)], [_face(1)])
    assert moved.mean_iou == pytest.approx(9 / 11)
    assert moved.landmark_error == pytest.approx(10 * np.sqrt(2), rel=1e-5)
    # each face is matched once, and the better overlap wins
    two = tuple(np.concatenate(parts) for parts in zip(_face(1), _face(0), strict=True))
    assert agreement([_face(0)], [(two[0], two[1])]) == Agreement(100, 50, 1, 0)


def test_a_step_holds_a_budget_in_both_ways() -> None:
    step = Step((), 1.0, Agreement(recall=99, precision=50, mean_iou=0.9, landmark_error=1.0))
    assert step.agreement.holds(Budget(99, 1.0))
    assert not step.agreement.holds(Budget(99.1, 1.0))
    assert not step.agreement.holds(Budget(99, 0.9))
