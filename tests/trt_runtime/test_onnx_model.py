"""A model is opened once; the plugin form on the CPU: network in ONNX Runtime, the plugin's kernels on the host."""

from __future__ import annotations

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from facespec.errors import MissingPackageError, ModelFileError, NonFiniteError
from facespec.letterbox import Frame
from facespec.spec import ModelSpec
from tests.trt_runtime.spoilt import with_nan
from trt_runtime import load_detector, onnx_model
from trt_runtime.kernels import PLUGIN
from trt_runtime.onnx_file import read_onnx
from trt_runtime.onnx_model import (
    cut_heads,
    find_plugin,
    load_graph,
    plain,
    plugin_attributes,
    plugin_problem,
    text,
)


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
    frames = [crowd, astronaut] * 6
    expected = [detector.detect(frame) for frame in frames[:2]]
    with ThreadPoolExecutor(4) as pool:
        for index, found in enumerate(pool.map(detector.detect, frames)):
            np.testing.assert_array_equal(found.boxes, expected[index % 2].boxes)


def test_a_network_that_gives_nan_raises(plugin_form: Path, tmp_path: Path, astronaut: Frame) -> None:
    path = with_nan(plugin_form, tmp_path / "nan.onnx")
    with pytest.raises(NonFiniteError):
        load_detector(path).detect(astronaut)


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


@pytest.mark.parametrize("form", ["static_onnx", "dynamic_onnx", "plugin_form"])
@pytest.mark.parametrize("size", [None, (320, 320)])
def test_a_file_is_read_and_cut_once(
    form: str, size: tuple[int, int] | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the choice of the backend and by the detector together."""
    path, calls = request.getfixturevalue(form), []

    def counted(name: str) -> Any:
        real = getattr(onnx_model, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            return real(*args)

        return call

    for name in ("read_onnx", "cut_heads"):
        monkeypatch.setattr(onnx_model, name, counted(name))
    load_detector(path, size_hw=size).close()
    assert calls == ["read_onnx", "cut_heads"]


def test_a_graph_is_decoded_or_refused_in_one_line(plugin_form: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = plugin_form.read_bytes()
    assert load_graph(content, "x").SerializeToString() == onnx.load(plugin_form).SerializeToString()
    for wrong in (content[:1000], b"\xff" * 300):
        with pytest.raises(ModelFileError, match="not an ONNX file, or damaged") as caught:
            load_graph(wrong, "x")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 150
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match=r"this needs onnx.*\.\[cpu\]"):
        load_graph(content, "this")
    with pytest.raises(MissingPackageError, match="running the network without its decoding needs onnx"):
        cut_heads(content, ModelSpec())


def test_the_plugin_of_a_graph_is_the_only_one_in_its_domain() -> None:
    def graph(*nodes: tuple[str, str]) -> Any:
        made = [onnx.helper.make_node(name, ["x"], ["y"], domain=domain) for name, domain in nodes]
        return onnx.helper.make_model(onnx.helper.make_graph(made, "g", [], []))

    mine, other = (PLUGIN.name, PLUGIN.domain), ("Other", PLUGIN.domain)
    found = find_plugin(graph(("Neg", ""), mine, (PLUGIN.name, "somewhere.else")))
    assert (found.op_type, found.domain) == mine
    for nodes, words in (
        ([], "found 0 among 0 plugins"),
        ([("Neg", ""), (PLUGIN.name, "")], "found 0 among 0 plugins"),
        ([other], "found 0 among 1 plugins"),
        ([mine, other], "found 1 among 2 plugins"),
        ([mine, mine], "found 2 among 2 plugins"),
    ):
        with pytest.raises(ModelFileError, match=f"expected one {PLUGIN.name} node in the graph, {words}"):
            find_plugin(graph(*nodes))


def test_attributes_as_people_write_them() -> None:
    node = onnx.helper.make_node(
        "X", [], [], f=0.4, i=3, s="name", floats=[0.1, 16.0], ints=[8, 16], strings=["a"], none=float("inf"),
    )  # fmt: skip
    assert plugin_attributes(node) == {
        "f": 0.4, "i": 3, "s": "name", "floats": [0.1, 16.0], "ints": [8, 16], "strings": None, "none": "inf",
    }  # fmt: skip
    assert plain(b"a\xffb") == text(b"a\xffb") == "a\ufffdb"
    assert (text("a"), plain(None), plain(7), plain("b")) == ("a", None, 7, "b")
    assert plain(float(np.float32(0.4))) == 0.4
    assert plain([float("nan"), [0.5]]) == ["nan", [0.5]]


@pytest.fixture(scope="module")
def plugin(plugin_form: Path) -> dict[str, Any]:
    return plugin_attributes(find_plugin(onnx.load(plugin_form)))


def test_every_attribute_of_a_plugin_must_be_what_the_spec_says(plugin: dict[str, Any]) -> None:
    spec = ModelSpec()
    assert plugin_problem(plugin, spec) is None
    assert plugin_problem({**plugin, "something_else": 1}, spec) is None
    expected = {
        "plugin_version": PLUGIN.version, "plugin_namespace": PLUGIN.namespace, "strides": [8, 16, 32],
        "min_sizes": [16, 32, 64, 128, 256, 512], "variances": [0.1, 0.2],
        "logit_threshold": plain(float(np.log(0.02 / 0.98))),
        "iou_threshold": 0.4, "top_k": 5000, "max_detections": 750,
    }  # fmt: skip
    assert {name: plugin[name] for name in expected} == expected
    for name, value in expected.items():
        wrong = value[::-1] if isinstance(value, list) else f"{value}x" if isinstance(value, str) else value * 2
        for changed, words in (({**plugin, name: wrong}, str(wrong)), ({**plugin, name: None}, "None")):
            problem = plugin_problem(changed, spec)
            wanted = f"the spec says {plugin[name]}"
            if name.startswith("plugin_"):
                again = "export it again with python -m export.to_trt --onnx-only"
                wanted = f"this version has {plugin[name]}: {again}"
            assert problem == f"the plugin's {name} is {words}, {wanted}"
        without = {key: item for key, item in plugin.items() if key != name}
        assert name in (plugin_problem(without, spec) or "")
    for wrong in (None, 2, -1, 0.5, "1", [1]):
        problem = plugin_problem({**plugin, "channels_last": wrong}, spec)
        assert problem == f"the plugin's channels_last is {wrong}, it must be 0 or 1"


def _with_layout(path: Path, channels_last: bool) -> Any:
    """Return a plugin form whose plugin takes its head maps in one of the two layouts, written here."""
    model = onnx.load(path)
    plugin = find_plugin(model)
    transposes = [node for node in model.graph.node if node.output[0] in plugin.input and node.op_type == "Transpose"]
    maps = [node.input[0] for node in transposes] or list(plugin.input)
    for node in [*transposes, plugin]:
        model.graph.node.remove(node)
    if channels_last:
        made = [onnx.helper.make_node("Transpose", [name], [f"{name}_last"], perm=[0, 2, 3, 1]) for name in maps]
        model.graph.node.extend(made)
    plugin.input[:] = [f"{name}_last" for name in maps] if channels_last else maps
    next(item for item in plugin.attribute if item.name == "channels_last").i = int(channels_last)
    model.graph.node.append(plugin)
    return model


@pytest.mark.parametrize("channels_last", [False, True])
def test_both_layouts_of_the_head_maps_are_cut_where_they_are_planar(channels_last: bool, plugin_form: Path) -> None:
    model = _with_layout(plugin_form, channels_last)
    cut = cut_heads(model.SerializeToString(), ModelSpec())
    assert cut.heads == ["head_8", "head_16", "head_32"]
    kept = onnx.load_model_from_string(cut.content).graph.node
    assert kept[-1].op_type == "Conv"
    assert sum(node.op_type == "Transpose" for node in kept) == 1  # of the frames


def test_head_maps_that_are_not_transposed_as_the_plugin_says_are_refused(plugin_form: Path) -> None:
    def refused(model: Any) -> None:
        with pytest.raises(ModelFileError, match="its plugin says channels_last, and its inputs are no transposed"):
            cut_heads(model.SerializeToString(), ModelSpec())

    planar = _with_layout(plugin_form, False)
    next(item for item in find_plugin(planar).attribute if item.name == "channels_last").i = 1
    refused(planar)
    for change in (
        lambda node: node.attribute[0].ints.__setitem__(slice(None), [0, 3, 2, 1]),
        lambda node: node.attribute.pop(),
        lambda node: node.output.append("more"),
        lambda node: node.input.pop(),
    ):
        model = _with_layout(plugin_form, True)
        change(model.graph.node[-2])
        refused(model)


def test_a_plugin_form_of_an_older_version_is_refused(plugin_form: Path, tmp_path: Path) -> None:
    """Version 1 had no layout."""
    model = onnx.load(plugin_form)
    attributes = find_plugin(model).attribute
    next(item for item in attributes if item.name == "plugin_version").s = b"1"
    attributes.remove(next(item for item in attributes if item.name == "channels_last"))
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(
        ModelFileError, match=r"old\.onnx: the plugin's plugin_version is 1, this version has 2: export it again"
    ):
        load_detector(tmp_path / "old.onnx").detect(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize("form", ["plugin_form", "dynamic_onnx", "static_onnx"])
def test_a_cut_graph_holds_what_its_head_maps_need(form: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(form)
    cut = cut_heads(path.read_bytes(), ModelSpec())
    before, graph = onnx.load(path).graph, onnx.load_model_from_string(cut.content).graph
    assert cut.fixed_hw == ((320, 320) if form == "static_onnx" else None)
    assert not cut.half
    assert [item.name for item in graph.output] == cut.heads
    assert {item.type.tensor_type.elem_type for item in graph.output} == {onnx.TensorProto.FLOAT}
    assert cut.heads == ["head_8", "head_16", "head_32"]
    assert 50 < len(graph.node) < len(before.node)
    kept = [node.output[0] for node in graph.node]
    assert kept == [node.output[0] for node in before.node if node.output[0] in set(kept)]  # in their order
    read = {name for node in graph.node for name in node.input}
    assert all(read.union(cut.heads).intersection(node.output) for node in graph.node)
    assert {item.name for item in graph.initializer} == read & {item.name for item in before.initializer}
    assert len(graph.value_info) == 0
    assert not any(node.domain == PLUGIN.domain for node in graph.node)
    made = {"images", *(item.name for item in graph.initializer)}
    for node in graph.node:
        assert set(filter(None, node.input)) <= made
        made.update(node.output)


@pytest.mark.parametrize(
    ("sides", "fixed"), [((320, 640), (320, 640)), (("H", 640), None), ((320, "W"), None), ((0, 32), None)]
)
def test_the_size_of_a_cut_graph(sides: tuple[Any, Any], fixed: object, dynamic_onnx: Path) -> None:
    model = onnx.load(dynamic_onnx)
    for side, value in zip(model.graph.input[0].type.tensor_type.shape.dim[1:3], sides, strict=True):
        side.Clear()
        setattr(side, "dim_value" if isinstance(value, int) else "dim_param", value)
    assert cut_heads(model.SerializeToString(), ModelSpec()).fixed_hw == fixed


def test_half_is_what_the_head_maps_are_computed_in(dynamic_onnx: Path) -> None:
    """Of weights that they need; others do not count."""

    def with_half(used: bool) -> Any:
        model = onnx.load(dynamic_onnx)
        node = next(node for node in model.graph.node if node.output[0] == "head_32")
        bias = next(item for item in model.graph.initializer if item.name == node.input[2])
        values = onnx.numpy_helper.to_array(bias).astype(np.float16)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, "half"))
        cast = onnx.helper.make_node("Cast", ["half"], ["bias_of_half"], to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(0, cast)
        if used:
            node = next(node for node in model.graph.node if node.output[0] == "head_32")
            node.input[2] = "bias_of_half"
        return cut_heads(model.SerializeToString(), ModelSpec())

    assert not with_half(used=False).half
    cut = with_half(used=True)
    assert cut.half
    outputs = onnx.load_model_from_string(cut.content).graph.output
    assert {item.type.tensor_type.elem_type for item in outputs} == {onnx.TensorProto.FLOAT16}


def test_a_graph_that_lacks_one_head_map_is_refused(dynamic_onnx: Path) -> None:
    spec = ModelSpec()
    other = dataclasses.replace(spec, anchors=dataclasses.replace(spec.anchors, strides=(8, 16, 64)))
    with pytest.raises(ModelFileError, match=r"cannot be told apart: export it again with python -m export\.to_onnx"):
        cut_heads(dynamic_onnx.read_bytes(), other)
