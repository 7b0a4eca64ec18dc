"""Precision as a transformation of the graph: fp16, INT8, and float16 as a GPU computes it, emulated on a CPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.options import Int8Recipe, is_depthwise
from facespec.errors import ModelFileError
from trt_runtime.gpu.sidecar import Convolutions, precision_shares

QUIET_CHANNEL = 1e-3
"""Least range of a channel that equalisation goes by, as a share of the greatest."""

_NAMES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
}


def to_fp16(heads_graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a heads graph (`export.graph.build_heads`) that computes in float16 throughout.

    uint8 pixels and their means are exact in float16. The scales of Resize stay float32, as ONNX demands.

    Raises:
        ModelFileError: A weight does not fit in float16.
    """
    graph = copy.deepcopy(heads_graph)
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


def convolutions(graph: onnx.ModelProto, size_hw: tuple[int, int]) -> Convolutions:
    """Return the multiply-accumulates for one image of a size, and the precision, of each convolution by its name.

    A convolution counts as int8 where its input and its weight come from DequantizeLinear of int8, otherwise by the
    type of its input.
    """
    fixed = copy.deepcopy(graph)
    for dim, size in zip(fixed.graph.input[0].type.tensor_type.shape.dim, (1, *size_hw, 3), strict=True):
        dim.dim_value = size
    del fixed.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(fixed)
    tensors = {value.name: value.type.tensor_type for value in (*inferred.graph.value_info, *inferred.graph.output)}
    weights = {tensor.name: list(tensor.dims) for tensor in graph.graph.initializer}
    weight_types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    source = {name: node for node in inferred.graph.node for name in node.output}
    found: Convolutions = {}

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
        name = node.name if node.name and node.name not in found else node.output[0]
        found[name] = int(np.prod(shape)) * rows * columns, _NAMES.get(kind, f"type {kind}")
    return found


def mac_shares(graph: onnx.ModelProto, size_hw: tuple[int, int]) -> dict[str, float]:
    """Return the share of the multiply-accumulates in each precision, the greatest first; see `convolutions`."""
    return precision_shares(convolutions(graph, size_hw))


Ranges = dict[str, NDArray[np.float32]]
"""Largest magnitude of each channel of the tensors that go into convolutions, by their names."""


def conv_inputs(graph: onnx.ModelProto) -> list[str]:
    """Return the names of the tensors that go into convolutions, each once."""
    return list(dict.fromkeys(node.input[0] for node in graph.graph.node if node.op_type == "Conv"))


def evenable(graph: onnx.ModelProto) -> dict[str, tuple[onnx.NodeProto, list[onnx.NodeProto]]]:
    """Return the tensors whose channels may be scaled at will, each with the convolution before it and those behind.

    A convolution, or the (leaky) ReLU behind it, feeds convolutions alone: what its output channels are divided by,
    their input channels are multiplied by.
    """
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    source = {name: node for node in graph.graph.node for name in node.output}
    outputs = {output.name for output in graph.graph.output}
    found = {}
    for name in conv_inputs(graph):
        producer = source.get(name)
        between = [name]
        if producer is not None and producer.op_type in ("LeakyRelu", "Relu"):
            between.append(producer.input[0])
            producer = source.get(producer.input[0])
        if producer is None or producer.op_type != "Conv" or outputs & set(between):
            continue
        if len(between) > 1 and len(users[between[1]]) > 1:
            continue
        if all(node.op_type == "Conv" and node.input[0] == name for node in users[name]):
            found[name] = producer, users[name]
    return found


def equalize(graph: onnx.ModelProto, ranges: Ranges) -> tuple[onnx.ModelProto, Ranges]:
    """Return a graph that computes the same with channels of more even ranges, and its ranges.

    The channels of `evenable` tensors are divided by s, which is r for depthwise consumers, so that every channel fills
    the range, and sqrt(r / w) for others, w being the largest weight a channel meets.

    Source: cross-layer equalisation (Nagel et al., ICCV 2019), with activation ranges instead of weight ranges.
    """
    result = copy.deepcopy(graph)
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    weights = {name: numpy_helper.to_array(tensor).astype(np.float64) for name, tensor in tensors.items()}
    evened = dict(ranges)
    for name, (producer, consumers) in evenable(result).items():
        largest = ranges[name]
        # a channel that hardly ever speaks is not blown up to the others
        scale = np.maximum(largest.astype(np.float64), max(float(largest.max()), 1e-8) * QUIET_CHANNEL)
        dense = [node for node in consumers if not is_depthwise(node)]
        if dense:
            met = np.max([np.abs(weights[node.input[1]]).max(axis=(0, 2, 3)) for node in dense], axis=0)
            scale = np.sqrt(scale / np.maximum(met, 1e-8))
        scale /= np.exp(np.log(scale).mean())  # only the ratios matter: the sizes stay as they are
        for index, shape in ((1, (-1, 1, 1, 1)), (2, (-1,))):
            if index < len(producer.input):
                weights[producer.input[index]] = weights[producer.input[index]] / scale.reshape(shape)
        for node in consumers:
            shape = (-1, 1, 1, 1) if is_depthwise(node) else (1, -1, 1, 1)
            weights[node.input[1]] = weights[node.input[1]] * scale.reshape(shape)
        evened[name] = (largest / scale).astype(np.float32)
    for name, tensor in tensors.items():
        kind = numpy_helper.to_array(tensor).dtype
        tensor.CopyFrom(numpy_helper.from_array(weights[name].astype(kind), name))
    return result, evened


@dataclass(frozen=True)
class ConvSteps:
    """Sizes of a step of int8 of a convolution: of its input, and (channels,) of its weights; exact in float16."""

    data: float
    weight: NDArray[np.float32]


Steps = dict[str, ConvSteps]
"""By the names of the convolutions that compute in INT8: the others stay in float."""


def _check_ranges(graph: onnx.ModelProto, ranges: Ranges) -> None:
    if set(ranges) != set(conv_inputs(graph)):
        raise ModelFileError("the calibration is not of this graph: calibrate again")


def calibrated_steps(heads_graph: onnx.ModelProto, ranges: Ranges, recipe: Int8Recipe) -> Steps:
    """Return the least steps that cut nothing off, of the convolutions that a recipe does not spare.

    The graph is equalised already, where the recipe asks for it.

    Raises:
        ModelFileError: The ranges are not those of this graph.
    """
    _check_ranges(heads_graph, ranges)
    tensors = {tensor.name: tensor for tensor in heads_graph.graph.initializer}
    steps = {}
    for node in heads_graph.graph.node:
        if node.op_type == "Conv" and not recipe.keeps_float(node):
            values = numpy_helper.to_array(tensors[node.input[1]])
            data = float(stored_steps(ranges[node.input[0]].max() / 127))
            steps[node.name] = ConvSteps(data, stored_steps(np.abs(values).max(axis=(1, 2, 3)) / 127))
    return steps


def to_int8(heads_graph: onnx.ModelProto, ranges: Ranges, recipe: Int8Recipe | None = None) -> onnx.ModelProto:
    """Return a copy of a float32 heads graph whose convolutions, but for those the recipe spares, compute in INT8.

    Raises:
        ModelFileError: The ranges are not those of this graph, or the result has a form that TensorRT takes wrongly.
    """
    recipe = recipe or Int8Recipe()
    _check_ranges(heads_graph, ranges)
    if recipe.equalize:
        heads_graph, ranges = equalize(heads_graph, ranges)
    return with_steps(heads_graph, calibrated_steps(heads_graph, ranges, recipe))


def with_steps(heads_graph: onnx.ModelProto, steps: Steps) -> onnx.ModelProto:
    """Return a copy of a float32 heads graph with Q/DQ pairs of these steps: x / step to the nearest even, saturated.

    Raises:
        ModelFileError: The steps are not those of this graph, or the result has a form that TensorRT takes wrongly.
    """
    graph = copy.deepcopy(heads_graph)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    added: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    quantised: dict[str, tuple[str, float]] = {}
    left = set(steps)

    def constant(name: str, value: object, kind: type) -> str:
        added.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    for node in graph.graph.node:
        if node.op_type == "Conv" and node.name in steps:
            data, weight, step = node.input[0], node.input[1], steps[node.name]
            left.discard(node.name)
            if data not in quantised:
                scale = constant(f"{data}_scale", step.data, np.float32)
                zero = constant(f"{data}_zero", 0, np.int8)
                nodes.append(helper.make_node("QuantizeLinear", [data, scale, zero], [f"{data}_q"], name=f"{data}_q"))
                quantised[data] = f"{data}_dq", step.data
                pair = [f"{data}_q", scale, zero]
                nodes.append(helper.make_node("DequantizeLinear", pair, [f"{data}_dq"], name=f"{data}_dq"))
            values = numpy_helper.to_array(tensors[weight])
            if step.weight.shape != values.shape[:1] or step.data != quantised[data][1]:
                raise ModelFileError(f"the steps of int8 are not of this graph: those of {node.name} do not fit")
            whole = np.clip(np.rint(values / step.weight.reshape(-1, 1, 1, 1)), -127, 127)
            stored = [
                constant(f"{weight}_q", whole, np.int8),
                constant(f"{weight}_scale", step.weight, np.float32),
                constant(f"{weight}_zero", np.zeros(len(values)), np.int8),
            ]
            nodes.append(helper.make_node("DequantizeLinear", stored, [weight], name=f"{weight}_dq", axis=0))
            graph.graph.initializer.remove(tensors.pop(weight))
            node.input[0] = quantised[data][0]
        nodes.append(node)
    if left:
        raise ModelFileError(f"the steps of int8 are not of this graph: it has no convolution {min(left)}")
    nodes = copy.deepcopy(nodes)  # they belong to the list emptied next
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(added)
    if problems := lint_qdq(graph):
        raise ModelFileError(problems[0])
    return graph


def stored_steps(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scales as the float16 they may be stored in, rounded up so that nothing is cut off."""
    half = np.maximum(scales, 16 * np.finfo(np.float16).smallest_subnormal).astype(np.float16)
    return np.where(half < scales, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)


def lint_qdq(graph: onnx.ModelProto) -> list[str]:
    """Return what TensorRT refuses, or builds silently and wrongly, in the Q/DQ nodes of a graph; empty if nothing.

    Zero points must be there, int8 and 0; scales positive and finite; weights per channel on axis 0; biases in float;
    both inputs of a convolution quantised or none; float16 scales need opset 19.
    """
    problems = []
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    source = {name: node for node in graph.graph.node for name in node.output}
    opset = next((item.version for item in graph.opset_import if item.domain in ("", "ai.onnx")), 0)

    def comes_from(name: str) -> bool:
        return name in source and source[name].op_type == "DequantizeLinear"

    for node in graph.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constants.get(node.input[2]) if len(node.input) > 2 else None
            scale = constants.get(node.input[1])
            if zero is None:
                problems.append(f"{node.name}: the zero point is missing, TensorRT would take it for uint8")
            elif zero.data_type != TensorProto.INT8:
                problems.append(f"{node.name}: the zero point is not int8")
            elif numpy_helper.to_array(zero).any():
                problems.append(f"{node.name}: the zero point is not 0")
            if scale is None:
                problems.append(f"{node.name}: the scale is not a constant")
                continue
            values = numpy_helper.to_array(scale).astype(np.float64)
            if not (np.isfinite(values) & (values > 0)).all():
                problems.append(f"{node.name}: a scale is not positive")
            if scale.data_type == TensorProto.FLOAT16 and opset < 19:
                problems.append(f"{node.name}: float16 scales need opset 19, this is {opset}")
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            if values.ndim and (axis != 0 or node.input[0] not in constants):
                problems.append(f"{node.name}: scales per channel are for weights, on axis 0")
        elif node.op_type == "Conv":
            if comes_from(node.input[0]) != comes_from(node.input[1]):
                problems.append(f"{node.name}: only one of data and weights is quantised")
            if len(node.input) > 2 and comes_from(node.input[2]):
                problems.append(f"{node.name}: the bias is quantised")
    return problems


def computes_in_fp16(graph: onnx.ModelProto) -> bool:
    """Whether a graph holds float16 values."""
    casts = (a.i for node in graph.graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to")
    return TensorProto.FLOAT16 in {*casts, *(tensor.data_type for tensor in graph.graph.initializer)}


def emulate_fp16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 graph that rounds to float16 whatever a float16 graph stores between its operators.

    ONNX Runtime computes float16 graphs in float32 on a CPU and leaves that rounding out: they would look too good.
    Sums inside an operator stay in float32, as they do on a GPU. INT8 is left as it is.
    """
    model = copy.deepcopy(graph)
    inferred = onnx.shape_inference.infer_shapes(graph)
    known = (*inferred.graph.value_info, *inferred.graph.output)
    stored = {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT16}

    def widen(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    for tensor in model.graph.initializer:
        widen(tensor)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                widen(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in stored and node.op_type not in ("DequantizeLinear", "Transpose"):
                wide, half = f"{name}/wide", f"{name}/half"
                node.output[index] = wide
                nodes.append(helper.make_node("Cast", [wide], [half], half, to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [half], [name], f"{name}/back", to=TensorProto.FLOAT))
    nodes = copy.deepcopy(nodes)  # they belong to the list emptied next
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    for output in model.graph.output:
        if output.type.tensor_type.elem_type == TensorProto.FLOAT16:
            output.type.tensor_type.elem_type = TensorProto.FLOAT
    return model
