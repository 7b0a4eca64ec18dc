"""The INT8 graph in PyTorch: what it computes, against ONNX Runtime, and its gradients, against the paper's formula."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from export.calibration import Calibration, load_inputs
from export.fake_int8 import DATA_CODES, FakeInt8, FakeQuantise, stored
from export.graph import build_heads, showing
from export.options import CalibrationOptions, Int8Recipe
from export.quantize import ConvSteps, Steps, calibrated_steps, equalize, with_steps
from facespec.errors import ModelFileError
from facespec.spec import ModelSpec
from trainer.model import RetinaFace

SIZE = (320, 320)
ALL = Int8Recipe(float_depthwise=False, float_layers=())


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    _, found, _ = load_inputs(CalibrationOptions("demo", images=8, seed=3), SIZE, ModelSpec())
    return np.stack(found[:2])


@pytest.fixture(scope="module")
def evened(heads: onnx.ModelProto, calibrated: Calibration) -> tuple[onnx.ModelProto, Steps]:
    """The published weights, equalised, and steps that put every convolution into INT8."""
    graph, ranges = equalize(heads, calibrated.ranges)
    return graph, calibrated_steps(graph, ranges, ALL)


def _run(graph: onnx.ModelProto, images: np.ndarray, names: list[str]) -> list[np.ndarray]:
    session = ort.InferenceSession(showing(graph, names), providers=["CPUExecutionProvider"])
    return session.run(names, {"images": images})


def test_the_float_network_is_that_of_the_graph(heads: onnx.ModelProto, pixels: np.ndarray) -> None:
    names = [output.name for output in heads.graph.output]
    with torch.no_grad():
        found = FakeInt8(heads)(torch.from_numpy(pixels))
    for name, ours, theirs in zip(names, found, _run(heads, pixels, names), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-4, err_msg=name)


def test_every_convolution_rounds_as_the_exported_graph_does(
    evened: tuple[onnx.ModelProto, Steps], pixels: np.ndarray
) -> None:
    """Each from the numbers that ONNX Runtime has in front of it.

    Over a whole network two orders of additions part: where a sum lies on the edge between two codes, one of them
    takes the other code, and so ONNX Runtime differs from itself with and without its optimisations.
    """
    network = FakeInt8(*evened)
    graph, steps = network.learned()
    quantised = with_steps(graph, steps)
    nodes = [node for node in graph.graph.node if node.op_type == "Conv"]
    names = list(dict.fromkeys(name for node in nodes for name in (node.input[0], node.output[0])))
    known = dict(zip(names, map(torch.from_numpy, _run(quantised, pixels, names)), strict=True))
    for node in nodes:
        with torch.no_grad():
            found = network.compute(node, {node.input[0]: known[node.input[0]]})
        expected = known[node.output[0]]
        assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max()), node.name


def test_the_whole_network_is_that_of_the_exported_graph(
    evened: tuple[onnx.ModelProto, Steps], heads: onnx.ModelProto, pixels: np.ndarray
) -> None:
    """On the average far closer to it than INT8 is to float."""
    network = FakeInt8(*evened)
    names = [output.name for output in heads.graph.output]
    expected, original = _run(with_steps(*network.learned()), pixels, names), _run(heads, pixels, names)
    with torch.no_grad():
        found = [level.numpy() for level in network(torch.from_numpy(pixels))]
    for ours, theirs, exact in zip(found, expected, original, strict=True):
        assert np.abs(ours - theirs).mean() < 0.2 * np.abs(theirs - exact).mean()


def test_scales_of_channels_end_in_the_weights_around_them(
    evened: tuple[onnx.ModelProto, Steps], heads: onnx.ModelProto, pixels: np.ndarray
) -> None:
    """What is exported computes what was trained, in float and rounded."""
    names = [output.name for output in heads.graph.output]
    network = FakeInt8(*evened)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        assert len(network.channels) > 25
        for values in (*network.channels, *network.steps):
            values += 0.2 * torch.randn(values.shape, generator=generator)
        found = [level.numpy() for level in network(torch.from_numpy(pixels))]
    graph, steps = network.learned()
    floats, original = _run(graph, pixels, names), _run(heads, pixels, names)
    for ours, expected, exact in zip(found, _run(with_steps(graph, steps), pixels, names), original, strict=True):
        assert np.abs(ours - expected).mean() < 0.2 * np.abs(expected - exact).mean()
    for one, other in zip(floats, original, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-4)


def test_what_was_not_learned_comes_back_as_it_was(evened: tuple[onnx.ModelProto, Steps]) -> None:
    graph, steps = evened
    back, again = FakeInt8(graph, steps).learned()
    assert steps.keys() == again.keys()
    for name, step in steps.items():
        assert step.data == pytest.approx(again[name].data, rel=1e-3)
        np.testing.assert_allclose(step.weight, again[name].weight, rtol=2e-3, atol=1e-7)
    before, after = (
        {item.name: numpy_helper.to_array(item) for item in one.graph.initializer} for one in (graph, back)
    )
    for name, values in before.items():
        np.testing.assert_allclose(values, after[name], rtol=1e-6)


def test_rounding_is_to_even_and_saturates() -> None:
    """Against ONNX Runtime, on the middles between two codes and beyond the last ones."""
    step = np.float32(0.25)
    values = np.arange(-300, 300, dtype=np.float32) * 0.5 * step
    one, zero = (numpy_helper.from_array(x, name) for x, name in ((step, "step"), (np.zeros((), np.int8), "zero")))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [len(values)]) for name in "xy")
    opset = [helper.make_opsetid("", 19)]
    graph = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [one, zero]), opset_imports=opset, ir_version=9)
    (expected,) = ort.InferenceSession(graph.SerializeToString()).run(None, {"x": values})
    found = FakeQuantise.apply(torch.from_numpy(values), torch.tensor(step), *DATA_CODES)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert found.min() == -32
    assert found.max() == 31.75


def test_gradients_are_those_of_the_paper() -> None:
    """LSQ, equations 3 and 5, number by number; PyTorch's own operator agrees."""
    generator = torch.Generator().manual_seed(1)
    values = 4 * torch.randn(3, 200, generator=generator)
    step = torch.tensor([[0.01], [0.02], [0.05]])
    # PyTorch's operator takes what lies half a step beyond the last code for inside
    values = torch.where((values / step).abs().sub(127.25).abs() < 0.3, 0, values)
    upstream = torch.randn(3, 200, generator=generator)
    low, high = -127, 127
    left, right = values.clone().requires_grad_(), step.clone().requires_grad_()
    FakeQuantise.apply(left, right, low, high).backward(upstream)
    for row in range(3):
        total = 0.0
        for column in range(200):
            value, size = values[row, column].item(), step[row, 0].item()
            scaled, above = value / size, upstream[row, column].item()
            if scaled <= low:
                slope, passes = low, 0.0
            elif scaled >= high:
                slope, passes = high, 0.0
            else:
                slope, passes = round(scaled) - scaled, 1.0
            total += slope * above
            assert left.grad[row, column].item() == pytest.approx(passes * above)
        assert right.grad[row, 0].item() == pytest.approx(total, rel=1e-4, abs=1e-3)
    theirs, size = values.clone().requires_grad_(), step[:, 0].clone().requires_grad_()
    torch._fake_quantize_learnable_per_channel_affine(theirs, size, torch.zeros(3), 0, low, high, 1.0).backward(
        upstream
    )
    torch.testing.assert_close(left.grad, theirs.grad)
    torch.testing.assert_close(right.grad[:, 0], size.grad, rtol=1e-4, atol=1e-3)


def test_the_slope_of_a_step_where_all_is_cut_off() -> None:
    """There the output is smooth in the step, and finite differences are exact."""
    values, step = torch.tensor([40.0, -90.0]), torch.tensor(0.125, requires_grad=True)
    found = FakeQuantise.apply(values, step, *DATA_CODES)
    found.sum().backward()
    with torch.no_grad():
        higher, lower = (FakeQuantise.apply(values, step + shift, *DATA_CODES).sum() for shift in (1e-3, -1e-3))
    assert step.grad.item() == pytest.approx((higher - lower).item() / 2e-3, rel=1e-3)


def test_steps_are_those_that_float16_can_hold() -> None:
    step = torch.tensor([0.1, 1e-9, 3.0], requires_grad=True)
    half = stored(step)
    np.testing.assert_array_equal(half.detach().half().float().numpy(), half.detach().numpy())
    assert (half > 0).all()
    (half * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert step.grad.tolist() == [1.0, 2.0, 3.0]


def test_everything_can_be_learned(evened: tuple[onnx.ModelProto, Steps], pixels: np.ndarray) -> None:
    network = FakeInt8(*evened)
    sum(level.square().mean() for level in network(torch.from_numpy(pixels))).backward()
    for name, values in network.named_parameters():
        assert values.grad is not None, name
        assert values.grad.isfinite().all(), name
        assert values.grad.abs().max() > 0, name
    assert len(network.weights) == len(network.biases) == 50


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_other_backbones(backbone: str) -> None:
    torch.manual_seed(0)
    model = RetinaFace(ModelSpec(backbone=backbone, fpn_channels=64)).eval()
    graph = build_heads(model, (64, 96))
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)
    names = [output.name for output in graph.graph.output]
    with torch.no_grad():
        found = FakeInt8(graph)(torch.from_numpy(images))
    for ours, theirs in zip(found, _run(graph, images, names), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


def test_steps_of_another_graph_are_refused(evened: tuple[onnx.ModelProto, Steps]) -> None:
    graph, steps = evened
    name, step = next(iter(steps.items()))
    with pytest.raises(ModelFileError, match="it has no convolution /nowhere"):
        with_steps(graph, {**steps, "/nowhere": step})
    with pytest.raises(ModelFileError, match=f"those of {name} do not fit"):
        with_steps(graph, {**steps, name: ConvSteps(step.data, step.weight[:-1])})
    shared = [
        node.name
        for node in graph.graph.node
        if node.input and node.input[0] == "/fpn/merge1/merge1.2/LeakyRelu_output_0"
    ]
    assert len(shared) == 2
    with pytest.raises(ModelFileError, match=f"those of {shared[1]} do not fit"):
        with_steps(graph, {**steps, shared[1]: ConvSteps(2 * steps[shared[1]].data, steps[shared[1]].weight)})


def test_an_unknown_operator_is_refused(heads: onnx.ModelProto) -> None:
    strange = onnx.ModelProto()
    strange.CopyFrom(heads)
    strange.graph.node.append(helper.make_node("Softmax", ["head_8"], ["p"], name="strange"))
    with pytest.raises(ModelFileError, match="strange: Softmax is not known"):
        FakeInt8(strange)
