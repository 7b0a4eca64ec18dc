"""Precision as a transformation of the graph: what it says is what an engine runs, never a flag that hopes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from facespec.errors import ModelFileError

PRECISIONS = ("fp32", "fp16")
"""Precisions a graph can be given."""

_NAMES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
}


def to_fp16(heads_graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a heads graph (`export.portable.build_heads`) that computes in float16 throughout.

    uint8 pixels and their means are exact in float16. The scales of Resize stay float32, as ONNX demands.

    Raises:
        ModelFileError: A weight does not fit in float16.
    """
    graph = onnx.ModelProto()
    graph.CopyFrom(heads_graph)
    scales = {node.input[2] for node in graph.graph.node if node.op_type == "Resize" and len(node.input) > 2}
    for tensor in graph.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in scales:
            tensor.CopyFrom(_half(tensor))
    for node in graph.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value" and node.output[0] not in scales:
                if attribute.t.data_type == TensorProto.FLOAT:
                    attribute.t.CopyFrom(_half(attribute.t))
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    del graph.graph.value_info[:]  # of float32; inferred again where they are needed
    for output in graph.graph.output:
        output.type.tensor_type.elem_type = TensorProto.FLOAT16
    return graph


def _half(tensor: onnx.TensorProto) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ModelFileError(f"{tensor.name}: a weight of {np.abs(values).max():.3g} does not fit in fp16: use --fp32")
    return numpy_helper.from_array(half, tensor.name)


def conv_macs(graph: onnx.ModelProto, size_hw: tuple[int, int]) -> dict[str, int]:
    """Return the multiply-accumulates of all convolutions for one image, by the precision they are computed in.

    A convolution counts as int8 where its input and its weight come from DequantizeLinear of int8, otherwise by the
    type of its input.

    Args:
        graph: Any detector graph, batch first in `images`.
        size_hw: Height and width to count at, for graphs of dynamic size.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(graph)
    for dim, size in zip(fixed.graph.input[0].type.tensor_type.shape.dim, (1, *size_hw, 3), strict=True):
        dim.dim_value = size
    del fixed.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    tensors = {value.name: value.type.tensor_type for value in (*inferred.graph.value_info, *inferred.graph.output)}
    weights = {tensor.name: list(tensor.dims) for tensor in graph.graph.initializer}
    weight_types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    source = {name: node for node in inferred.graph.node for name in node.output}
    macs: Counter[str] = Counter()

    def stored_type(name: str) -> int:
        node = source.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            inner = node.input[0]
            return weight_types.get(inner) or tensors[inner].elem_type
        return weight_types.get(name) or tensors[name].elem_type

    for node in inferred.graph.node:
        if node.op_type != "Conv":
            continue
        data, weight = node.input[0], node.input[1]
        dequantize = source.get(weight)
        shape = weights[dequantize.input[0] if dequantize is not None else weight]
        rows, columns = (dim.dim_value for dim in tensors[node.output[0]].shape.dim[2:])
        kinds = {stored_type(data), stored_type(weight)}
        kind = kinds.pop() if len(kinds) == 1 else tensors[data].elem_type
        macs[_NAMES.get(kind, f"type {kind}")] += int(np.prod(shape)) * rows * columns
    return dict(macs)


def mac_shares(graph: onnx.ModelProto, size_hw: tuple[int, int]) -> dict[str, float]:
    """Return `conv_macs` as shares of their sum, the greatest first."""
    macs = conv_macs(graph, size_hw)
    total = sum(macs.values())
    return {kind: macs[kind] / total for kind in sorted(macs, key=lambda kind: -macs[kind])}
