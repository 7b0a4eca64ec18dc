"""The detector graph that TensorRT builds: network, then decoding and NMS as one plugin node."""

from __future__ import annotations

import onnx

from export.graph import add_plugin
from export.portable import check_graph
from facespec.spec import ModelSpec
from trt_runtime.kernels import make_params


def build_plugin_form(
    heads_graph: onnx.ModelProto, spec: ModelSpec, size_hw: tuple[int, int] | None
) -> onnx.ModelProto:
    """Return the plugin form around a heads graph: uint8 images to the five outputs.

    Args:
        heads_graph: From `export.portable.build_heads`, in any precision; decoding and NMS compute in float32.
        spec: `spec.decode` gives thresholds and limits.
        size_hw: Fixed network size (multiples of 32), or None for dynamic height and width.

    Raises:
        SpecError: The plugin is not made for so many levels or priors per cell.
        ModelFileError: The ONNX checker finds the graph at fault.
    """
    make_params(1, size_hw or (320, 320), spec)
    graph = onnx.ModelProto()
    graph.CopyFrom(heads_graph)
    add_plugin(graph, spec)
    check_graph(graph)
    return graph
