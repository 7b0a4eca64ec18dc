"""FP16 and INT8 as transformations of graphs, and what INT8 is calibrated on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from export import calibration as calibration_module
from export import to_onnx, to_trt
from export.calibration import Calibration, calibrate, load_inputs, with_precision
from export.graph import build_heads, build_portable
from export.inspect import inspect
from export.options import CalibrationOptions, Int8Recipe, find_calibration_images, load_recipe
from export.quantize import (
    conv_inputs,
    convolutions,
    equalize,
    lint_qdq,
    mac_shares,
    stored_steps,
    to_fp16,
    to_int8,
)
from export.to_trt import EngineOptions, Profile, build_engine
from facespec.errors import DataError, ModelFileError, SpecError
from facespec.images import write_image
from facespec.letterbox import Frame
from facespec.samples import sample_crops
from facespec.spec import ModelSpec
from trainer import load_model
from trt_runtime.gpu.flavor import RTX
from trt_runtime.gpu.sidecar import read_header, read_sidecar

SIZE = (320, 320)
DEMO = CalibrationOptions("demo", images=16)
needs_rtx = pytest.mark.skipif(not RTX.installed(), reason="TensorRT-RTX is not installed (Linux on x86_64 only)")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "retinaface-trt" / "calibration"


def _run(graph: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(output, np.float32) for output in session.run(None, {"images": images})]


def _pixels(seed: int = 3) -> np.ndarray:
    names, pixels, skipped = load_inputs(CalibrationOptions("demo", images=8, seed=seed), SIZE, ModelSpec())
    assert len(names) == 8
    assert not skipped
    return np.stack(pixels)


def test_calibration_sees_the_largest_number(cache: Path) -> None:
    """Against the activations of the same images in one batch."""
    size = (96, 128)
    heads = build_heads(load_model(), size)
    demo = CalibrationOptions("demo", images=8)
    found = calibrate(heads, demo, size, ModelSpec())
    assert set(found.ranges) == set(conv_inputs(heads))
    _, pixels, _ = load_inputs(demo, size, ModelSpec())
    probe = onnx.ModelProto()
    probe.CopyFrom(heads)
    name = conv_inputs(heads)[7]
    probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    expected = np.abs(_run(probe, np.stack(pixels))[-1]).max(axis=(0, 2, 3))
    np.testing.assert_allclose(found.ranges[name], expected, rtol=1e-5)
    # the same images of another seed are others; the same again come from the cache
    assert not found.cached
    again = calibrate(heads, demo, size, ModelSpec())
    assert again.cached
    assert (again.with_faces, again.images) == (found.with_faces, found.images)
    assert all((again.ranges[key] == values).all() for key, values in found.ranges.items())
    (first,) = cache.iterdir()
    assert not calibrate(heads, CalibrationOptions("demo", images=8, seed=1), size, ModelSpec()).cached
    whole = first.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"rubbish"):
        first.write_bytes(damaged)
        assert not calibrate(heads, demo, size, ModelSpec()).cached
    first.write_bytes(b"rubbish")
    assert len(calibrate(heads, demo, size, ModelSpec()).ranges) == len(found.ranges)


def test_equalisation_changes_nothing_but_ranges(
    heads: onnx.ModelProto, calibrated: Calibration, shared_cache: None
) -> None:
    ranges = calibrated.ranges
    graph, evened = equalize(heads, ranges)
    images = _pixels()
    for before, after in zip(_run(heads, images), _run(graph, images), strict=True):
        np.testing.assert_allclose(after, before, atol=2e-4)
    # the ranges it promises are the ones the new graph has
    seen = calibrate(graph, DEMO, SIZE, ModelSpec()).ranges
    spread = {}
    for name, values in evened.items():
        np.testing.assert_allclose(seen[name], values, rtol=2e-3, atol=1e-4)
        spread[name] = (ranges[name].max() / np.median(ranges[name]), values.max() / np.median(values))
    changed = [name for name in ranges if not np.array_equal(ranges[name], evened[name])]
    assert len(changed) > 25
    before, after = (np.array([spread[name][side] for name in changed]) for side in (0, 1))
    assert (after < 1.001).sum() >= 10  # in front of depthwise convolutions all channels fill the range
    assert after.mean() < 0.7 * before.mean()


def test_int8_graph(heads: onnx.ModelProto, calibrated: Calibration) -> None:
    ranges = calibrated.ranges
    graph = to_int8(heads, ranges)
    onnx.checker.check_model(graph, full_check=True)
    assert lint_qdq(graph) == []
    shares = mac_shares(graph, SIZE)
    assert shares == pytest.approx({"int8": 0.880, "fp32": 0.120}, abs=0.001)
    assert mac_shares(to_fp16(graph), SIZE) == pytest.approx({"int8": 0.880, "fp16": 0.120}, abs=0.001)
    assert mac_shares(to_int8(heads, ranges, Int8Recipe(float_depthwise=False, float_layers=())), SIZE) == {"int8": 1.0}
    weights = [
        tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims
    ]
    assert all(np.abs(numpy_helper.to_array(tensor).astype(int)).max() <= 127 for tensor in weights)
    # scales are as exact in float16, which the graph gets in the end
    for tensor in graph.graph.initializer:
        if tensor.name.endswith("_scale"):
            scale = numpy_helper.to_array(tensor)
            assert np.array_equal(scale.astype(np.float16).astype(np.float32), scale)

    # the recipe is worth what it costs: closer to float than without
    images = _pixels()
    reference = _run(heads, images)

    def error(candidate: onnx.ModelProto) -> float:
        return float(
            np.mean([np.square(a - b).mean() for a, b in zip(reference, _run(candidate, images), strict=True)])
        )

    plain = error(to_int8(heads, ranges, Int8Recipe(equalize=False, float_depthwise=False, float_layers=())))
    evened = error(to_int8(heads, ranges, Int8Recipe(float_depthwise=False, float_layers=())))
    assert error(graph) < evened < plain / 2
    with pytest.raises(ModelFileError, match="calibrate again"):
        to_int8(heads, dict(list(ranges.items())[1:]))


def test_channels_that_are_silent_do_not_explode(heads: onnx.ModelProto, calibrated: Calibration) -> None:
    ranges = {name: values.copy() for name, values in calibrated.ranges.items()}
    for values in ranges.values():
        values[len(values) // 2] = 0  # as of a ReLU that no calibration image ever opens

    def largest(graph: onnx.ModelProto) -> float:
        tensors = (numpy_helper.to_array(tensor) for tensor in graph.graph.initializer if len(tensor.dims) == 4)
        return max(float(np.abs(values).max()) for values in tensors)

    evened, _ = equalize(heads, ranges)
    assert largest(evened) < 1000 * largest(heads)
    assert lint_qdq(to_fp16(to_int8(heads, ranges))) == []


def test_scales_cut_nothing_off_and_waste_nothing(heads: onnx.ModelProto, calibrated: Calibration) -> None:
    """Of activations and, channel by channel, of weights; the weights come back to half a step."""
    recipe = Int8Recipe(equalize=False, float_depthwise=False, float_layers=())
    graph = to_int8(heads, calibrated.ranges, recipe)
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in heads.graph.initializer}
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    convs = [node for node in heads.graph.node if node.op_type == "Conv"]
    assert len(convs) == 50
    for node in convs:
        weight, bias = before[node.input[1]], node.input[2]
        steps, whole = after[f"{node.input[1]}_scale"], after[f"{node.input[1]}_q"]
        largest = np.abs(weight).max(axis=(1, 2, 3))
        assert (127 * steps >= largest * (1 - 1e-6)).all()
        heard = largest > 1e-3
        assert (np.abs(whole.astype(int)).max(axis=(1, 2, 3))[heard] >= 126).all()
        assert (np.abs(whole * steps.reshape(-1, 1, 1, 1) - weight) <= 0.501 * steps.reshape(-1, 1, 1, 1)).all()
        np.testing.assert_array_equal(after[bias], before[bias])
        scale, most = float(after[f"{node.input[0]}_scale"]), float(calibrated.ranges[node.input[0]].max())
        assert most * (1 - 1e-6) <= 127 * scale <= most * 1.002
    # what several convolutions read is quantised once
    quantised = [node.input[0] for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(quantised) == sorted({node.input[0] for node in convs})


def test_a_portable_graph_keeps_its_int8(heads: onnx.ModelProto, calibrated: Calibration) -> None:
    """It is simplified: that must neither fold weights back to floats nor drop a pair that changes what is computed."""
    quantised = to_fp16(to_int8(heads, calibrated.ranges))
    portable = build_portable(quantised, ModelSpec(), SIZE)
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        before, after = (
            sorted(tuple(node.output) for node in graph.graph.node if node.op_type == kind)
            for graph in (quantised, portable)
        )
        assert after == before
    assert convolutions(portable, SIZE) == convolutions(quantised, SIZE)
    assert lint_qdq(portable) == []


def test_scales_that_float16_can_hold() -> None:
    values = np.array([0, 1e-9, 3e-6, 0.1, 1 / 3, 2.0009765, 100.03], np.float32)
    found = stored_steps(values)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.astype(np.float16).astype(np.float32), found)
    assert (found >= values).all()
    assert (found[3:] <= values[3:] * (1 + 2**-9)).all()
    assert found[:2].tolist() == [16 * 2.0**-24] * 2  # silent channels keep a scale of some digits


def _layers(*nodes: onnx.NodeProto, outputs: list[str], **weights: np.ndarray) -> onnx.ModelProto:
    """A graph from float pixels `images` (B, H, W, 3), as planes `x`, through some nodes."""
    planes = onnx.helper.make_node("Transpose", ["images"], ["x"], perm=[0, 3, 1, 2])
    pixels = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["b", "h", "w", 3])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = onnx.helper.make_graph([planes, *nodes], "layers", [pixels], ends, tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)


def _node(kind: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return onnx.helper.make_node(kind, inputs.split(), [output], name=f"node_{output}", **attributes)


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", None])
@pytest.mark.parametrize("depthwise", [False, True])
def test_equalisation_by_hand(depthwise: bool, activation: str | None) -> None:
    """One convolution feeds another: the scales are those of the docstring, with two readers and a quiet channel."""
    rng = np.random.default_rng(0)
    first, bias, second = rng.normal(size=(4, 3, 1, 1)), rng.normal(size=4), rng.normal(size=(4, 4, 1, 1))
    third = rng.normal(size=(2, 4, 1, 1)) * 3
    second = second[:, :1] if depthwise else second
    more = {"group": 4} if depthwise else {}
    middle = [_node("Conv", "x w1 b1", "p" if activation else "a")]
    middle += [_node(activation, "p", "a")] if activation else []
    nodes = [*middle, _node("Conv", "a w2", "y", **more)]
    weights = {"w1": first, "b1": bias, "w2": second}
    if not depthwise:
        nodes.append(_node("Conv", "a w3", "z"))
        weights["w3"] = third
    graph = _layers(*nodes, outputs=["y"] if depthwise else ["y", "z"], **weights)
    ranges = {"x": np.array([1, 2, 3], np.float32), "a": np.array([8, 2, 1, 1e-5], np.float32)}
    found, evened = equalize(graph, ranges)
    loud = np.array([8, 2, 1, 8e-3])  # a thousandth of the greatest at least
    met = np.maximum(np.abs(second).max(axis=(0, 2, 3)), np.abs(third).max(axis=(0, 2, 3))) if not depthwise else None
    scale = loud if met is None else np.sqrt(loud / met)
    scale = scale / scale.prod() ** 0.25
    np.testing.assert_allclose(evened["a"], ranges["a"] / scale, rtol=1e-5)
    np.testing.assert_array_equal(evened["x"], ranges["x"])
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    np.testing.assert_allclose(after["w1"], first / scale.reshape(4, 1, 1, 1), rtol=1e-5)
    np.testing.assert_allclose(after["b1"], bias / scale, rtol=1e-5)
    turned = (4, 1, 1, 1) if depthwise else (1, 4, 1, 1)
    np.testing.assert_allclose(after["w2"], second * scale.reshape(turned), rtol=1e-5)
    if not depthwise:
        np.testing.assert_allclose(after["w3"], third * scale.reshape(turned), rtol=1e-5)
    np.testing.assert_array_equal(numpy_helper.to_array(graph.graph.initializer[0]), first.astype(np.float32))


@pytest.mark.parametrize("use", ["output", "output before", "added", "added before", "as a weight"])
def test_what_others_read_is_not_equalised(use: str) -> None:
    """Its size would change for them."""
    rng = np.random.default_rng(0)
    nodes = [_node("Conv", "x w1", "p"), _node("Relu", "p", "a"), _node("Conv", "a w2", "y")]
    nodes += [_node("Add", "a y", "s")] if use == "added" else []
    nodes += [_node("Add", "p y", "s")] if use == "added before" else []
    nodes += [_node("Conv", "x a", "s")] if use == "as a weight" else []
    outputs = {"output": ["y", "a"], "output before": ["y", "p"]}.get(use, ["y", "s"])
    graph = _layers(*nodes, outputs=outputs, w1=rng.normal(size=(4, 3, 1, 1)), w2=rng.normal(size=(4, 4, 1, 1)))
    ranges = {"x": np.ones(3, np.float32), "a": np.array([8, 2, 1, 0.5], np.float32)}
    found, evened = equalize(graph, ranges)
    assert found == graph
    assert evened["a"].tolist() == [8, 2, 1, 0.5]


def test_multiply_accumulates_by_hand() -> None:
    nodes = [
        _node("Conv", "x w1", "a", strides=[2, 2], pads=[1, 1, 1, 1]),
        _node("Conv", "a w2", "y", group=8, pads=[1, 1, 1, 1]),
    ]
    graph = _layers(*nodes, outputs=["y"], w1=np.ones((8, 3, 3, 3)), w2=np.ones((8, 1, 3, 3)))
    expected = {"node_a": 27 * 8 * 32 * 48, "node_y": 9 * 8 * 32 * 48}
    assert convolutions(graph, (64, 96)) == {name: (macs, "fp32") for name, macs in expected.items()}
    assert sum(macs for macs, _ in convolutions(graph, (128, 96)).values()) == 36 * 8 * 64 * 48
    ranges = {"x": np.ones(3, np.float32), "a": np.ones(8, np.float32)}
    mixed = to_int8(graph, ranges)  # the default recipe leaves the depthwise one in float
    assert convolutions(mixed, (64, 96)) == {
        "node_a": (expected["node_a"], "int8"),
        "node_y": (expected["node_y"], "fp32"),
    }
    assert mac_shares(mixed, (64, 96)) == {"int8": 0.75, "fp32": 0.25}
    # weights alone in INT8 are no INT8 arithmetic
    conv = next(node for node in mixed.graph.node if node.name == "node_a")
    conv.input[0] = "x"
    assert convolutions(mixed, (64, 96))["node_a"][1] == "fp32"
    # nodes without names, or with the same, go by their outputs
    for node in graph.graph.node:
        node.name = "" if node.op_type == "Conv" else node.name
    assert list(convolutions(graph, (64, 96))) == ["a", "y"]


def test_fp16_leaves_what_must_stay(heads: onnx.ModelProto) -> None:
    """The graph it is given, and the scales of Resize; everything else, the outputs too, is float16."""
    before = heads.SerializeToString()
    half = to_fp16(heads)
    assert heads.SerializeToString() == before
    onnx.checker.check_model(half, full_check=True)
    scales = {node.input[2] for node in half.graph.node if node.op_type == "Resize"}
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    for node in half.graph.node:
        if node.op_type == "Constant":
            kinds[node.output[0]] = node.attribute[0].t.data_type
    assert scales
    assert {kinds.pop(name) for name in scales} == {onnx.TensorProto.FLOAT}
    assert onnx.TensorProto.FLOAT not in kinds.values()
    assert [item.type.tensor_type.elem_type for item in half.graph.output] == [onnx.TensorProto.FLOAT16] * 3
    for mine, theirs in zip(_run(half, _pixels()), _run(heads, _pixels()), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=0.5)


def test_inspect_lints(heads: onnx.ModelProto, calibrated: Calibration, tmp_path: Path) -> None:
    graph = to_int8(heads, calibrated.ranges)
    quantize = next(node for node in graph.graph.node if node.op_type == "QuantizeLinear")
    del quantize.input[2]
    (tmp_path / "a.onnx").write_bytes(graph.SerializeToString())
    assert any("zero point is missing" in problem for problem in inspect(tmp_path / "a.onnx").problems)


def test_the_linter_knows_what_tensorrt_takes_wrongly(heads: onnx.ModelProto, calibrated: Calibration) -> None:
    good = to_int8(heads, calibrated.ranges)

    def broken(change: Callable[[onnx.ModelProto], None]) -> str:
        graph = onnx.ModelProto()
        graph.CopyFrom(good)
        change(graph)
        return " ".join(lint_qdq(graph))

    def tensor(graph: onnx.ModelProto, name: str) -> onnx.TensorProto:
        return next(item for item in graph.graph.initializer if item.name == name)

    quantize = next(node for node in good.graph.node if node.op_type == "QuantizeLinear")
    weight = next(node for node in good.graph.node if node.op_type == "DequantizeLinear" and node.attribute)
    conv = next(node for node in good.graph.node if node.op_type == "Conv" and node.input[0].endswith("_dq"))

    def node(graph: onnx.ModelProto, like: onnx.NodeProto) -> onnx.NodeProto:
        return next(item for item in graph.graph.node if item.name == like.name)

    def replace(name: str, array: np.ndarray) -> Callable[[onnx.ModelProto], None]:
        return lambda graph: tensor(graph, name).CopyFrom(numpy_helper.from_array(array, name))

    assert "missing" in broken(lambda graph: node(graph, quantize).input.pop())
    assert "not int8" in broken(replace(quantize.input[2], np.uint8(0)))
    assert "not 0" in broken(replace(quantize.input[2], np.int8(3)))
    for scale in (0.0, -1.0, np.nan, np.inf):
        assert "not positive" in broken(replace(quantize.input[1], np.float32(scale)))
    assert "opset 19" in broken(
        lambda graph: (
            replace(quantize.input[1], np.float16(0.1))(graph),
            setattr(graph.opset_import[0], "version", 18),
        )
    )
    assert "axis 0" in broken(lambda graph: setattr(node(graph, weight).attribute[0], "i", 1))
    assert "not a constant" in broken(lambda graph: node(graph, quantize).input.__setitem__(1, "computed"))
    assert "only one" in broken(lambda graph: node(graph, conv).input.__setitem__(1, conv.input[2]))
    assert "axis 0" in broken(replace(quantize.input[1], np.ones(8, np.float32)))
    assert "only one" in broken(lambda graph: node(graph, conv).input.__setitem__(0, quantize.input[0]))
    assert "bias" in broken(lambda graph: node(graph, conv).input.__setitem__(2, conv.input[1]))


def test_a_precision_that_is_not_held_fails(
    heads: onnx.ModelProto, calibrated: Calibration, shared_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec()
    with pytest.raises(SpecError, match="--calib"):
        with_precision(heads, "int8", None, SIZE, spec)
    with pytest.raises(SpecError, match="no such precision"):
        with_precision(heads, "fp8", None, SIZE, spec)
    assert with_precision(heads, "fp32", None, SIZE, spec) == (heads, None)
    # a transformation that does nothing, as a flag that is ignored would
    monkeypatch.setattr("export.calibration.to_fp16", lambda graph: graph)
    with pytest.raises(ModelFileError, match="fp16 was asked for"):
        with_precision(heads, "fp16", None, SIZE, spec)
    monkeypatch.setattr("export.calibration.to_int8", lambda graph, ranges, recipe: graph)
    with pytest.raises(ModelFileError, match="int8 was asked for"):
        with_precision(heads, "int8", DEMO, SIZE, spec)


def test_a_weight_too_large_for_fp16_is_named(heads: onnx.ModelProto) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(heads)
    weight = next(tensor for tensor in graph.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1e6, weight.name))
    with pytest.raises(ModelFileError, match="does not fit in fp16"):
        to_fp16(graph)


def _folder(path: Path, frames: list[Frame]) -> Path:
    for index, frame in enumerate(frames):
        write_image(path / f"{index:02d}.png", frame)
    return path


def test_wrong_calibration_data_is_named(
    heads: onnx.ModelProto,
    tmp_path: Path,
    cache: Path,
    error_line: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WIDERFACE_ROOT", raising=False)
    frames = [frame for _, frame in sample_crops(12, 0)]

    def message(source: object, *more: object) -> str:
        """Return what both exports say."""
        line = error_line(to_onnx.main, "--int8", "--calib", source, *more)
        assert error_line(to_trt.main, "--int8", "--calib", source, *more) == line
        return line

    def data_error(source: Path) -> str:
        with pytest.raises(DataError) as caught:
            calibrate(heads, CalibrationOptions(str(source)), SIZE, ModelSpec())
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "no images in" in message(tmp_path / "empty")
    assert "neither a folder" in message("widerface_vall")
    assert "--data or WIDERFACE_ROOT" in message("widerface_val")
    assert "--images 3" in message("demo", "--images", 3)
    few = _folder(tmp_path / "few", frames[:7])
    assert "7 images are too few" in message(few, "--size", "64x64")  # found with the network exported
    assert "copies" in data_error(_folder(tmp_path / "copies", frames[:1] * 12))
    flat = [np.full((320, 320, 3), 20 * level, np.uint8) for level in range(12)]
    assert "no face on any of the 12" in data_error(_folder(tmp_path / "flat", flat))
    damaged = _folder(tmp_path / "damaged", frames)
    for index in range(4):
        (damaged / f"{index:02d}.png").write_bytes(b"no picture")
    assert "4 of 12 images cannot be read, as " in data_error(damaged)
    assert not [name for name in os.listdir(tmp_path) if "retinaface" in name]


def test_calibration_images_are_chosen_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _folder(tmp_path / "data" / "train" / "images" / "0--Event", [frame for _, frame in sample_crops(30, 0)])
    (folder / "05.png").write_bytes(b"no picture")
    monkeypatch.setenv("WIDERFACE_ROOT", str(tmp_path / "data"))
    options = CalibrationOptions("widerface_train", images=20, seed=4)
    assert len(find_calibration_images(options)) == 30
    (tmp_path / "data" / "train").rename(tmp_path / "data" / "WIDER_train")  # as the official archive unpacks
    assert len(find_calibration_images(options)) == 30
    first, again = (load_inputs(options, SIZE, ModelSpec()) for _ in range(2))
    other = load_inputs(CalibrationOptions("widerface_train", images=20, seed=5), SIZE, ModelSpec())
    assert first[0] == again[0] != other[0]
    assert len(first[0]) + len(first[2]) == 20
    everything = load_inputs(CalibrationOptions("widerface_train", tmp_path / "data", 500), SIZE, ModelSpec())
    assert (len(everything[0]), len(everything[2])) == (29, 1)


def test_a_network_that_gives_nan_cannot_be_calibrated(heads: onnx.ModelProto, cache: Path) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(heads)
    weight = next(tensor for tensor in graph.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(weight), np.nan), weight.name))
    with pytest.raises(DataError, match="not finite"):
        calibrate(graph, DEMO, SIZE, ModelSpec())
    assert not cache.exists()


def test_a_recipe_from_a_file(tmp_path: Path, shared_cache: None) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"float_depthwise": false, "float_layers": ["/heads."]}')
    calibration = CalibrationOptions("demo", images=16, recipe=path)
    options = EngineOptions(
        "mobilenet0.25",
        tmp_path / "f.onnx",
        Profile((1, 1, 1), ((320, 320),) * 3),
        precision="int8",
        calibration=calibration,
        onnx_only=True,
    )
    build_engine(options)
    shares = inspect(options.out).precision
    assert set(shares) == {"int8", "fp16"}
    assert 0.97 < shares["int8"] < 1
    path.write_text('{"float_layers": ["/stage9/"]}')
    with pytest.raises(SpecError, match="no convolution of this network is named like '/stage9/'"):
        build_engine(options)
    assert f"--int8-recipe {path}" in options.command()


def test_recipes_go_through_files(tmp_path: Path, error_line: Callable[..., str]) -> None:
    path = tmp_path / "recipe.json"
    recipe = Int8Recipe(equalize=False, float_layers=("/stage1.0/",))
    path.write_text(recipe.to_json())
    assert load_recipe(path) == recipe
    path.write_text("{}")
    assert load_recipe(path) == Int8Recipe()
    for text in (
        "",
        "[]",
        '{"float_layer": []}',
        '{"float_layers": "x"}',
        '{"float_layers": [1]}',
        '{"equalize": 1}',
        '{"float_layers": [""]}',
    ):
        path.write_text(text)
        with pytest.raises(SpecError, match=r"recipe\.json"):
            load_recipe(path)
    for module in (to_trt, to_onnx):
        assert "recipe.json" in error_line(module.main, "--int8", "--calib", "demo", "--int8-recipe", path)
        wrong = error_line(module.main, "--int8", "--calib", "demo", "--int8-recipe", "missing.json")
        assert wrong == "missing.json: the recipe cannot be read (No such file or directory)"


@needs_rtx
def test_int8_engines(tmp_path: Path, shared_cache: None) -> None:
    profile = Profile((1, 1, 2), ((320, 320), (320, 320), (320, 640)))
    options = EngineOptions(
        "mobilenet0.25",
        tmp_path / "f.engine",
        profile,
        precision="int8",
        calibration=DEMO,
        flavor="rtx",
        capabilities=(86, 89, 120),
    )
    build_engine(options)
    names = (tmp_path / "f.engine.calibration.txt").read_text().splitlines()
    assert len(names) == 16
    sidecar = read_sidecar(options.out)
    assert sidecar.precision == "int8"
    assert read_header(options.out.read_bytes()).compute_capabilities == (86, 89, 120)
    recipe = json.loads(Int8Recipe().to_json())
    recipe["float_layers"].append("/body/stage1/stage1.0/stage1.0.0/Conv")  # RTX is left the first one in FP16
    assert sidecar.calibration == {"source": "demo", "images": 16, "seed": 0, "recipe": recipe}
    found = inspect(options.out)
    assert found.valid
    assert found.precision == pytest.approx({"int8": 0.857, "fp16": 0.143}, abs=0.001)
    assert inspect(options.plugin_form).precision == found.precision
    assert calibration_module.MIN_IMAGES == 8
