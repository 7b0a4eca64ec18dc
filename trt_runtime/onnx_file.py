"""Reads what must be known about an ONNX file before anything loads it, straight from its protobuf encoding.

The field numbers are those of onnx.proto (ONNX 1.x); the encoding is that of the protocol buffers documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from facespec.errors import ModelFileError

MAX_BYTES = 2 << 30
"""Protobuf's own limit."""

_MAX_DEPTH = 32
_MAX_FIELDS = 1_000_000

# message -> field number -> the message it holds, or what to collect from it
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 14: "metadata", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
}


@dataclass
class OnnxHeader:
    """What a file says about itself."""

    metadata: dict[str, str] = field(default_factory=dict)
    domains: set[str] = field(default_factory=set)  # operator sets it imports; "" is ONNX itself
    external_files: list[str] = field(default_factory=list)  # that hold tensors, as written
    has_graph: bool = False
    fields: int = 0  # how many were read


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def _fields(data: memoryview, header: OnnxHeader) -> Iterator[tuple[int, memoryview]]:
    """Yield (field number, content) of the length-delimited fields; the others are counted, and passed over."""
    position = 0
    while position < len(data):
        header.fields += 1
        if header.fields > _MAX_FIELDS:
            raise ValueError("too many fields")
        start = position
        tag, position = _varint(data, position)
        if position - start > 5 or not 8 <= tag < 1 << 32:  # readers differ in what they make of these
            raise ValueError("not protobuf")
        kind = tag & 7
        if kind == 0:
            _, position = _varint(data, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        elif kind == 2:
            length, position = _varint(data, position)
            if position + length > len(data):
                raise ValueError("the file is truncated")
            yield tag >> 3, data[position : position + length]
            position += length
        else:
            raise ValueError("not protobuf")
    if position > len(data):
        raise ValueError("the file is truncated")


def _entry(data: memoryview, header: OnnxHeader) -> tuple[str, str]:
    """Return key and value of a StringStringEntryProto."""
    parts = {number: bytes(content).decode("utf-8", "replace") for number, content in _fields(data, header)}
    return parts.get(1, ""), parts.get(2, "")


def _walk(kind: str, data: memoryview, header: OnnxHeader, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    for number, content in _fields(data, header):
        inner = _FIELDS[kind].get(number)
        if inner is None:
            continue
        if inner == "function":  # they may nest without bounds, and this toolkit writes none
            raise ValueError("functions are not taken")
        if inner == "metadata":
            key, value = _entry(content, header)
            header.metadata[key] = value
        elif inner == "opset":
            header.domains.add(_entry(content, header)[0])  # OperatorSetIdProto: the domain is field 1
        elif inner == "external":
            key, value = _entry(content, header)
            if key == "location":
                header.external_files.append(value)
        else:
            header.has_graph |= kind == "model" and inner == "graph"
            _walk(inner, content, header, depth + 1)


def parse_onnx_header(data: bytes) -> OnnxHeader:
    """Return the header of an encoded model.

    Raises:
        ValueError: Not a protobuf message, or it ends early.
    """
    header = OnnxHeader()
    try:
        _walk("model", memoryview(data), header, 0)
    except IndexError:
        raise ValueError("the file is truncated") from None
    return header


def read_onnx(path: str | Path) -> tuple[bytes, OnnxHeader]:
    """Return the content and the header of an ONNX file that is safe to load.

    Raises:
        ModelFileError: Missing, too large, not ONNX, truncated, or with tensors outside its own folder.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ModelFileError(f"{path}: no such model file")
        if path.stat().st_size > MAX_BYTES:
            raise ModelFileError(f"{path}: more than 2 GiB is no ONNX file")
        data = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        header = parse_onnx_header(data)
    except ValueError as error:
        raise ModelFileError(f"{path}: not an ONNX file, or damaged ({error})") from None
    if not header.has_graph:
        raise ModelFileError(f"{path}: not an ONNX file, there is no graph in it")
    folder = path.resolve().parent
    for location in set(header.external_files):
        place = (folder / location.replace("\0", "/")).resolve()
        if "\0" in location or not place.is_relative_to(folder):
            raise ModelFileError(f"{path}: refused, it wants to read {location[:80]!r} outside its own folder")
        if not place.is_file():
            raise ModelFileError(f"{path}: the file of its weights is missing: {location[:80]!r}")
    return data, header
