"""The plugin form of a detector without TensorRT: its network by any ONNX runtime, its plugin by the host kernels."""

from __future__ import annotations

from typing import Any

from facespec.cli import require
from facespec.errors import ModelFileError
from plugins import PLUGIN


def cut_plugin(content: bytes) -> tuple[bytes, list[str]]:
    """Return a plugin form that ends at the head maps, and their names.

    Args:
        content: An encoded ONNX model with one node of the plugin at its end.

    Raises:
        ModelFileError: It has no such node.
        MissingPackageError: The package onnx is not installed.
    """
    onnx: Any = require("onnx", "train", "running a plugin form on the CPU")
    model = onnx.load_model_from_string(content)
    plugins = [node for node in model.graph.node if (node.domain, node.op_type) == (PLUGIN.domain, PLUGIN.name)]
    if len(plugins) != 1:
        raise ModelFileError(f"expected one {PLUGIN.name} node in the graph, found {len(plugins)}")
    heads = list(plugins[0].input)
    model.graph.node.remove(plugins[0])
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in heads)
    return model.SerializeToString(), heads
