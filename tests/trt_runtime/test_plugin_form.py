"""The plugin form on the CPU: network in ONNX Runtime, the plugin's kernels on the host."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from facespec.errors import ModelFileError, NonFiniteError
from facespec.letterbox import Frame
from facespec.spec import ModelSpec
from trt_runtime import load_detector
from trt_runtime.onnx_file import read_onnx
from trt_runtime.plugin_form import cut_heads


def test_same_faces_as_the_portable_form(plugin_form: Path, dynamic_onnx: Path, crowd: Frame, astronaut: Frame) -> None:
    """Down to the floor of 0.02, on frames of several sizes in one batch."""
    plugin, portable = (load_detector(path, score_threshold=0.02) for path in (plugin_form, dynamic_onnx))
    assert plugin.spec == portable.spec
    frames = [crowd, astronaut, np.ascontiguousarray(crowd[::-1]), np.zeros((70, 333, 3), np.uint8), astronaut]
    for ours, theirs in zip(plugin.detect_batch(frames), portable.detect_batch(frames), strict=True):
        assert len(ours) == len(theirs)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-3)
        np.testing.assert_allclose(ours.landmarks, theirs.landmarks, atol=1e-3)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
    assert len(plugin.detect(crowd)) >= 3


def test_threads_share_a_detector(plugin_form: Path, crowd: Frame, astronaut: Frame) -> None:
    detector = load_detector(plugin_form)
    frames = [crowd, astronaut] * 20
    expected = [detector.detect(frame) for frame in frames[:2]]
    with ThreadPoolExecutor(4) as pool:
        for index, found in enumerate(pool.map(detector.detect, frames)):
            np.testing.assert_array_equal(found.boxes, expected[index % 2].boxes)


def test_a_network_that_gives_nan_raises(plugin_form: Path, tmp_path: Path, astronaut: Frame) -> None:
    model = onnx.load(plugin_form)
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(NonFiniteError):
        load_detector(tmp_path / "nan.onnx").detect(astronaut)


def test_graphs_that_are_not_plugin_forms_are_refused(
    plugin_form: Path, dynamic_onnx: Path, tmp_path: Path, astronaut: Frame
) -> None:
    nameless = onnx.load(dynamic_onnx)
    for node in nameless.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("head_", "h") for name in names]
    with pytest.raises(ModelFileError, match="cannot be told apart"):
        cut_heads(nameless.SerializeToString(), ModelSpec())
    model = onnx.load(plugin_form)
    assert read_onnx(plugin_form)[1].domains == {"", "trt.plugins"}
    model.graph.node[-1].op_type = "EfficientNMS_TRT"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ModelFileError, match=r"other\.onnx: expected one RetinaFaceDecodeNMS"):
        load_detector(tmp_path / "other.onnx")
    # the plugin does something else than the spec says
    model = onnx.load(plugin_form)
    spec = load_detector(plugin_form).spec
    other = dataclasses.replace(spec, anchors=dataclasses.replace(spec.anchors, strides=(4, 8, 16)))
    onnx.helper.set_model_props(model, {"retinaface.spec": other.to_json()})
    onnx.save(model, tmp_path / "anchors.onnx")
    with pytest.raises(ModelFileError, match="strides"):
        load_detector(tmp_path / "anchors.onnx")
    # they agree, and the network has maps of another size
    strides = next(item for item in model.graph.node[-1].attribute if item.name == "strides")
    strides.ints[:] = [4, 8, 16]
    onnx.save(model, tmp_path / "anchors.onnx")
    with pytest.raises(ModelFileError, match="at odds with the model's spec"):
        load_detector(tmp_path / "anchors.onnx").detect(astronaut)
    # bytes that protobuf cannot read, behind a header that can be read
    content = plugin_form.read_bytes()
    with pytest.raises(ModelFileError):
        cut_heads(content[: len(content) // 2], spec)
    for attribute in model.graph.node[-1].attribute:
        attribute.type = onnx.AttributeProto.GRAPH
    onnx.save(model, tmp_path / "types.onnx")
    with pytest.raises(ModelFileError, match="plugin_version is None"):
        load_detector(tmp_path / "types.onnx")
