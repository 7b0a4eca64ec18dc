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
from trt_runtime import onnx_file
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
    elif place == "list of tensors":
        nodes = [helper.make_node("Any", [], ["c"], values=[numpy_helper.from_array(np.zeros(1, np.float32)), tensor])]
    elif place == "list of graphs":
        nodes = [helper.make_node("Any", [], ["c"], values=[helper.make_graph([], "none", [], []), inner])]
    elif place == "list of sparse tensors":
        nodes = [helper.make_node("Any", [], ["c"], values=[sparse])]
    elif place == "sparse indices":
        nodes = [helper.make_node("Constant", [], ["c"], sparse_value=onnx.SparseTensorProto(indices=tensor))]
    elif place == "function":
        functions = [helper.make_function("d", "f", [], ["c"], list(inner.node), [helper.make_opsetid("", 19)])]
    graph = helper.make_graph(nodes, "g", [], [], initializers)
    if place == "sparse initializer":
        graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph, functions=functions)
    if place in ("training start", "training step"):
        part = model.training_info.add()
        (part.initialization if place == "training start" else part.algorithm).CopyFrom(inner)
    return model


PLACES = [
    "initializer", "attribute", "subgraph", "sparse attribute", "sparse initializer", "list of tensors",
    "list of graphs", "list of sparse tensors", "sparse indices", "training start", "training step",
]  # fmt: skip


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
    with pytest.raises(ModelFileError, match=r"the file of its weights is missing: 'weights/data\.bin'"):
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


# what the encoding allows, written by hand


def _number(value: int) -> bytes:
    """Encode a number, as the documentation of protocol buffers says."""
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _field(number: int, content: bytes) -> bytes:
    return _number(number << 3 | 2) + _number(len(content)) + content


GRAPH = _field(7, b"")


def test_fields_of_every_kind_are_passed_over() -> None:
    """Numbers, eight bytes, four bytes and unknown messages, before and between what counts."""
    for unknown in (
        _number(1 << 3) + _number(9),
        _number(1 << 3) + _number(2**64 - 1),
        _number(99 << 3 | 1) + bytes(8),
        _number(99 << 3 | 5) + bytes(4),
        _field(99, b"anything \xff"),
        _field((1 << 29) - 1, b""),
    ):
        data = unknown + _field(14, unknown + _field(1, b"key") + unknown + _field(2, b"value"))
        data += unknown + _field(8, _field(1, b"domain") + unknown) + GRAPH + unknown
        header = parse_onnx_header(data)
        assert header.metadata == {"key": "value"}
        assert header.domains == {"domain"}
        assert header.has_graph


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_number(1 << 3 | 1) + bytes(7), "the file is truncated"),
        (_number(1 << 3 | 5) + bytes(3), "the file is truncated"),
        (_number(7 << 3 | 2) + _number(5) + bytes(4), "the file is truncated"),
        (_number(1 << 3) + b"\x80", "the file is truncated"),
        (_number(1 << 3), "the file is truncated"),
        (_number(1 << 3) + b"\xff" * 10 + b"\x01", "a number is too long"),
        (_number(1 << 3 | 3), "not protobuf"),
        (_number(1 << 3 | 4), "not protobuf"),
        (_number(1 << 3 | 6), "not protobuf"),
        (_number(1 << 3 | 7), "not protobuf"),
        (_number(2), "not protobuf"),
        (_number(7), "not protobuf"),
        (_number(1 << 32) + b"\x00", "not protobuf"),
        (_field(25, b""), "functions are not taken"),
    ],
)
def test_what_is_no_encoding_says_why(data: bytes, words: str) -> None:
    for whole in (data, GRAPH + data):
        with pytest.raises(ValueError, match=words):
            parse_onnx_header(whole)
    parse_onnx_header(_number(1 << 3) + b"\xff" * 9 + b"\x01")  # ten bytes are the most a number has


def test_a_model_without_a_graph_is_none(tmp_path: Path) -> None:
    """And the graph of a training step is not the model's."""
    path = tmp_path / "m.onnx"
    for data in (_number(1 << 3) + _number(9), _field(20, _field(1, b"")), _field(1, GRAPH)):
        path.write_bytes(data)
        with pytest.raises(ModelFileError, match=r"m\.onnx: not an ONNX file, there is no graph in it"):
            read_onnx(path)
    path.write_bytes(GRAPH)
    content, header = read_onnx(path)
    assert content == GRAPH
    assert (header.metadata, header.domains, header.external_files, header.fields) == ({}, set(), [], 1)


def test_graphs_may_lie_in_each_other_so_deep_and_no_deeper(monkeypatch: pytest.MonkeyPatch) -> None:
    def nested(levels: int) -> bytes:
        graph = b""
        for _ in range(levels):
            graph = _field(1, _field(5, _field(6, graph)))
        return _field(7, graph)

    parse_onnx_header(nested(10))  # model, graph, and three for each level: 32 at most
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_onnx_header(nested(11))


def test_the_number_of_fields_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_MAX_FIELDS", 100)
    graph = _field(1, b"") * 99
    assert parse_onnx_header(_field(7, graph)).fields == 100
    with pytest.raises(ValueError, match="too many fields"):
        parse_onnx_header(_field(7, graph + _field(1, b"")))
    for content in (_field(14, _field(3, b"") * 100), b"\x08\x01" * 100, b"\x0d" + bytes(4) + b"\x08\x01" * 99):
        with pytest.raises(ValueError, match="too many fields"):  # numbers count, and what lies in metadata
            parse_onnx_header(content + GRAPH)


def test_500_megabytes_of_numbers_are_not_read_through() -> None:
    """The size does not matter: it ends at the millionth number; 500 MB took more than 45 s."""
    with pytest.raises(ValueError, match="too many fields"):
        parse_onnx_header(b"\x08\x01" * 2_000_000)
    assert onnx_file._MAX_FIELDS == 1_000_000


def test_what_is_read_of_metadata_and_external_data() -> None:
    bad = _field(14, _field(1, b"k\xff") + _field(2, b"\xfe"))
    header = parse_onnx_header(bad + _field(14, b"") + _field(8, _field(1, b"")) + _field(8, b""))
    assert header.metadata == {"k\ufffd": "\ufffd", "": ""}
    assert header.domains == {""}
    tensor = b"".join(
        _field(13, _field(1, key) + _field(2, value))
        for key, value in ((b"offset", b"../1"), (b"location", b"w.bin"), (b"length", b"/etc"))
    )
    assert parse_onnx_header(_field(7, _field(5, tensor))).external_files == ["w.bin"]
    assert parse_onnx_header(_field(7, _field(5, tensor) * 2)).external_files == ["w.bin"] * 2


def test_operator_sets_are_those_onnx_reads(static_onnx: Path) -> None:
    content, header = read_onnx(static_onnx)
    assert content == static_onnx.read_bytes()
    assert header.domains == {item.domain for item in onnx.load(static_onnx).opset_import}
    assert header.has_graph


def test_files_that_are_too_large_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    assert onnx_file.MAX_BYTES == 2**31
    with path.open("wb") as file:
        file.truncate(2**31 + 1)  # of holes
    with pytest.raises(ModelFileError, match=r"m\.onnx: more than 2 GiB is no ONNX file"):
        read_onnx(path)
    path.write_bytes(GRAPH)
    monkeypatch.setattr(onnx_file, "MAX_BYTES", len(GRAPH))
    assert read_onnx(path)[0] == GRAPH
    monkeypatch.setattr(onnx_file, "MAX_BYTES", len(GRAPH) - 1)
    with pytest.raises(ModelFileError, match="more than 2 GiB"):
        read_onnx(path)
    with pytest.raises(ModelFileError, match=r"cannot be read \(File name too long\)"):
        read_onnx(tmp_path / ("x" * 300))
    path.write_bytes(GRAPH[:-1])
    with pytest.raises(ModelFileError, match=r"m\.onnx: not an ONNX file, or damaged \(the file is truncated\)"):
        read_onnx(str(path))


def test_a_long_place_of_weights_does_not_fill_the_screen(tmp_path: Path) -> None:
    for location in ("../" + "x" * 500, "y/" * 300):
        (tmp_path / "m.onnx").write_bytes(_model("initializer", location).SerializeToString())
        with pytest.raises(ModelFileError) as caught:
            read_onnx(tmp_path / "m.onnx")
        assert location[:80] in str(caught.value)
        assert location[:82] not in str(caught.value)


def test_every_file_of_weights_is_checked(tmp_path: Path) -> None:
    (tmp_path / "good.bin").write_bytes(bytes(4))
    model = _model("initializer", "good.bin")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    read_onnx(tmp_path / "m.onnx")
    for place in ("../bad.bin", "a/../../bad.bin"):
        for tensors in (["good.bin", place], [place, "good.bin"]):
            del model.graph.initializer[:]
            model.graph.initializer.extend(_external(f"t{index}", name) for index, name in enumerate(tensors))
            (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
            with pytest.raises(ModelFileError, match="outside its own folder"):
                read_onnx(tmp_path / "m.onnx")
    (tmp_path / "folder").mkdir()
    (tmp_path / "m.onnx").write_bytes(_model("initializer", "folder").SerializeToString())
    with pytest.raises(ModelFileError, match="weights is missing"):
        read_onnx(tmp_path / "m.onnx")
