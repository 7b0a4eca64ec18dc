from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from facespec.errors import ModelFileError
from facespec.spec import SPEC_KEY
from trt_runtime.onnx_file import parse_onnx_header, read_onnx


def _external(name: str, location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def _model(place: str, location: str) -> onnx.ModelProto:
    """A model with one tensor in an external file, at one of the places ONNX allows."""
    tensor = _external("t", location)
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    sparse = onnx.SparseTensorProto(values=tensor)
    nodes, initializers, functions = [], [], []
    if place == "initializer":
        initializers = [tensor]
    elif place == "attribute":
        nodes = list(inner.node)
    elif place == "subgraph":
        nodes = [helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)]
    elif place == "sparse attribute":
        nodes = [helper.make_node("Constant", [], ["c"], sparse_value=sparse)]
    elif place == "function":
        functions = [helper.make_function("d", "f", [], ["c"], list(inner.node), [helper.make_opsetid("", 19)])]
    graph = helper.make_graph(nodes, "g", [], [], initializers)
    if place == "sparse initializer":
        graph.sparse_initializer.append(sparse)
    return helper.make_model(graph, functions=functions)


PLACES = ["initializer", "attribute", "subgraph", "sparse attribute", "sparse initializer"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../b", "nul\0l"])
def test_external_data_outside_the_folder_is_refused_wherever_it_hides(
    place: str, location: str, tmp_path: Path
) -> None:
    (tmp_path / "m.onnx").write_bytes(_model(place, location).SerializeToString())
    with pytest.raises(ModelFileError, match="outside its own folder"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("place", PLACES)
def test_external_data_inside_the_folder_is_found(place: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(_model(place, "weights/data.bin").SerializeToString())
    with pytest.raises(ModelFileError, match="weights is missing"):
        read_onnx(tmp_path / "m.onnx")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "data.bin").write_bytes(bytes(4))
    assert set(read_onnx(tmp_path / "m.onnx")[1].external_files) == {"weights/data.bin"}


def test_functions_are_refused(tmp_path: Path) -> None:
    """They could nest without bounds, and hide anything."""
    (tmp_path / "m.onnx").write_bytes(_model("function", "data.bin").SerializeToString())
    with pytest.raises(ModelFileError, match="functions are not taken"):
        read_onnx(tmp_path / "m.onnx")


def test_a_link_does_not_lead_outside(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "data.bin").symlink_to(tmp_path / "secret")
    (tmp_path / "inside" / "m.onnx").write_bytes(_model("initializer", "data.bin").SerializeToString())
    with pytest.raises(ModelFileError, match="outside its own folder"):
        read_onnx(tmp_path / "inside" / "m.onnx")


def test_metadata_equals_what_onnx_reads(static_onnx: Path) -> None:
    _, header = read_onnx(static_onnx)
    assert header.metadata == {item.key: item.value for item in onnx.load(static_onnx).metadata_props}
    assert SPEC_KEY in header.metadata
    assert header.external_files == []


@pytest.mark.parametrize("data", [b"", b"garbage" * 100, b"\xff" * 100, b"PK\x03\x04" + bytes(50), bytes(1000)])
def test_garbage_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ModelFileError, match="not an ONNX file"):
        read_onnx(tmp_path / "m.onnx")


def test_truncated_missing_and_special_files_are_refused(static_onnx: Path, tmp_path: Path) -> None:
    data = static_onnx.read_bytes()
    for keep in (10, len(data) // 2, len(data) - 1):
        (tmp_path / "m.onnx").write_bytes(data[:keep])
        with pytest.raises(ModelFileError):
            read_onnx(tmp_path / "m.onnx")
    for name in ("none.onnx", "."):
        with pytest.raises(ModelFileError, match="no such model file"):
            read_onnx(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(ModelFileError, match="no such model file"):
        read_onnx(tmp_path / "pipe.onnx")


def test_deep_nesting_ends() -> None:
    """Graphs in attributes of nodes of graphs, encoded by hand: protobuf itself refuses to build so many."""

    def wrap(field: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 0x7F:
            length += bytes([size & 0x7F | 0x80])
            size >>= 7
        return bytes([field << 3 | 2]) + length + bytes([size]) + content

    graph = b""
    for _ in range(200):
        graph = wrap(1, wrap(5, wrap(6, graph)))  # node, attribute, graph
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_onnx_header(wrap(7, graph))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_end_in_a_header_or_a_value_error(data: bytes) -> None:
    try:
        parse_onnx_header(data)
    except ValueError:
        return


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_models_end_in_a_header_or_a_value_error(data: st.DataObject) -> None:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "w")
    model = helper.make_model(helper.make_graph([helper.make_node("Neg", ["w"], ["y"])], "g", [], [], [tensor]))
    damaged = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_onnx_header(bytes(damaged))
    except ValueError:
        return


def test_a_field_hidden_behind_an_overlong_tag_is_refused() -> None:
    """Readers that cut tags to 32 bits would see external data here; one that does not would see an unknown field."""
    location = onnx.StringStringEntryProto(key="location", value="../secret").SerializeToString()
    for tag in (b"\xea\x80\x80\x80\x10", b"\xea\x80\x80\x80\x80\x00", b"\x02"):
        tensor = tag + bytes([len(location)]) + location
        graph = b"\x2a" + bytes([len(tensor)]) + tensor
        with pytest.raises(ValueError, match="not protobuf"):
            parse_onnx_header(b"\x3a" + bytes([len(graph)]) + graph)


def test_a_linked_model_reads_beside_the_file_itself(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "there" / "m.onnx").write_bytes(_model("initializer", "w.bin").SerializeToString())
    (tmp_path / "here" / "m.onnx").symlink_to(tmp_path / "there" / "m.onnx")
    (tmp_path / "here" / "w.bin").write_bytes(bytes(4))
    with pytest.raises(ModelFileError, match="weights is missing"):
        read_onnx(tmp_path / "here" / "m.onnx")


def test_a_memory_address_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(_model("initializer", "*/_ORT_MEM_ADDR_/*").SerializeToString())
    with pytest.raises(ModelFileError, match="weights is missing"):
        read_onnx(tmp_path / "m.onnx")
