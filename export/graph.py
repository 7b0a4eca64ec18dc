"""The detector graphs: preprocessing, the network as torch exports it, decoding and NMS in operators or as a plugin."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterable

import onnx
import torch
from onnx import TensorProto, helper

from facespec.cli import require
from facespec.errors import ModelFileError
from facespec.spec import SPEC_KEY, ModelSpec
from trainer.model import MergedHeads, RetinaFace
from trt_runtime.kernels import PLUGIN, decode_attributes, make_params
from trt_runtime.onnx_graph import (
    HEAD_NAMES,
    OPSET,
    GraphBuilder,
    add_decode_nms,
    add_preprocessing,
    detector_outputs,
    whole_model,
)


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

    The network size is fixed, in multiples of 32, or None for dynamic height and width.

    Raises:
        ModelFileError: The ONNX checker finds the graph at fault.
    """
    network = export_network(model, size_hw).graph
    g = GraphBuilder()
    pixels = add_preprocessing(g, "images", model.spec)
    for node in network.node:
        for index, name in enumerate(node.input):
            if name == network.input[0].name:
                node.input[index] = pixels
    whole = whole_model([*g.nodes, *network.node], [*g.initializers, *network.initializer], network.output, size_hw)
    return finished(whole, model.spec)


def build_portable(heads_graph: onnx.ModelProto, spec: ModelSpec, size_hw: tuple[int, int] | None) -> onnx.ModelProto:
    """Return the portable detector around a heads graph: decoding and NMS in operators, which compute in float32.

    The heads graph is that of `build_heads` at this size, in any precision; `spec.decode` gives thresholds and limits.

    Raises:
        ModelFileError: The ONNX checker finds the graph at fault.
    """
    model = copy.deepcopy(heads_graph)
    g = GraphBuilder("decode_")
    heads = []
    for head in model.graph.output:
        half = head.type.tensor_type.elem_type == TensorProto.FLOAT16
        heads.append(g.op("Cast", head.name, to=TensorProto.FLOAT) if half else head.name)
    add_decode_nms(g, heads, spec, size_hw)
    model.graph.node.extend(g.nodes)
    model.graph.initializer.extend(g.initializers)
    del model.graph.output[:]
    model.graph.output.extend(detector_outputs(spec))
    return finished(model, spec)


def build_plugin_form(
    heads_graph: onnx.ModelProto, spec: ModelSpec, size_hw: tuple[int, int] | None, channels_last: bool = False
) -> onnx.ModelProto:
    """Return the graph that TensorRT builds: decoding and NMS are one plugin node; see `build_portable`.

    With `channels_last` the plugin is given the head maps as [B, H, W, C], through a Transpose each, else as they are.

    Raises:
        SpecError: The plugin is not made for so many levels or priors per cell.
        ModelFileError: The ONNX checker finds the graph at fault.
    """
    make_params(1, size_hw or (320, 320), spec)
    model, outputs = copy.deepcopy(heads_graph), detector_outputs(spec)
    g, heads = GraphBuilder("decode_"), [head.name for head in model.graph.output]
    if channels_last:
        heads = [g.op("Transpose", head, perm=[0, 2, 3, 1]) for head in heads]
    node = helper.make_node(
        PLUGIN.name,
        heads,
        [output.name for output in outputs],
        name=PLUGIN.node,
        domain=PLUGIN.domain,
        plugin_version=PLUGIN.version,
        plugin_namespace=PLUGIN.namespace,
        **decode_attributes(spec),
        channels_last=int(channels_last),
    )
    model.graph.node.extend([*g.nodes, node])
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    model.opset_import.append(helper.make_opsetid(PLUGIN.domain, 1))
    check_graph(model)
    return model


def finished(graph: onnx.ModelProto, spec: ModelSpec) -> onnx.ModelProto:
    """Return a graph simplified and checked, with its spec in the metadata.

    Raises:
        ModelFileError: The ONNX checker finds the graph at fault.
    """
    onnxsim = require("onnxsim", "export", "the export")  # it imports onnxruntime: facespec comes first
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


def showing(graph: onnx.ModelProto, names: Iterable[str]) -> bytes:
    """Return an encoded copy of a graph whose outputs include the tensors of these names."""
    probe = copy.deepcopy(graph)
    known = {output.name for output in graph.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return bytes(probe.SerializeToString())
