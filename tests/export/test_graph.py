"""Detector graphs: decoding and NMS in operators against the reference, on heads no network would dare to give; and the
steps from a model to its graphs, and what they leave as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnxruntime
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.graph import build_heads, build_plugin_form, build_portable, check_graph, export_network, finished
from export.quantize import lint_qdq, to_fp16, to_int8
from facespec.boxes import Decoded, decode_detections, make_priors
from facespec.errors import ModelFileError, SpecError
from facespec.spec import SPEC_KEY, AnchorSpec, DecodeSpec, ModelSpec
from trainer import load_model
from trainer.model import MergedHeads, RetinaFace
from trt_runtime.kernels import PLUGIN
from trt_runtime.onnx_graph import (
    HEAD_NAMES,
    IR_VERSION,
    OPSET,
    GraphBuilder,
    add_decode_nms,
    add_preprocessing,
    detector_outputs,
)

Heads = list[NDArray[np.float32]]
Run = Callable[[Heads], dict[str, NDArray[np.float32]]]


@cache
def tail(decode: DecodeSpec, size_hw: tuple[int, int] | None) -> Run:
    """Return a runner of a graph that holds decoding and NMS alone."""
    g = GraphBuilder()
    add_decode_nms(g, HEAD_NAMES, ModelSpec(decode=decode), size_hw)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 32, None, None]) for name in HEAD_NAMES]
    outputs = detector_outputs(ModelSpec(decode=decode))
    graph = helper.make_graph(g.nodes, "tail", inputs, outputs, g.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda heads: dict(
        zip(
            decode.outputs,
            session.run(list(decode.outputs), dict(zip(HEAD_NAMES, heads, strict=True))),
            strict=True,
        )
    )


def random_heads(seed: int, batch: int, size_hw: tuple[int, int], rate: float = 0.2, levels: int = 0) -> Heads:
    """Merged maps with a share of about `rate` of face-like priors; `levels` > 0 makes ties."""
    rng = np.random.default_rng(seed)
    heads = []
    for stride in (8, 16, 32):
        shape = (batch, 32, size_hw[0] // stride, size_hw[1] // stride)
        head = rng.normal(0, 1, shape).astype(np.float32)
        face = np.where(rng.random((batch, 2, *shape[2:])) < rate, 2, -4)
        logits = rng.normal(0, 1, (batch, 4, *shape[2:]))
        logits[:, 1::2] += face
        head[:, :4] = np.round(logits * levels) / levels if levels else logits
        heads.append(head)
    return heads


def reference(heads: Heads, image: int, decode: DecodeSpec, size_hw: tuple[int, int]) -> Decoded:
    """The reference on one image; maps are taken apart by plain indexing, prior by prior."""
    boxes, logits, landmarks = [], [], []
    for head in heads:
        for row in range(head.shape[2]):
            for column in range(head.shape[3]):
                cell = head[image, :, row, column]
                for anchor in range(2):
                    logits.append(cell[2 * anchor : 2 * anchor + 2])
                    boxes.append(cell[4 + 4 * anchor : 8 + 4 * anchor])
                    landmarks.append(cell[12 + 10 * anchor : 22 + 10 * anchor])
    priors = make_priors(ModelSpec().anchors, size_hw)
    return decode_detections(np.array(boxes), np.array(logits), np.array(landmarks), priors, decode)


def check(
    found: dict[str, NDArray[np.float32]], heads: Heads, decode: DecodeSpec, size_hw: tuple[int, int]
) -> list[int]:
    """Compare every batch slot with the reference; return the numbers of faces."""
    counts = []
    for image in range(len(heads[0])):
        expected = reference(heads, image, decode, size_hw)
        count = int(found["num_detections"][image])
        assert found["num_candidates"][image] == expected.num_candidates
        assert count == len(expected.scores)
        np.testing.assert_allclose(found["boxes"][image, :count], expected.boxes, atol=1e-3)
        np.testing.assert_allclose(found["scores"][image, :count], expected.scores, atol=1e-6)
        np.testing.assert_allclose(found["landmarks"][image, :count], expected.landmarks, atol=1e-3)
        for name in ("boxes", "scores", "landmarks"):
            assert not found[name][image, count:].any()
        counts.append(count)
    return counts


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 4),
    size_hw=st.sampled_from([(32, 32), (64, 160), (160, 96)]),
    rate=st.sampled_from([0.0, 0.02, 0.3]),
    levels=st.sampled_from([0, 1, 2]),
    dynamic=st.booleans(),
    decode=st.sampled_from([DecodeSpec(), DecodeSpec(top_k=9, max_detections=4), DecodeSpec(score_threshold=0.6)]),
)
def test_equals_the_reference_in_every_slot(
    seed: int, batch: int, size_hw: tuple[int, int], rate: float, levels: int, dynamic: bool, decode: DecodeSpec
) -> None:
    heads = random_heads(seed, batch, size_hw, rate, levels)
    found = tail(decode, None if dynamic else size_hw)(heads)
    assert found["boxes"].shape == (batch, decode.max_detections, 4)
    assert found["landmarks"].shape == (batch, decode.max_detections, 5, 2)
    check(found, heads, decode, size_hw)


def test_slots_of_very_different_content() -> None:
    """No face, a few, a broken image, every prior a face: side by side in one batch."""
    size_hw, decode = (96, 128), DecodeSpec()
    parts = [random_heads(index, 1, size_hw, rate) for index, rate in enumerate((0, 0.01, 0.1, 1))]
    parts[0][0][:, 1] = parts[0][1][:, 1] = -50
    for head in parts[0]:
        head[:, [1, 3]] = -50
    parts[2][1][0, 20, 1, 1] = np.nan
    heads = [np.concatenate([part[level] for part in parts]) for level in range(3)]
    found = tail(decode, None)(heads)
    counts = check(found, heads, decode, size_hw)
    assert found["num_candidates"].tolist()[::2] == [0, -1]
    assert counts[0] == counts[2] == 0
    assert min(counts[1], counts[3]) > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel", [0, 3, 5, 31])
@pytest.mark.parametrize("level", [0, 2])
def test_a_value_that_is_not_finite_is_reported_wherever_it_stands(value: float, channel: int, level: int) -> None:
    heads = random_heads(1, 2, (64, 64))
    heads[level][1, channel, -1, -1] = value
    found = tail(DecodeSpec(), None)(heads)
    assert found["num_candidates"][1] == -1
    assert found["num_detections"].tolist()[1] == 0
    assert found["num_detections"][0] > 0


def test_a_crowd_of_700() -> None:
    """700 small faces that do not overlap are all found; with a lower limit the best ones are kept and it shows."""
    size_hw = (640, 640)
    heads = random_heads(2, 1, size_hw, rate=0)
    for head in heads:
        head[:, :4] = np.array([5, -5, 5, -5], np.float32)[None, :, None, None]
    cells = np.random.default_rng(0).permutation(np.argwhere(np.indices((80, 80)).sum(axis=0) % 2 == 0))[:700]
    rows, columns = cells.T
    heads[0][0, 1, rows, columns] = np.linspace(3, 9, 700)
    heads[0][0, 4:8] = np.array([0, 0, *[np.log(6 / 16) / 0.2] * 2], np.float32)[:, None, None]
    assert check(tail(DecodeSpec(), size_hw)(heads), heads, DecodeSpec(), size_hw) == [700]
    for decode in (DecodeSpec(max_detections=100), DecodeSpec(top_k=300)):
        found = tail(decode, size_hw)(heads)
        assert check(found, heads, decode, size_hw) == [min(decode.max_detections, decode.top_k)]
        assert found["num_candidates"] == 700


def test_a_higher_threshold_gives_a_prefix() -> None:
    heads = random_heads(4, 1, (160, 160))
    low, high = (tail(DecodeSpec(score_threshold=score), None)(heads) for score in (0.02, 0.7))
    count = int(high["num_detections"][0])
    assert 0 < count < low["num_detections"][0]
    for name in ("boxes", "scores", "landmarks"):
        np.testing.assert_array_equal(low[name][0, :count], high[name][0, :count])
    assert (low["scores"][0, count:] < 0.7).all()


def test_a_score_on_the_threshold_counts() -> None:
    """Logits that are equal are a score of exactly 0.5."""
    heads = [np.zeros((1, 32, side, side), np.float32) for side in (8, 4, 2)]
    for score, candidates in ((0.5, 2 * (64 + 16 + 4)), (0.5000001, 0)):
        decode = DecodeSpec(score_threshold=score)
        found = tail(decode, None)(heads)
        assert found["num_candidates"].tolist() == [candidates]
        check(found, heads, decode, (64, 64))


def test_results_are_identical_from_run_to_run() -> None:
    heads = random_heads(6, 2, (160, 160), levels=1)
    first = tail(DecodeSpec(), None)(heads)
    for _ in range(5):
        for name, value in tail(DecodeSpec(), None)(heads).items():
            np.testing.assert_array_equal(value, first[name])


def test_preprocessing_is_bgr_minus_the_mean() -> None:
    g = GraphBuilder()
    name = add_preprocessing(g, "images", ModelSpec())
    inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, ["b", None, None, 3])]
    graph = helper.make_graph(
        g.nodes, "pre", inputs, [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)], g.initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    (found,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"images": images}
    )
    np.testing.assert_array_equal(found, images.transpose(0, 3, 1, 2) - np.reshape([104.0, 117, 123], (1, 3, 1, 1)))


SIZE = (64, 96)


def test_merged_heads_are_the_heads_side_by_side() -> None:
    model = load_model()
    pixels = torch.from_numpy(np.random.default_rng(0).normal(0, 50, (2, 3, *SIZE)).astype(np.float32))
    with torch.inference_mode():
        merged = MergedHeads(model).eval()(pixels)
        features = model.features(pixels)
        for index, (found, feature) in enumerate(zip(merged, features, strict=True)):
            heads = (model.ClassHead[index], model.BboxHead[index], model.LandmarkHead[index])
            parts = [head.get_submodule("conv1x1")(feature) for head in heads]
            torch.testing.assert_close(found, torch.cat(parts, dim=1))
            assert found.shape == (2, 32, SIZE[0] // (8 << index), SIZE[1] // (8 << index))


def test_exporting_leaves_the_model_as_it_was() -> None:
    """A model that is being trained goes on in training, and is exported as it will be used."""
    model = load_model()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = export_network(model, SIZE)
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.state_dict().keys() == before.keys()
    model.eval()
    pixels = np.random.default_rng(0).normal(0, 50, (3, 3, *SIZE)).astype(np.float32)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = MergedHeads(model)(torch.from_numpy(pixels))
    for found, right in zip(session.run(list(HEAD_NAMES), {"input": pixels}), expected, strict=True):
        np.testing.assert_allclose(found, right.numpy(), atol=1e-3)


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    return build_heads(load_model(), SIZE)


def test_a_heads_graph(small: onnx.ModelProto) -> None:
    assert [output.name for output in small.graph.output] == list(HEAD_NAMES) == ["head_8", "head_16", "head_32"]
    assert ModelSpec.from_json(small.metadata_props[0].value) == load_model().spec
    assert small.metadata_props[0].key == SPEC_KEY
    assert (small.opset_import[0].version, OPSET) == (19, 19)
    assert (small.ir_version, IR_VERSION) == (9, 9)  # what runtimes of some years take
    (images,) = small.graph.input
    assert images.type.tensor_type.elem_type == TensorProto.UINT8
    dims = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert dims == ["batch", 64, 96, 3]


@pytest.mark.parametrize("half", [False, True])
def test_both_forms_are_built_on_copies(small: onnx.ModelProto, half: bool) -> None:
    """And decode in float32, whatever the network computes in."""
    heads = to_fp16(small) if half else small
    before = heads.SerializeToString()
    spec = load_model().spec
    portable, plugin = build_portable(heads, spec, SIZE), build_plugin_form(heads, spec, SIZE)
    channels_last = build_plugin_form(heads, spec, SIZE, channels_last=True)
    assert heads.SerializeToString() == before
    names = list(spec.decode.outputs)
    for graph in (portable, plugin):
        assert [output.name for output in graph.graph.output] == names
        assert graph.metadata_props[0].key == SPEC_KEY
        kinds = {output.name: output.type.tensor_type.elem_type for output in graph.graph.output}
        assert {kinds[name] for name in ("boxes", "scores", "landmarks")} == {TensorProto.FLOAT}
        assert {kinds[name] for name in ("num_detections", "num_candidates")} == {TensorProto.INT32}
    casts = [node for node in portable.graph.node if node.op_type == "Cast" and node.input[0] in HEAD_NAMES]
    assert len(casts) == (3 if half else 0)
    node = plugin.graph.node[-1]
    assert (node.op_type, node.domain, node.name) == (PLUGIN.name, PLUGIN.domain, PLUGIN.node)
    assert list(node.input) == list(HEAD_NAMES)
    assert list(node.output) == names
    values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    assert values["strides"] == [8, 16, 32]
    assert values["min_sizes"] == [16, 32, 64, 128, 256, 512]
    assert values["variances"] == pytest.approx([0.1, 0.2])
    assert values["logit_threshold"] == pytest.approx(np.log(0.02 / 0.98))
    assert values["iou_threshold"] == pytest.approx(0.4)
    assert (values["top_k"], values["max_detections"]) == (5000, 750)
    assert (values["plugin_version"], values["plugin_namespace"]) == (
        PLUGIN.version.encode(),
        PLUGIN.namespace.encode(),
    )
    assert {item.domain: item.version for item in plugin.opset_import} == {"": 19, PLUGIN.domain: 1}
    # the same plugin on transposed maps
    assert values["channels_last"] == 0
    *_, first, second, third, other = channels_last.graph.node
    for transpose, head in zip((first, second, third), HEAD_NAMES, strict=True):
        assert (transpose.op_type, list(transpose.input)) == ("Transpose", [head])
        assert helper.get_attribute_value(transpose.attribute[0]) == [0, 2, 3, 1]
    assert list(other.input) == [node.output[0] for node in (first, second, third)]
    assert {item.name: helper.get_attribute_value(item) for item in other.attribute} == {**values, "channels_last": 1}


TENSORRT_10 = {
    "Add": "FLOAT FLOAT16",
    "Cast": "FLOAT FLOAT16 UINT8",
    "Concat": "FLOAT FLOAT16",
    "Constant": "FLOAT FLOAT16",
    "Conv": "FLOAT FLOAT16",
    "DequantizeLinear": "INT8",
    "LeakyRelu": "FLOAT FLOAT16",
    "MaxPool": "FLOAT FLOAT16",
    "QuantizeLinear": "FLOAT FLOAT16",
    "Relu": "FLOAT FLOAT16",
    "Resize": "FLOAT FLOAT16",
    "Sub": "FLOAT FLOAT16",
    "Transpose": "FLOAT FLOAT16",
}
"""What the parser of TensorRT 10.0 to 10.3 takes of opsets 9 to 20, and with which type of the first input: of
docs/operators.md in onnx/onnx-tensorrt, branches 10.0-GA and 10.1-GA, those that our graphs have."""


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "resnet18"])
def test_the_parser_of_tensorrt_10_takes_the_plugin_forms(
    kind: str, channels_last: bool, small: onnx.ModelProto, request: pytest.FixtureRequest
) -> None:
    if kind == "int8":
        small = to_int8(request.getfixturevalue("heads"), request.getfixturevalue("calibrated").ranges)
        assert lint_qdq(small) == []  # zero points are 0
    if kind == "resnet18":
        small = build_heads(RetinaFace(ModelSpec(backbone="resnet18")).eval(), SIZE)
    small = to_fp16(small) if kind in ("fp16", "int8") else small
    form = onnx.shape_inference.infer_shapes(build_plugin_form(small, ModelSpec(), None, channels_last))
    assert 9 <= {item.domain: item.version for item in form.opset_import}[""] <= 20
    types = {item.name: item.type.tensor_type.elem_type for item in [*form.graph.value_info, *form.graph.input]}
    types.update({item.name: item.data_type for item in form.graph.initializer})
    for node in form.graph.node:
        if node.domain == PLUGIN.domain:
            continue
        if node.op_type != "Constant":
            assert TensorProto.DataType.Name(types[node.input[0]]) in TENSORRT_10[node.op_type].split(), node
        given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Resize":
            modes = [given[name] for name in ("coordinate_transformation_mode", "mode", "nearest_mode")]
            assert modes == [b"asymmetric", b"nearest", b"floor"]
        if node.op_type == "MaxPool":
            assert len(node.output) == 1
            assert set(given.get("dilations", [1])) == {1}


def test_what_the_plugin_cannot_do_is_refused(small: onnx.ModelProto) -> None:
    strides, sizes = (4, 8, 16, 32, 64), tuple((16, 32) for _ in range(5))
    spec = dataclasses.replace(load_model().spec, anchors=AnchorSpec(strides=strides, min_sizes=sizes))
    with pytest.raises(SpecError, match="up to 4 levels"):
        build_plugin_form(small, spec, None)


def test_a_graph_at_fault_is_refused(small: onnx.ModelProto) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(small)
    broken.graph.node[-1].input[0] = "nowhere"
    with pytest.raises(ModelFileError, match="the exported graph does not pass the ONNX checker"):
        check_graph(broken)
    # what only shape inference sees
    broken.CopyFrom(small)
    broken.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    with pytest.raises(ModelFileError, match="does not pass the ONNX checker"):
        check_graph(broken)
    other = dataclasses.replace(load_model().spec, weights_sha256="f" * 64)
    assert ModelSpec.from_json(finished(small, other).metadata_props[0].value) == other
