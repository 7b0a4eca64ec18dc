"""float16 as a GPU stores it: what is rounded, and what is not."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.quantize import computes_in_fp16, emulate_fp16

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def _model(
    nodes: list[onnx.NodeProto], kinds: tuple[int, int], *tensors: onnx.TensorProto, shape: tuple[int, ...] = (4,)
) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", kinds[0], shape)]
    outputs = [helper.make_tensor_value_info("y", kinds[1], shape)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(tensors))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def _run(model: onnx.ModelProto, x: NDArray[np.generic]) -> NDArray[np.generic]:
    (found,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.asarray(found)


def test_what_computes_in_fp16() -> None:
    half = numpy_helper.from_array(np.ones(4, np.float16), "w")
    single = numpy_helper.from_array(np.ones(4, np.float32), "w")
    multiply = helper.make_node("Mul", ["x", "w"], ["y"])
    assert computes_in_fp16(_model([multiply], (HALF, HALF), half))
    assert not computes_in_fp16(_model([multiply], (FLOAT, FLOAT), single))
    cast = helper.make_node("Cast", ["x"], ["y"], to=HALF)
    assert computes_in_fp16(_model([cast], (FLOAT, HALF)))
    assert not computes_in_fp16(_model([helper.make_node("Cast", ["x"], ["y"], to=FLOAT)], (TensorProto.UINT8, FLOAT)))


def test_constants_in_nodes_count_and_float32_is_left() -> None:
    factor = np.array([1.0009765625, 3.3, 0.1, 1 / 3], np.float16)
    third = np.full(4, 1 / 3, np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "third"], ["wide"]),  # in float32: not rounded before the cast
        helper.make_node("Cast", ["wide"], ["narrow"], to=HALF),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(factor, "c")),
        helper.make_node("Mul", ["narrow", "c"], ["product"]),
        helper.make_node("Cast", ["product"], ["back"], to=FLOAT),
        helper.make_node("Mul", ["back", "third"], ["y"]),
    ]
    content = _model(nodes, (FLOAT, FLOAT), numpy_helper.from_array(third, "third"))
    x = np.array([1.2345678, 2.3456789, 3.456789, 4.56789], np.float32)
    expected = ((x * third).astype(np.float16) * factor).astype(np.float32) * third
    np.testing.assert_array_equal(_run(emulate_fp16(content), x), expected)


@pytest.mark.parametrize("scale", [0.1, 0.0333])
def test_int8_is_left_as_it_is(scale: float) -> None:
    """What comes out of DequantizeLinear is a factor and a whole number, and is not stored."""
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"]),
    ]
    step = np.float16(scale)
    tensors = [numpy_helper.from_array(np.asarray(step), "s"), numpy_helper.from_array(np.asarray(np.int8(0)), "z")]
    content = _model(nodes, (TensorProto.INT8, HALF), *tensors)
    x = np.array([127, -101, 77, 3], np.int8)
    found = _run(emulate_fp16(content), x)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, x.astype(np.float32) * np.float32(step))


def test_the_operators_keep_their_sums_in_float32() -> None:
    weights = np.full((1, 4096, 1, 1), 0.01, np.float16)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Identity", ["c"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", HALF, (1, 4096, 1, 1))]
    outputs = [helper.make_tensor_value_info("y", HALF, (1, 1, 1, 1))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    emulated = emulate_fp16(model)
    assert {tensor.data_type for tensor in emulated.graph.initializer} == {FLOAT}
    assert [node.op_type for node in emulated.graph.node] == ["Conv", "Cast", "Cast", "Identity", "Cast", "Cast"]
    assert [item.type.tensor_type.elem_type for item in emulated.graph.output] == [FLOAT]
