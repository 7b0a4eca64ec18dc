"""A heads graph in PyTorch, computed as its INT8 form computes it, so that weights and steps of int8 can be learned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from export.options import is_depthwise
from export.quantize import ConvSteps, Steps, evenable, stored_steps
from facespec.errors import ModelFileError

DATA_CODES = (-128, 127)
WEIGHT_CODES = (-127, 127)
"""Least and largest int8 of activations, which QuantizeLinear saturates to, and of weights."""


class FakeQuantise(torch.autograd.Function):
    """Round to whole steps, the nearest even one, and saturate, with gradients for what is rounded and for the step.

    Source: LSQ (Esser et al., ICLR 2020), equations 1 to 5. Its scaling of the step's gradient is left out: Adam is
    blind to it.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        """Return `values` in whole `step`s, which has one element, or one for each row of the first axis."""
        ctx.save_for_backward(values, step)
        ctx.limits = low, high
        return (values / step).round_().clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of both."""
        (gradient,) = gradients
        values, step = ctx.saved_tensors
        low, high = ctx.limits
        scaled = values / step
        inside = (scaled > low) & (scaled < high)
        of_values = gradient * inside
        slope = scaled.round().clamp_(low, high).sub_(scaled.mul_(inside))
        of_step = (slope * gradient).sum_to_size(step.shape)
        return of_values, of_step, None, None


def stored(step: Tensor) -> Tensor:
    """Return steps as they are stored; the gradient passes."""
    values = step.detach()
    return step + (torch.from_numpy(np.asarray(stored_steps(values.numpy()))) - values)


def steps_of(weight: Tensor) -> Tensor:
    """Return the steps (n, 1, 1, 1) that the filters of a convolution (n, c, h, w) fill; they have no gradient."""
    return stored(weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True) / 127)


class FakeInt8(nn.Module):
    """The network of a float32 heads graph, from uint8 images to head maps, with Q/DQ pairs of some steps.

    It computes what `export.quantize.with_steps` makes of the graph and the steps that `learned` returns. Parameters
    are weights, biases, the steps of activations, and scales of the channels that may be scaled at will: they part the
    codes of a tensor among its channels. The steps of weights follow the weights, so that nothing is cut off.

    All have units of their own, so that one learning rate suits each kind: a weight counts in 127ths of the largest of
    its filter, a bias likewise of its layer, steps and scales by their logarithms.

    Args:
        graph: Float32 heads graph, equalised or not.
        steps: To begin with, of the convolutions that compute in INT8; none makes it the float network.

    Raises:
        ModelFileError: The graph has an operator that is not known here.
    """

    def __init__(self, graph: onnx.ModelProto, steps: Steps | None = None) -> None:
        super().__init__()
        steps = steps or {}
        self.graph = graph
        constants = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
        self.weights, self.biases, self.steps, self.channels = (nn.ParameterList() for _ in range(4))
        self._units: list[tuple[Tensor, Tensor]] = []
        # places in these lists, by the names of convolutions, of tensors that are rounded, and of tensors
        self._places: dict[str, int] = {}
        self._step_places: dict[str, int] = {}
        self._channel_places: dict[str, int] = {}
        self._rounds = set(steps)
        evened = evenable(graph)
        self._scaled_by = {producer.name: name for name, (producer, _) in evened.items()}
        self._constants: dict[str, Tensor] = {}
        self._last_use: dict[str, int] = {}
        for index, node in enumerate(graph.graph.node):
            self._last_use |= dict.fromkeys(node.input, index)
            if node.op_type == "Constant":
                constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type == "Conv":
                self._add(node, constants, steps.get(node.name))
            elif node.op_type not in _OPERATORS:
                raise ModelFileError(f"{node.name}: {node.op_type} is not known to the training of INT8")
        for node in graph.graph.node:
            if node.op_type != "Conv":
                self._constants |= {n: torch.from_numpy(constants[n].copy()) for n in node.input if n in constants}

    def _add(self, node: onnx.NodeProto, constants: dict[str, Any], step: ConvSteps | None) -> None:
        weight = torch.from_numpy(constants[node.input[1]].copy())
        bias = torch.from_numpy(constants[node.input[2]].copy())
        unit = weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12) / 127
        unit_of_bias = bias.abs().max().clamp(min=1e-12) / 127
        self._places[node.name] = len(self.weights)
        self._units.append((unit, unit_of_bias))
        self.weights.append(nn.Parameter(weight / unit))
        self.biases.append(nn.Parameter(bias / unit_of_bias))
        source = node.input[0]
        if step is not None and source not in self._step_places:
            self._step_places[source] = len(self.steps)
            self.steps.append(nn.Parameter(torch.tensor(step.data).log()))
            if source in self._scaled_by.values():
                self._channel_places[source] = len(self.channels)
                self.channels.append(nn.Parameter(torch.zeros(weight.shape[0 if is_depthwise(node) else 1])))

    def _filters(self, node: onnx.NodeProto) -> tuple[Tensor, Tensor]:
        """Return weights and biases of a convolution, its channels scaled."""
        place = self._places[node.name]
        unit, unit_of_bias = self._units[place]
        weight, bias = self.weights[place] * unit, self.biases[place] * unit_of_bias
        behind = self._channel_places.get(self._scaled_by.get(node.name, ""))
        if behind is not None:
            scale = self.channels[behind].exp()
            weight, bias = weight / scale.view(-1, 1, 1, 1), bias / scale
        before = self._channel_places.get(node.input[0])
        if before is not None:
            weight = weight * self.channels[before].exp().view((-1, 1, 1, 1) if is_depthwise(node) else (1, -1, 1, 1))
        return weight, bias

    def _step(self, node: onnx.NodeProto) -> Tensor:
        return stored(self.steps[self._step_places[node.input[0]]].exp())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the head maps (B, 32, H/s, W/s) of uint8 (B, H, W, 3) images."""
        graph = self.graph.graph
        found = {graph.input[0].name: images}
        for index, node in enumerate(graph.node):
            if node.op_type != "Constant":
                found[node.output[0]] = self.compute(node, found)
            for name in node.input:  # what nobody needs any more
                if self._last_use[name] == index:
                    found.pop(name, None)
                    found.pop(_rounded(name), None)
        return [found[output.name] for output in graph.output]

    def compute(self, node: onnx.NodeProto, found: dict[str, Tensor]) -> Tensor:
        """Return the output of a node of the graph from its inputs; `found` also keeps what is rounded already."""
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type != "Conv":
            return _OPERATORS[node.op_type](given, *(found.get(x, self._constants.get(x)) for x in node.input))
        data, (weight, bias) = found[node.input[0]], self._filters(node)
        if node.name in self._rounds:
            name = _rounded(node.input[0])
            if name not in found:
                found[name] = FakeQuantise.apply(data, self._step(node), *DATA_CODES)
            data, weight = found[name], FakeQuantise.apply(weight, steps_of(weight), *WEIGHT_CODES)
        pads = given["pads"][:2]
        return F.conv2d(data, weight, bias, given["strides"], pads, given["dilations"], given["group"])

    def learned(self) -> tuple[onnx.ModelProto, Steps]:
        """Return the float graph with the weights as they are now, and the steps."""
        graph = copy.deepcopy(self.graph)
        tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
        steps: Steps = {}
        with torch.no_grad():
            for node in graph.graph.node:
                if node.op_type == "Conv":
                    values = self._filters(node)
                    for name, value in zip(node.input[1:], values, strict=True):
                        tensors[name].CopyFrom(numpy_helper.from_array(value.numpy(), name))
                    if node.name in self._rounds:
                        weight = steps_of(values[0]).flatten().numpy()
                        steps[node.name] = ConvSteps(float(self._step(node)), weight)
        return graph, steps


def _rounded(name: str) -> str:
    return f"{name}/int8"


def _resize(given: dict[str, Any], data: Tensor, _: Tensor | None, factors: Tensor) -> Tensor:
    return F.interpolate(data, scale_factor=tuple(factors[2:].tolist()), mode=given["mode"].decode())


def _max_pool(given: dict[str, Any], data: Tensor) -> Tensor:
    return F.max_pool2d(data, given["kernel_shape"], given["strides"], given["pads"][:2])


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda given, left, right: left + right,
    "Cast": lambda given, data: data.float(),
    "Concat": lambda given, *parts: torch.cat(parts, dim=given["axis"]),
    "LeakyRelu": lambda given, data: F.leaky_relu(data, given["alpha"]),
    "MaxPool": _max_pool,
    "Relu": lambda given, data: F.relu(data),
    "Resize": _resize,
    "Sub": lambda given, data, offset: data - offset,
    "Transpose": lambda given, data: data.permute(given["perm"]),
}
