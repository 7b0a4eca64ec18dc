"""Weights out of ONNX files, in which batch normalisation is folded into the convolutions."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from facespec.errors import SpecError, WeightsError
from facespec.log import get_logger
from facespec.spec import SPEC_KEY, ModelSpec


def read_onnx(content: bytes, name: str) -> tuple[dict[str, Tensor], ModelSpec | None]:
    """Return the weights of an ONNX file by the names of their modules, and the spec that ours have.

    Batch normalisation is folded into the convolutions there: w, b become w and a batch normalisation with variance
    1 - eps, mean 0, scale 1 and shift b. The name of a node is the path of its module.

    Raises:
        WeightsError: The file is damaged, its names say nothing, or its weights are not those of a float model.
    """
    try:
        model = onnx.load_model_from_string(content)
        arrays = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Identity" and node.input[0] in arrays:
                arrays[node.output[0]] = arrays[node.input[0]]
            elif node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                arrays[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
        metadata = {item.key: item.value for item in model.metadata_props}
        spec = ModelSpec.from_json(metadata[SPEC_KEY]) if SPEC_KEY in metadata else None
    except SpecError as error:
        raise WeightsError(f"{name}: the file has no readable model spec ({error})") from None
    except Exception as error:  # protobuf and onnx raise many kinds for damaged files, and for weights that lie outside
        raise WeightsError(f"{name}: not an ONNX file with its weights inside ({type(error).__name__})") from None
    if any(array.dtype == np.float16 and array.ndim == 4 for array in arrays.values()):
        get_logger("trainer").info("%s: its weights are rounded to float16", name)
    try:
        return _weights(model, arrays, name), spec
    except (ValueError, IndexError, RuntimeError):  # other shapes and numbers of inputs than such a file has
        raise WeightsError(f"{name}: its convolutions are not those of a RetinaFace") from None


def _weights(model: onnx.ModelProto, arrays: dict[str, Any], name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for node in model.graph.node:
        inputs = [arrays.get(tensor) for tensor in node.input]
        if node.op_type == "BatchNormalization":  # not folded: its tensors have their own names
            leaves = ("weight", "bias", "running_mean", "running_var")
            base = node.input[1].rpartition(".")[0]
            state |= {
                f"{base}.{leaf}": _tensor(x) for leaf, x in zip(leaves, inputs[1:5], strict=True) if x is not None
            }
        elif node.op_type == "Conv" and not node.name.endswith("_1/Conv"):  # a second use of the same convolution
            weight, bias = inputs[1], inputs[2] if len(inputs) > 2 else None
            if weight is None:
                raise WeightsError(f"{name}: an INT8 file, its weights are rounded: take what it was made from")
            _add(state, node.name, node.input[1], _tensor(weight), None if bias is None else _tensor(bias))
    return state


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def _add(state: dict[str, Tensor], node: str, tensor: str, weight: Tensor, bias: Tensor | None) -> None:
    """Add a convolution, and the batch normalisation that was folded into it."""
    if head := re.fullmatch(r"(?:.*[/.])?heads\.(\d)\.weight", tensor):  # ours: the three of a level in one
        per_cell = len(weight) // 16
        sizes = [2 * per_cell, 4 * per_cell, 10 * per_cell]
        biases = bias.split(sizes) if bias is not None else ()
        for kind, part, shift in zip(
            ("ClassHead", "BboxHead", "LandmarkHead"), weight.split(sizes), biases, strict=True
        ):
            state |= {f"{kind}.{head[1]}.conv1x1.weight": part, f"{kind}.{head[1]}.conv1x1.bias": shift}
    elif tensor.endswith(".weight"):  # a plain convolution: its weight keeps the name
        state[tensor] = weight
        if bias is not None:
            state[tensor.removesuffix("weight") + "bias"] = bias
    elif bias is not None:
        module = _module(node)
        parent, _, last = module.rpartition(".")
        norm = str(int(last) + 1) if last.isdecimal() else last.replace("conv", "bn")
        state |= {
            f"{module}.weight": weight,
            f"{parent}.{norm}.weight": torch.ones_like(bias),
            f"{parent}.{norm}.bias": bias,
            f"{parent}.{norm}.running_mean": torch.zeros_like(bias),
            f"{parent}.{norm}.running_var": torch.full_like(bias, 1 - torch.nn.BatchNorm2d(1).eps),
        }


def _module(node: str) -> str:
    """Return the path of the module of a node: /fx/stage1/stage1.1/stage1.1.0/Conv is fx.stage1.1.0's."""
    path: list[str] = []
    for part in node.strip("/").split("/")[:-1]:
        if path and part.startswith(f"{path[-1]}."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)
