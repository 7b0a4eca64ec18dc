from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.calibration import Calibration, calibrate
from export.graph import build_heads
from export.options import DEMO, CalibrationOptions, Int8Recipe, load_recipe
from export.parity import rows_from_maps
from export.quantize import mac_shares, to_int8
from export.sensitivity import (
    MAX_STEPS,
    Layer,
    Sensitivity,
    SensitivityOptions,
    Step,
    _short,
    faces_of,
    head_maps,
    main,
    other_images,
    parse_arguments,
    plot,
    sensitivity,
)
from facespec.agreement import Agreement, Budget
from facespec.detections import Detections
from facespec.errors import DataError, ModelFileError, OutputError, RetinaFaceError, SpecError
from facespec.images import write_image
from facespec.samples import sample_crops
from facespec.spec import ModelSpec
from trainer import load_model

SIZE = (160, 192)
SENSITIVE = ("stage1.1.3", "stage1.2.0", "stage1.1.0", "stage1.2.3", "stage1.3.3", "stage1.4.3")
"""The most sensitive of mobilenet0.25, measured on WIDER FACE."""


def _options(source: str = DEMO, images: int = 16) -> SensitivityOptions:
    return SensitivityOptions("mobilenet0.25", CalibrationOptions(source, images=images), held_out=16, size_hw=SIZE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user's cache folder of this file's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def measured(cache: None) -> Sensitivity:
    assert MAX_STEPS == 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.sensitivity.MAX_STEPS", 9)  # each takes half a second
        return sensitivity(_options())


@pytest.fixture(scope="module")
def network(measured: Sensitivity) -> tuple[onnx.ModelProto, Calibration]:
    """What was measured, up to its heads, and its calibration, which comes from the cache."""
    model = load_model()
    graph = build_heads(model, SIZE)
    found = calibrate(graph, _options().calibration, SIZE, model.spec)
    assert found.cached
    return graph, found


def test_known_layers_are_found(measured: Sensitivity, network: tuple[onnx.ModelProto, Calibration]) -> None:
    graph, _ = network
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


def test_a_recipe_holds_what_it_says(measured: Sensitivity, network: tuple[onnx.ModelProto, Calibration]) -> None:
    budget = Budget(recall=90, landmark_error=0.7 * measured.steps[0].agreement.landmark_error)
    step = measured.step(budget)
    assert step.float_layers
    assert step.holds(budget)
    assert not any(before.holds(budget) for before in measured.steps[: measured.steps.index(step)])
    recipe = measured.recipe(budget)
    assert recipe == Int8Recipe(float_depthwise=False, float_layers=step.float_layers)
    # again through the calibration and the transformation of a build
    model = load_model()
    graph, calibration = network
    assert calibration.images == measured.calibration_images
    quantised = to_int8(graph, calibration.ranges, recipe)
    assert mac_shares(quantised, SIZE)["int8"] == pytest.approx(step.int8_share)
    in_float = [
        node.name for node in quantised.graph.node if node.op_type == "Conv" and not node.input[0].endswith("_dq")
    ]
    assert sorted(in_float) == sorted(step.float_layers)
    names, pixels = other_images(_options(), calibration, model.spec)
    assert tuple(names) == measured.held_out_images
    spec = dataclasses.replace(model.spec, decode=dataclasses.replace(model.spec.decode, score_threshold=0.5))
    faces, found = ([faces_of(heads, SIZE, spec) for heads in head_maps(form, pixels)] for form in (graph, quantised))
    again = Agreement.of(faces, found)
    assert again.recall == pytest.approx(step.agreement.recall)
    assert again.landmark_error == pytest.approx(step.agreement.landmark_error, rel=1e-3)


def test_budgets(measured: Sensitivity) -> None:
    assert measured.recipe(Budget(0, 100)).float_layers == ()
    with pytest.raises(ModelFileError, match=r"no graph with at least 50 % .* landmark error <= 0 %: use --fp16"):
        measured.step(Budget(100, 0))
    with pytest.raises(SpecError, match="--recall 101"):
        Budget(101)
    with pytest.raises(SpecError, match="--landmark-error nan"):
        Budget(98, float("nan"))


def test_table_json_and_plot(measured: Sensitivity, tmp_path: Path) -> None:
    lines = str(measured).splitlines()
    assert lines[1].startswith(measured.layers[0].name)
    assert f"{measured.faces} faces of FP32 on 16 held-out images, calibrated on 16 others" in lines[-2]
    read = json.loads(measured.to_json())
    assert read["layers"][0] == dataclasses.asdict(measured.layers[0])
    assert len(read["steps"]) == len(measured.steps)
    assert {"what", "date", "command", "machine", "versions"} <= read.keys()
    held = json.loads(measured.to_json(Budget(0, 100)))["results"]
    assert held == [{"budget": {"recall": 0, "landmark_error": 100}, **read["steps"][0]}]
    assert json.loads(measured.to_json(Budget(100, 0)))["results"] == [{"budget": {"recall": 100, "landmark_error": 0}}]
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
    files += ["--out", str(tmp_path / "recipe.json")]
    arguments = ["--calib", "demo", "--size", "160x192", "--images", "16", "--held-out", "16", *files]
    assert main([*arguments, "--recall", "50", "--landmark-error", "50"]) == 0
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
        main([*arguments, "--recall", "100", "--landmark-error", "0"])
    assert (tmp_path / "a.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calib", "demo", "--recall", "-1"], "--recall -1: recall is a percentage"),
        (["--calib", "demo", "--held-out", "3"], "--held-out 3: give a number from 8"),
        (["--calib", "demo", "--images", "1"], "--images 1: give a number from 8"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "--calib"), (["--calib", "demo", "--size", "100x100"], "100 is not a multiple of 32")],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_folders_that_do_not_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, noise = tmp_path / "crops", tmp_path / "noise"
    rng = np.random.default_rng(0)
    for name, frame in sample_crops(20, 0):
        write_image(folder / f"{name}.png", frame)
        write_image(noise / f"{name}.png", rng.integers(0, 256, (64, 64, 3), np.uint8))
    with pytest.raises(DataError, match=r"16 images to calibrate on leave 4 to measure on, at least 8 are needed"):
        sensitivity(_options(str(folder)))
    with pytest.raises(DataError, match="no face on any of the 8 images"):
        sensitivity(_options(str(noise), images=8))
    # an output must not be one of the images
    with pytest.raises(OutputError, match="is a file that is read"):
        main(["--calib", str(folder), "--plot", str(next(folder.iterdir()))])


def _face(*places: float, side: float = 10) -> Detections:
    boxes = np.array([[x, 0, x + side, side] for x in places], np.float32).reshape(-1, 4)
    points = np.array([np.full((5, 2), x + side / 2) for x in places], np.float32).reshape(-1, 5, 2)
    return Detections(boxes, np.full(len(boxes), 0.9, np.float32), points, (64, 64))


def _figures(reference: list[Detections], found: list[Detections]) -> tuple[float | None, ...]:
    return tuple(Step((), 1.0, Agreement.of(reference, found)).to_dict()["agreement"].values())


def test_agreement() -> None:
    assert _figures([_face(0)], [_face(0)]) == (100, 100, 1, 0)
    assert _figures([_face(0), _face(0)], [_face(0), _face()]) == (50, 100, 1, 0)
    assert _figures([_face(0), _face()], [_face(0), _face(0)]) == (100, 50, 1, 0)
    assert _figures([_face(0)], [_face(6)]) == (0, 0, None, None)  # an overlap too small
    assert _figures([_face()], [_face()]) == (None, None, None, None)
    _, _, iou, error = _figures([_face(0)], [_face(1)])
    assert iou == pytest.approx(9 / 11)
    assert error == pytest.approx(10 * np.sqrt(2), rel=1e-5)
    # each face is matched once, and the better overlap wins
    assert _figures([_face(0)], [_face(1, 0)]) == (100, 50, 1, 0)


def _agreed(recall: float, precision: float, iou: float, error: float) -> Agreement:
    found = round(18 * recall)
    return Agreement(
        faces=1800,
        candidate_faces=round(100 * found / precision),
        iou=[iou] * found,
        landmarks=[error] if found else [],
    )


def test_a_step_holds_a_budget_in_both_ways() -> None:
    step = Step((), 1.0, _agreed(recall=99, precision=50, iou=0.9, error=1.0))
    assert step.holds(Budget(99, 1.0))
    assert not step.holds(Budget(99.1, 1.0))
    assert not step.holds(Budget(99, 0.9))
    assert not Step((), 1.0, _agreed(recall=0, precision=50, iou=0.9, error=0)).holds(Budget(0, 100))


def test_the_cost_of_a_layer_by_hand(measured: Sensitivity, network: tuple[onnx.ModelProto, Calibration]) -> None:
    """RMS of all head values at the priors with a face logit over -1, on the first eight images that have any."""
    graph, calibration = network
    _, pixels = other_images(_options(), calibration, load_model().spec)
    layer = measured.layers[3]
    others = tuple(other.name for other in measured.layers if other.name != layer.name)
    alone = to_int8(graph, calibration.ranges, Int8Recipe(float_depthwise=False, float_layers=others))
    assert [node.name for node in alone.graph.node if node.op_type == "Conv" and node.input[0].endswith("_dq")] == [
        layer.name
    ]
    errors, images = [], 0
    for before, after in zip(head_maps(graph, pixels), head_maps(alone, pixels), strict=True):
        left, right = (rows_from_maps(heads, 2) for heads in (before, after))
        seen = left[:, 5] - left[:, 4] > -1
        if seen.any() and images < 8:
            images += 1
            errors.append((left - right)[seen].ravel().astype(np.float64))
    assert images == 8
    assert layer.cost == pytest.approx(np.sqrt(np.mean(np.concatenate(errors) ** 2)), rel=1e-4)
    by_priority = sorted(measured.layers, key=lambda layer: -(layer.cost**2) / layer.mac_share)
    assert [layer.name for layer in by_priority] == list(measured.steps[-1].float_layers)
    counts = [len(step.float_layers) for step in measured.steps]
    assert counts == [0, 1, 2, 3, 5, 9, 16, 29, 50]  # the first alone, then ever more
    assert measured.default.int8_share == pytest.approx(0.88, abs=0.01)


def _step(share: float, recall: float, error: float, *layers: str) -> Step:
    return Step(layers, share, _agreed(recall, 90, 0.9, error))


def _found(*steps: Step, layers: int = 2, faces: int = 40) -> Sensitivity:
    costs = tuple(Layer(f"/body/stage1/stage1.{i}/stage1.{i}.0/Conv", 1.0 - i / 100, 1 / layers) for i in range(layers))
    return Sensitivity("b", "0" * 64, SIZE, costs, steps, _step(0.9, 97, 1.2, "d"), faces, ("c",) * 3, ("h",) * 5)


def test_the_step_that_holds_a_budget() -> None:
    """The first in the order given; half of the arithmetic in INT8 is still called INT8, less is not."""
    steps = (
        _step(1, 98, 2),
        _step(0.8, 98.5, 1.1, "a"),
        _step(0.5, 98.5, 1.0, "a", "b"),
        _step(0.49, 99, 0, "a", "b", "c"),
    )
    assert _found(*steps).step() is steps[2]
    assert _found(*steps).step(Budget(98, 2)) is steps[0]
    assert _found(*steps).recipe(Budget(98.5, 1.1)) == Int8Recipe(float_depthwise=False, float_layers=("a",))
    with pytest.raises(ModelFileError, match=r"holds recall >= 99 %, landmark error <= 1 %: use --fp16"):
        _found(*steps).step(Budget(99))


def test_bounds() -> None:
    assert (Budget().recall, Budget().landmark_error) == (98.5, 1.0)
    for recall, error in ((0, 0), (100, 1e9)):
        assert Budget(recall, error).recall == recall
    for recall, error in ((-0.1, 1), (100.1, 1), (98, -0.1), (98, float("inf"))):
        with pytest.raises(SpecError):
            Budget(recall, error)
    options = SensitivityOptions("w", CalibrationOptions(DEMO))
    assert (options.held_out, options.size_hw) == (96, (640, 640))
    for held_out in (8, 2048):
        assert dataclasses.replace(options, held_out=held_out).held_out == held_out
    for changes in ({"held_out": 7}, {"held_out": 2049}, {"size_hw": (33, 32)}):
        with pytest.raises(SpecError):
            dataclasses.replace(options, **changes)  # type: ignore[arg-type]
    assert Layer("x", 3.0, 0.5).priority == 18


def test_what_a_table_says() -> None:
    lines = str(_found(_step(1, 97.5, 2.25), _step(0.75, 99, 0.5, "a", "b"), layers=19)).splitlines()
    assert lines[1].split() == ["/body/stage1/stage1.0/stage1.0.0/Conv", "1.0000", "5.26"]
    assert lines[16].split()[0] == "/body/stage1/stage1.15/stage1.15.0/Conv"
    assert lines[17] == "and 3 convolutions that cost less"
    assert [line.split() for line in lines[20:23]] == [
        ["0", "100.0", "97.50", "90.00", "0.900", "2.25"],
        ["2", "75.0", "99.00", "90.00", "0.900", "0.50"],
        ["default", "90.0", "97.00", "90.00", "0.900", "1.20"],
    ]
    assert lines[23].startswith("40 faces of FP32 on 5 held-out images, calibrated on 3 others")
    assert lines[24] == "one face is 2.50 % of recall: --held-out makes it finer"
    assert "cost less" not in str(_found(_step(1, 99, 1), layers=16))
    lost = str(_found(_step(1, 0, 0), layers=16)).splitlines()
    assert lost[19].split() == ["0", "100.0", "0.00", "none", "none", "none"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("/body/stage1/stage1.1/stage1.1.0/Conv", "stage1.1.0"),
        ("/fpn/merge1/merge1.0/Conv", "fpn/merge1.0"),
        ("/heads.0/Conv", "heads.0"),
        ("/ssh1/conv3X3/Conv", "ssh1/conv3X3"),
        ("Conv", "Conv"),
        ("/a/b/c", "a/c"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert _short(name) == short


def test_what_is_measured_by_default() -> None:
    options, budget, files = parse_arguments(["--calib", "demo"])
    assert options == SensitivityOptions("mobilenet0.25", CalibrationOptions(DEMO))
    assert budget == Budget()
    assert (files.json, files.plot, files.out) == (None, None, None)
    line = ["--calib", "c", "--weights", "w", "--data", "d", "--images", "9", "--held-out", "10", "--seed", "3"]
    line += [
        "--size",
        "32x64",
        "--recall",
        "90",
        "--landmark-error",
        "2",
        "--json",
        "j",
        "--plot",
        "p",
        "--out",
        "r",
    ]
    options, budget, files = parse_arguments(line)
    assert options == SensitivityOptions("w", CalibrationOptions("c", Path("d"), 9, 3), 10, (32, 64))
    assert budget == Budget(90, 2)
    assert (files.json, files.plot, files.out) == (Path("j"), Path("p"), Path("r"))
    words = dataclasses.replace(options.calibration, recipe=Path("r s")).words()
    assert words == ["--calib", "c", "--images", "9", "--seed", "3", "--data", "d", "--int8-recipe", "r s"]
    assert "--data" not in CalibrationOptions("c").words()


def test_images_to_measure_on_are_others(tmp_path: Path) -> None:
    """Neither calibrated on, nor skipped there, nor damaged; by the seed, and no more than asked for."""
    rng = np.random.default_rng(0)
    for index in range(30):
        write_image(tmp_path / f"{index:02d}.png", rng.integers(0, 256, (8, 8, 3), np.uint8))
    paths = sorted(map(str, tmp_path.iterdir()))
    Path(paths[29]).write_bytes(b"no picture")
    options = SensitivityOptions("w", CalibrationOptions(str(tmp_path), images=8), held_out=12, size_hw=(32, 64))
    used = Calibration(options.calibration, {}, tuple(paths[:8]), (paths[8],), 1, False)
    names, pixels = other_images(options, used, ModelSpec())
    assert len(names) == len(pixels) == 12
    assert not set(names) & {*paths[:9], paths[29]}
    assert pixels[0].shape == (32, 64, 3)
    assert names != sorted(names)
    everything, _ = other_images(dataclasses.replace(options, held_out=50), used, ModelSpec())
    assert sorted(everything) == paths[9:29]
    other = dataclasses.replace(options, calibration=CalibrationOptions(str(tmp_path), images=8, seed=1))
    assert other_images(other, used, ModelSpec())[0] != names
    # of the photographs, the crops that come next
    demo = SensitivityOptions("w", CalibrationOptions(DEMO, images=8), held_out=9, size_hw=(32, 64))
    names, _ = other_images(demo, Calibration(demo.calibration, {}, ("x",) * 8, (), 1, False), ModelSpec())
    assert names == [name for name, _ in sample_crops(17, 0)][8:]


def test_numbers_that_are_not_finite_are_no_faces() -> None:
    heads = [np.zeros((1, 32, 64 // stride, 64 // stride), np.float32) for stride in (8, 16, 32)]
    assert len(faces_of(heads, (64, 64), ModelSpec())[0]) > 0
    heads[2][0, 9, 0, 0] = np.nan
    with pytest.raises(ModelFileError, match="not finite on a held-out image"):
        faces_of(heads, (64, 64), ModelSpec())


def test_a_budget_that_everything_holds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = _found(_step(1, 99, 0.5), _step(0.9, 99.5, 0.1, "a", "b"))
    monkeypatch.setattr("export.sensitivity.sensitivity", lambda options, progress: found)
    assert main(["--calib", "demo"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[-3] == "100.0 % of multiply-accumulates in INT8 hold recall >= 98.5 %, landmark error <= 1 %; in float:"
    )
    assert printed[-2] == "  nothing"
    assert main(["--calib", "demo", "--recall", "99.5"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:-1] == ["  a", "  b"]
