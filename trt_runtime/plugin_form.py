"""The plugin form of a detector without TensorRT: its network by any ONNX runtime, its plugin by the host kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from facespec.cli import require
from facespec.errors import ModelFileError
from facespec.spec import ModelSpec
from plugins import PLUGIN


def load_graph(content: bytes, why: str) -> Any:
    """Return a decoded ONNX model.

    Args:
        content: The file.
        why: What needs the package onnx, for the message.

    Raises:
        ModelFileError: It cannot be decoded.
        MissingPackageError: The package onnx is not installed.
    """
    onnx = require("onnx", "cpu", why)
    try:
        return onnx.load_model_from_string(content)
    except Exception as error:  # of protobuf, which is not ours to import
        raise ModelFileError(f"not an ONNX file, or damaged ({' '.join(str(error).split())[:100]})") from None


def find_plugin(model: Any) -> Any:
    """Return the plugin node of a decoded plugin form.

    Raises:
        ModelFileError: There is none, or something else beside it in its domain.
    """
    nodes = [node for node in model.graph.node if node.domain == PLUGIN.domain]
    if len(nodes) != 1 or nodes[0].op_type != PLUGIN.name:
        named = sum(node.op_type == PLUGIN.name for node in nodes)
        raise ModelFileError(f"expected one {PLUGIN.name} node in the graph, found {named} among {len(nodes)} plugins")
    return nodes[0]


def text(value: str | bytes) -> str:
    """Return a name of an ONNX model: protobuf hands back bytes where it is not UTF-8."""
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


def plugin_attributes(node: Any) -> dict[str, Any]:
    """Return the attributes of a plugin node that are numbers, lists of numbers or text; None for others."""
    kinds = {1: "f", 2: "i", 3: "s", 6: "floats", 7: "ints"}  # onnx.AttributeProto.AttributeType
    values = {item.name: getattr(item, kinds[item.type]) if item.type in kinds else None for item in node.attribute}
    return {text(name): plain(value) for name, value in values.items()}


def plain(value: Any) -> Any:
    """Return numbers as people write them: 0.4, and not what float32 makes of it; bytes as text."""
    if isinstance(value, bytes):
        return text(value)
    if isinstance(value, float):
        return float(str(np.float32(value))) if np.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    return [plain(item) for item in value]


def plugin_problem(attributes: dict[str, Any], spec: ModelSpec) -> str | None:
    """Return where the attributes of a plugin node are not what a spec says, or None."""
    expected = {
        "plugin_version": PLUGIN.version,
        "plugin_namespace": PLUGIN.namespace,
        "strides": list(spec.anchors.strides),
        "min_sizes": [plain(float(size)) for level in spec.anchors.min_sizes for size in level],
        "variances": plain(spec.decode.variances),
        "logit_threshold": plain(spec.decode.logit_threshold),
        "iou_threshold": plain(spec.decode.iou_threshold),
        "top_k": spec.decode.top_k,
        "max_detections": spec.decode.max_detections,
    }
    for name, value in expected.items():
        if attributes.get(name) != value:
            return f"the plugin's {name} is {attributes.get(name)}, the spec says {value}"
    return None


def cut_plugin(content: bytes, spec: ModelSpec) -> tuple[bytes, list[str]]:
    """Return a plugin form that ends at the head maps, and their names.

    Args:
        content: An encoded ONNX model with one node of the plugin at its end.
        spec: What the plugin must do.

    Raises:
        ModelFileError: It has no such node, or the node does something else.
        MissingPackageError: The package onnx is not installed.
    """
    model = load_graph(content, "running a plugin form on the CPU")
    onnx = require("onnx", "cpu", "running a plugin form on the CPU")
    plugin = find_plugin(model)
    problem = plugin_problem(plugin_attributes(plugin), spec)
    if problem:
        raise ModelFileError(problem)
    heads = list(plugin.input)
    model.graph.node.remove(plugin)
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in heads)
    return model.SerializeToString(), heads
