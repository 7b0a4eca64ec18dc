"""float16 as a GPU computes it, on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from facespec.cli import require


def computes_in_fp16(content: bytes) -> bool:
    """Whether a graph, an encoded ONNX model, holds float16 values."""
    onnx = require("onnx", "cpu", "export.verify")
    graph = onnx.load_model_from_string(content).graph
    casts = (a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to")
    return onnx.TensorProto.FLOAT16 in {*casts, *(tensor.data_type for tensor in graph.initializer)}


def emulate_fp16(content: bytes) -> bytes:
    """Return a graph in float32 that rounds to float16 whatever a float16 graph stores between its operators.

    ONNX Runtime computes float16 graphs in float32 on a CPU and leaves that rounding out: they would look too good.
    Sums inside an operator stay in float32, as they do on a GPU. int8 is left as it is.

    Args:
        content: An encoded ONNX model.
    """
    onnx = require("onnx", "cpu", "export.verify")
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    model = onnx.load_model_from_string(content)
    inferred = onnx.shape_inference.infer_shapes(model)
    known = (*inferred.graph.value_info, *inferred.graph.output)
    stored = {value.name for value in known if value.type.tensor_type.elem_type == half}

    def widen(tensor: Any) -> None:
        if tensor.data_type == half:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    for tensor in model.graph.initializer:
        widen(tensor)
    nodes = []
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                widen(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = single
        outputs = [name for name in node.output if name in stored and node.op_type != "DequantizeLinear"]
        nodes.append(node)
        for name in outputs:
            node.output[list(node.output).index(name)] = f"{name}/wide"
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/wide"], [f"{name}/half"], f"{name}/half", to=half))
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/half"], [name], f"{name}/back", to=single))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # they belong to the list below
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(copies)
    for output in model.graph.output:
        if output.type.tensor_type.elem_type == half:
            output.type.tensor_type.elem_type = single
    return bytes(model.SerializeToString())
