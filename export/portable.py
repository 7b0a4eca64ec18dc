"""The detector graphs: network exported by torch, pre- and post-processing around it, simplified and checked."""

from __future__ import annotations

import copy
import io
import warnings

import onnx
import onnxsim
import torch
from torch import Tensor, nn

from export.graph import HEAD_NAMES, OPSET, add_decoding, add_plugin, assemble
from facespec.errors import ModelFileError
from facespec.spec import SPEC_KEY, ModelSpec
from trainer.model import RetinaFace
from trt_runtime.kernels import make_params


class MergedHeads(nn.Module):
    """RetinaFace with the three heads of each level merged into one 1×1 convolution of 4 + 8 + 20 channels."""

    def __init__(self, model: RetinaFace) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleList()
        for level in zip(model.ClassHead, model.BboxHead, model.LandmarkHead, strict=True):
            parts = [head.get_submodule("conv1x1") for head in level]
            weight, bias = (torch.cat([part.get_parameter(name) for part in parts]) for name in ("weight", "bias"))
            merged = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
            merged.weight, merged.bias = nn.Parameter(weight), nn.Parameter(bias)
            self.heads.append(merged)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the head maps (B, 16 * priors per cell, H/s, W/s) for strides 8, 16, 32."""
        return tuple(head(x) for head, x in zip(self.heads, self.model.features(pixels), strict=True))


def export_network(model: RetinaFace, size_hw: tuple[int, int] | None) -> onnx.ModelProto:
    """Return the network alone as ONNX: float32 (B, 3, H, W) `input` to the maps `HEAD_NAMES`, batch dynamic."""
    height, width = size_hw or (320, 320)
    axes: dict[str, dict[int, str]] = {"input": {0: "batch"}, **{name: {0: "batch"} for name in HEAD_NAMES}}
    if size_hw is None:
        for name, sides in axes.items():
            sides |= {2: f"{name}_height", 3: f"{name}_width"}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter built on torch.export needs onnxscript and takes ten times as long for the same graph.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            MergedHeads(copy.deepcopy(model)).eval(),
            (torch.zeros(1, 3, height, width),),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=["input"],
            output_names=list(HEAD_NAMES),
            dynamic_axes=axes,
        )
    return onnx.load_model_from_string(buffer.getvalue())


def build_heads(model: RetinaFace, size_hw: tuple[int, int] | None) -> onnx.ModelProto:
    """Return the detector graph up to the three head maps: simplified, checked, with its spec in the metadata.

    Args:
        model: From `trainer.load_model`.
        size_hw: Fixed network size (multiples of 32), or None for dynamic height and width.

    Raises:
        ModelFileError: The ONNX checker finds the graph at fault.
    """
    return finished(assemble(export_network(model, size_hw), model.spec, size_hw), model.spec)


def build_portable(heads_graph: onnx.ModelProto, spec: ModelSpec, size_hw: tuple[int, int] | None) -> onnx.ModelProto:
    """Return the portable detector around a heads graph: decoding and NMS in operators.

    Args:
        heads_graph: From `build_heads`, in any precision; decoding and NMS compute in float32.
        spec: `spec.decode` gives thresholds and limits.
        size_hw: Fixed network size (multiples of 32), or None for dynamic height and width.

    Raises:
        ModelFileError: The ONNX checker finds the graph at fault.
    """
    graph = onnx.ModelProto()
    graph.CopyFrom(heads_graph)
    add_decoding(graph, spec, size_hw)
    if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.graph.initializer):
        check_graph(graph)  # simplified again, it would lose the Q/DQ pairs of INT8
        return graph
    return finished(graph, spec)


def build_plugin_form(
    heads_graph: onnx.ModelProto, spec: ModelSpec, size_hw: tuple[int, int] | None
) -> onnx.ModelProto:
    """Return the graph that TensorRT builds: decoding and NMS are one plugin node; see `build_portable`.

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


def finished(graph: onnx.ModelProto, spec: ModelSpec) -> onnx.ModelProto:
    """Return a graph simplified and checked, with its spec in the metadata.

    Raises:
        ModelFileError: The ONNX checker finds the graph at fault.
    """
    simplified, _ = onnxsim.simplify(graph)  # whether it kept the outputs is for the parity report to say
    onnx.helper.set_model_props(simplified, {SPEC_KEY: spec.to_json()})
    check_graph(simplified)
    return simplified


def check_graph(graph: onnx.ModelProto) -> None:
    """Raise ModelFileError if the ONNX checker finds a graph at fault."""
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelFileError(f"the exported graph does not pass the ONNX checker: {error}") from None
