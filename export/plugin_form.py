"""The detector graph that TensorRT builds: network, then decoding and NMS as one plugin node."""

from __future__ import annotations

import onnx

from export.graph import add_plugin
from export.portable import build_heads, check_graph
from export.quantize import to_fp16
from facespec.errors import ModelFileError
from plugins.host import make_params
from trainer.model import RetinaFace


def build_plugin_form(model: RetinaFace, size_hw: tuple[int, int] | None, precision: str = "fp32") -> onnx.ModelProto:
    """Return the plugin form of a model: uint8 images to the five outputs, with its spec in the metadata.

    Args:
        model: From `trainer.load_model`; `model.spec.decode` gives thresholds and limits.
        size_hw: Fixed network size (multiples of 32), or None for dynamic height and width.
        precision: One of `export.quantize.PRECISIONS`; decoding and NMS compute in fp32 in any case.

    Raises:
        SpecError: The plugin is not made for so many levels or priors per cell.
        ModelFileError: A weight does not fit, or the ONNX checker finds the graph at fault.
    """
    make_params(1, size_hw or (320, 320), model.spec)
    graph = build_heads(model, size_hw)
    if precision == "fp16":
        graph = to_fp16(graph)
    elif precision != "fp32":
        raise ModelFileError(f"no such precision: {precision}")
    add_plugin(graph, model.spec)
    check_graph(graph)
    return graph
