"""The steps from a model to its graphs, and what they leave as it was."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from export.graph import HEAD_NAMES, IR_VERSION, OPSET
from export.portable import (
    MergedHeads,
    build_heads,
    build_plugin_form,
    build_portable,
    check_graph,
    export_network,
    finished,
)
from export.quantize import to_fp16
from facespec.errors import ModelFileError, SpecError
from facespec.spec import SPEC_KEY, AnchorSpec, ModelSpec
from trainer import load_model
from trt_runtime.kernels import PLUGIN

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
