"""Detector graphs without TensorRT: the network up to its head maps, for any runtime; the rest by the host kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from facespec.cli import require
from facespec.errors import ModelFileError
from facespec.spec import ModelSpec
from trt_runtime.kernels import PLUGIN


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


@dataclass(frozen=True)
class HeadsGraph:
    """A detector graph that ends at its head maps.

    Attributes:
        content: Encoded ONNX model.
        heads: Names of its outputs, one for each pyramid level.
        fixed_hw: The one size its input has, or None.
        half: Whether it computes in fp16 where it does not in INT8.
    """

    content: bytes
    heads: list[str]
    fixed_hw: tuple[int, int] | None
    half: bool


def cut_heads(content: bytes, spec: ModelSpec) -> HeadsGraph:
    """Return a detector graph without its decoding and NMS, which `trt_runtime.kernels.decode_nms` does.

    Args:
        content: An encoded ONNX model: a plugin form, or a portable graph, whose head maps are named `head_STRIDE`.
        spec: What the plugin must do.

    Raises:
        ModelFileError: It has no head maps, or its plugin does something else.
        MissingPackageError: The package onnx is not installed.
    """
    why = "running the network without its decoding"
    model = load_graph(content, why)
    onnx = require("onnx", "cpu", why)
    graph = model.graph
    if any(node.domain == PLUGIN.domain for node in graph.node):
        plugin = find_plugin(model)
        problem = plugin_problem(plugin_attributes(plugin), spec)
        if problem:
            raise ModelFileError(problem)
        heads = list(plugin.input)
    else:
        heads = [f"head_{stride}" for stride in spec.anchors.strides]
    _keep(graph, heads)
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    del graph.output[:]
    graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in heads)
    sides = [side.dim_value for item in graph.input for side in item.type.tensor_type.shape.dim[1:3]]
    fixed = (sides[0], sides[1]) if len(sides) == 2 and all(side > 0 for side in sides) else None
    return HeadsGraph(model.SerializeToString(), heads, fixed, half)


def _keep(graph: Any, outputs: list[str]) -> None:
    """Remove from a graph everything the outputs do not need.

    Raises:
        ModelFileError: It does not compute them.
    """
    needed = set(outputs)
    kept = []
    for node in reversed(graph.node):  # ONNX keeps nodes in an order in which they can run
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    if not set(outputs) <= {name for node in kept for name in node.output}:
        raise ModelFileError("its head maps cannot be told apart: export it again with python -m export.to_onnx")
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [item for item in graph.initializer if item.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    del graph.value_info[:]
