"""Learning INT8 from the float model: the loss, the crops, what is written, and what becomes of it in an export."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export import distillation, to_onnx, train_int8
from export.calibration import Calibration, load_inputs
from export.distillation import CROP, Pace, crop_around, learn, losses, rows_of
from export.graph import build_heads
from export.inspect import inspect
from export.learned_int8 import LearnedInt8, Lesson, load_learned, save_learned
from export.options import CalibrationOptions, Int8Recipe
from export.parity import rows_from_maps
from export.quantize import Steps, calibrated_steps, equalize, mac_shares, with_steps
from export.to_trt import EngineOptions, Profile, build_engine
from export.train_int8 import TrainInt8Options
from facespec.errors import DataError, ModelFileError, OutputError, WeightsError
from facespec.letterbox import Frame
from facespec.spec import ModelSpec
from tests.conftest import MakeOnce
from trainer import load_model
from trt_runtime.gpu.flavor import RTX
from trt_runtime.gpu.sidecar import read_sidecar

SIZE = (320, 320)
LESSON = Lesson("demo", 8, 0, 1, "0" * 64)


@pytest.fixture(scope="module")
def start(heads: onnx.ModelProto, calibrated: Calibration) -> tuple[onnx.ModelProto, Steps]:
    """What learning begins with: the published weights, equalised, and calibrated steps of the default recipe."""
    graph, ranges = equalize(heads, calibrated.ranges)
    return graph, calibrated_steps(graph, ranges, Int8Recipe())


@pytest.fixture(scope="module")
def pupil(make_once: MakeOnce, calibration_cache: Path) -> Path:
    """A checkpoint as the command writes it, after two updates."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(calibration_cache))
            demo = ["--calib", "demo", "--images", "8", "--held-out", "8", "--size", "192x160"]
            learning = ["--updates", "2", "--batch", "2", "--lr", "0.001"]
            assert train_int8.main([*demo, *learning, "--out", str(folder / "q.pth")]) == 0

    return make_once("pupil", make) / "q.pth"


def _maps(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 2, (2, 32, side, side + 1)).astype(np.float32) for side in (4, 2, 1)]


def test_rows_are_those_of_the_parity_report() -> None:
    maps = _maps(0)
    logits, boxes, landmarks = (part.numpy() for part in rows_of([torch.from_numpy(level) for level in maps], 2))
    for image in range(2):
        expected = rows_from_maps([level[image : image + 1] for level in maps], 2)
        np.testing.assert_array_equal(logits[image], expected[:, 5] - expected[:, 4])
        np.testing.assert_array_equal(boxes[image], expected[:, :4])
        np.testing.assert_array_equal(landmarks[image], expected[:, 6:])


def test_the_loss_number_by_number() -> None:
    student, teacher = _maps(1), _maps(2)
    found = losses(*([torch.from_numpy(level) for level in side] for side in (student, teacher)), per_cell=2)
    total = 0.0
    expected = {"score": 0.0, "logit": 0.0, "box": 0.0, "landmark": 0.0}

    def bent(apart: float) -> float:
        return apart - 0.05 if apart >= 0.1 else apart * apart / 0.2

    for image in range(2):
        mine, theirs = (rows_from_maps([level[image : image + 1] for level in side], 2) for side in (student, teacher))
        for row, other in zip(mine.astype(float), theirs.astype(float), strict=True):
            p, q = (1 / (1 + math.exp(values[4] - values[5])) for values in (other, row))
            expected["score"] += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            if p < 0.02:
                continue
            total += p
            expected["logit"] += p * bent(abs((row[5] - row[4]) - (other[5] - other[4])))
            expected["box"] += p * sum(bent(abs(a - b)) for a, b in zip(row[:4], other[:4], strict=True)) / 4
            expected["landmark"] += p * sum(bent(abs(a - b)) for a, b in zip(row[6:], other[6:], strict=True)) / 10
    assert total > 1
    for name, weight in (("score", 1), ("logit", 0.5), ("box", 1), ("landmark", 3)):
        assert found[name].item() == pytest.approx(weight * expected[name] / total, rel=1e-3), name


def test_a_student_that_knows_it_all_learns_nothing() -> None:
    """Also where the teacher sees no face at all, and nothing is divided by zero."""
    for shift in (0, 30):
        teacher = [torch.from_numpy(level) for level in _maps(3)]
        for level in teacher:
            level[:, [0, 2]] += shift  # the background's logits
        student = [level.clone().requires_grad_() for level in teacher]
        parts = losses(student, teacher, 2)
        sum(parts.values()).backward()
        assert all(abs(part.item()) < 1e-5 for part in parts.values())
        assert all(level.grad.abs().max() < 1e-6 for level in student)


def test_crops_hold_a_face_of_the_image() -> None:
    rng = np.random.default_rng(0)
    image = np.zeros((640, 480, 3), np.uint8)
    centres = np.array([[5.0, 630.0], [240.0, 300.0]], np.float32)
    for number, (x, y) in enumerate(centres.astype(int)):
        image[y, x] = number + 1
    found: set[int] = set()
    for _ in range(40):
        crop = crop_around(image, centres, rng)
        assert crop.shape == (CROP, CROP, 3)
        assert crop.any()
        found |= set(np.unique(crop).tolist())
    assert found == {0, 1, 2}
    assert crop_around(image[:96, :64], centres[:0], rng).shape == (96, 64, 3)
    columns = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    firsts = {int(crop_around(columns, centres[:0], rng)[0, 0, 0]) for _ in range(20)}
    assert firsts == {0, 63}  # as it is, and mirrored


def _apart(graph: onnx.ModelProto, steps: Steps, teacher: onnx.ModelProto, images: np.ndarray) -> float:
    from export.fake_int8 import FakeInt8

    with torch.no_grad():
        maps = [FakeInt8(*sides)(torch.from_numpy(images)) for sides in ((graph, steps), (teacher, None))]
        return float(sum(losses(*maps, per_cell=2).values()))


def test_it_learns_and_always_the_same(start: tuple[onnx.ModelProto, Steps], heads: onnx.ModelProto) -> None:
    _, pixels, _ = load_inputs(CalibrationOptions("demo", images=8), (160, 160), ModelSpec())
    centres = [np.array([[80.0, 80.0]], np.float32)] * len(pixels)
    pace = Pace(24, 4, 0.003)
    graph, steps = learn(*start, heads, pixels, centres, pace)
    images = np.stack(pixels)
    assert _apart(graph, steps, heads, images) < 0.8 * _apart(*start, heads, images)
    assert steps.keys() == start[1].keys()
    again, same = learn(*start, heads, pixels, centres, pace)
    assert again.SerializeToString() == graph.SerializeToString()
    assert all(same[name].data == step.data for name, step in steps.items())
    other, _ = learn(*start, heads, pixels, centres, pace, seed=1)
    assert other.SerializeToString() != graph.SerializeToString()


def test_numbers_that_run_away_end_it(start: tuple[onnx.ModelProto, Steps], heads: onnx.ModelProto) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(heads)
    bias = next(tensor for tensor in broken.graph.initializer if tensor.name == "heads.0.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(32, np.inf, np.float32), bias.name))
    with pytest.raises(DataError, match="after 0 updates: give a smaller --lr"):
        learn(*start, broken, [np.zeros((64, 64, 3), np.uint8)], [np.zeros((0, 2), np.float32)], Pace(2, 1, 0.1))


def test_a_checkpoint_keeps_every_code(tmp_path: Path, start: tuple[onnx.ModelProto, Steps]) -> None:
    """Weights go through a model in PyTorch and its export: the INT8 graph is the same to the last bit."""
    graph, steps = start
    path = tmp_path / "q.pth"
    save_learned(path, graph, LearnedInt8(steps, LESSON))
    torch.load(path, weights_only=True)
    learned = load_learned(str(path))
    assert learned is not None
    assert learned.lesson == LESSON
    before = with_steps(graph, steps)
    after = with_steps(build_heads(load_model(path), SIZE), learned.steps)
    node_of = [{node.name: node for node in side.graph.node} for side in (before, after)]
    values = [{item.name: numpy_helper.to_array(item) for item in side.graph.initializer} for side in (before, after)]
    sources = [{name: node for node in side.graph.node for name in node.output} for side in (before, after)]
    compared = 0
    for name, node in node_of[0].items():
        if node.op_type == "Conv":
            pair = []
            for side, one in enumerate((node, node_of[1][name])):
                dequantize = sources[side].get(one.input[1])
                inputs = dequantize.input[:2] if dequantize is not None else one.input[1:2]
                pair.append([values[side][x] for x in (*inputs, one.input[2])])
            for left, right in zip(*pair, strict=True):
                np.testing.assert_array_equal(left, right)
                compared += 1
    assert compared == 2 * 50 + len(steps)


def test_other_weights_bring_no_steps(tmp_path: Path, heads: onnx.ModelProto) -> None:
    from trainer.checkpoint import save_checkpoint

    assert load_learned("mobilenet0.25") is None
    plain = tmp_path / "plain.pth"
    save_checkpoint(plain, load_model())
    assert load_learned(str(plain)) is None
    torch.save({"int8": {}, **load_model().state_dict()}, plain)
    assert load_learned(str(plain)) is None
    onnx.save(heads, tmp_path / "heads.onnx")
    assert load_learned(str(tmp_path / "heads.onnx")) is None


def test_damaged_steps_are_refused(tmp_path: Path, start: tuple[onnx.ModelProto, Steps]) -> None:
    graph, steps = start
    path = tmp_path / "q.pth"
    save_learned(path, graph, LearnedInt8(steps, LESSON))
    whole = torch.load(path, weights_only=True)
    name = next(iter(steps))
    good = whole["int8"]
    for damaged, said in (
        ({**good, "data": {**good["data"], name: 0.1}}, "float16"),
        ({**good, "data": {**good["data"], name: -0.5}}, "positive"),
        ({**good, "data": {**good["data"], name: "x"}}, "damaged"),
        ({**good, "data": {}}, "not as many"),
        ({**good, "weights": {**good["weights"], name: good["weights"][name] * torch.nan}}, "positive"),
        ({**good, "weights": {**good["weights"], name: 0.5}}, "no vector"),
        ({**good, "lesson": {**good["lesson"], "seed": "0"}}, "seed"),
        ({"data": good["data"]}, "lesson"),
        ([], "no dictionary"),
    ):
        torch.save({**whole, "int8": damaged}, path)
        with pytest.raises(WeightsError, match=said) as caught:
            load_learned(str(path))
        assert "\n" not in str(caught.value)
    # steps of other layers than the network has show when they are put to use
    torch.save({**whole, "int8": good}, path)
    learned = load_learned(str(path))
    assert learned is not None
    with pytest.raises(ModelFileError, match="it has no convolution /elsewhere"):
        with_steps(graph, {**learned.steps, "/elsewhere": learned.steps[name]})


def test_what_is_written_is_exported_in_int8_without_images(
    pupil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At any size, with the steps that were learned."""
    out = tmp_path / "q.onnx"
    assert to_onnx.main(["--weights", str(pupil), "--int8", "--size", "dynamic", "--out", str(out)]) == 0
    assert "brings, learned on 8 images of demo" in capsys.readouterr().out
    assert not Path(f"{out}.calibration.txt").exists()
    assert len(Path(f"{pupil}.calibration.txt").read_text().splitlines()) == 8
    found = inspect(out)
    assert found.problems == []
    assert found.precision["int8"] == pytest.approx(0.88, abs=0.001)
    learned = load_learned(str(pupil))
    assert learned is not None
    assert (learned.lesson.images, learned.lesson.updates) == (8, 2)
    assert learned.lesson.teacher_sha256 == load_model().spec.weights_sha256
    graph = onnx.load(out)
    values = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
    source = {name: node for node in graph.graph.node for name in node.output}
    for node in graph.graph.node:
        if node.name in learned.steps:
            step = learned.steps[node.name]
            data, weight = source[node.input[0]], source[node.input[1]]
            assert (data.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
            assert values[data.input[1]] == step.data
            np.testing.assert_array_equal(values[weight.input[1]], step.weight)


def test_what_goes_with_it_and_what_does_not(
    pupil: Path,
    tmp_path: Path,
    error_line: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    shared_cache: None,
) -> None:
    weights = ["--weights", pupil, "--size", "160x192"]
    assert "leave out --calib" in error_line(to_onnx.main, *weights, "--int8", "--calib", "demo")
    assert "goes with --int8 --calib" in error_line(to_onnx.main, *weights, "--int8", "--images", "9")
    line = error_line(train_int8.main, "--weights", pupil, "--calib", "demo", "--out", "r.pth")
    assert "give the weights that it was made from" in line
    assert list(tmp_path.iterdir()) == []
    assert to_onnx.main([*map(str, weights), "--out", "float.onnx"]) == 0
    assert "fp32 is not what it was measured in" in capsys.readouterr().out
    assert inspect("float.onnx").precision == {"fp32": 1.0}


@pytest.mark.skipif(not RTX.installed(), reason="TensorRT-RTX is not installed (Linux on x86_64 only)")
def test_an_engine_of_it(pupil: Path, tmp_path: Path) -> None:
    """Its first convolution stays in fp16, as of every INT8 engine of TensorRT-RTX."""
    small = (128, 128)
    options = EngineOptions(
        str(pupil), tmp_path / "q.engine", precision="int8", profile=Profile(sizes_hw=(small, small, small))
    )
    sidecar = build_engine(options)
    assert sidecar is not None
    assert sidecar.calibration["updates"] == 2
    first = next(iter(sidecar.convolutions))
    assert sidecar.convolutions[first][1] == "fp16"
    assert sidecar.mac_shares["int8"] > 0.8
    assert "--calib" not in sidecar.command
    found = inspect(options.out)
    assert found.problems == []
    assert read_sidecar(options.out).calibration == sidecar.calibration


def test_a_recipe_chooses_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_cache: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Learning is left out here; an interrupt of it leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"float_depthwise": False, "float_layers": ["/heads."]}))
    given: list[Pace] = []

    def stop(
        graph: object, steps: Steps, teacher: object, images: list[Frame], centres: object, pace: Pace, *_: object
    ):
        given.append(pace)
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "learn", stop)
    options = TrainInt8Options(
        "mobilenet0.25",
        CalibrationOptions("demo", images=8, recipe=recipe),
        tmp_path / "q.pth",
        held_out=8,
        size_hw=(96, 128),
        updates=7,
        lr=0.5,
    )
    with pytest.raises(KeyboardInterrupt):
        train_int8.train_int8(options)
    assert given == [Pace(7, 8, 0.5)]
    assert list(tmp_path.iterdir()) == [recipe]

    monkeypatch.setattr(distillation, "learn", lambda graph, steps, *_: (graph, steps))
    result = train_int8.train_int8(options)
    assert result.before.recall == result.after.recall
    assert result.int8_share == pytest.approx(0.9825, abs=0.001)
    learned = load_learned(str(options.out))
    assert learned is not None
    assert len(learned.steps) == 47
    assert mac_shares(with_steps(build_heads(load_model(options.out), (96, 128)), learned.steps), (96, 128))[
        "int8"
    ] == pytest.approx(result.int8_share)
    recipe.write_text(json.dumps({"float_layers": ["Conv"]}))
    with pytest.raises(ModelFileError, match="nothing is left in INT8"):
        train_int8.train_int8(options)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "q.onnx"], "ends in .pth"),
        (["--updates", "0"], "--updates 0: give a number from 1 on"),
        (["--batch", "0"], "--batch 0"),
        (["--lr", "0"], "--lr 0: give a number over 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--held-out", "3"], "--held-out 3"),
        (["--size", "100x100"], "multiple of 32"),
        (["--images", "3"], "--images 3"),
        (["--int8-recipe", "nowhere.json"], "nowhere.json"),
    ],
)
def test_impossible_settings_are_refused(words: list[str], said: str, error_line: Callable[..., str]) -> None:
    assert said in error_line(train_int8.main, "--calib", "demo", *words)


def test_outputs_are_looked_at_first(tmp_path: Path, shared_cache: None) -> None:
    options = TrainInt8Options("mobilenet0.25", CalibrationOptions("demo", images=8), tmp_path / "no" / "q.pth")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        train_int8.train_int8(dataclasses.replace(options, out=tmp_path / "file" / "q.pth"))
    assert "calibrated" in str(train_int8.TrainedInt8(0.5, 8, 8, train_int8.Agreement(), train_int8.Agreement()))
