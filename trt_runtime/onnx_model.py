"""An ONNX detector without TensorRT: opened once, cut at its head maps for the host kernels, run in ONNX Runtime."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facespec.cli import require
from facespec.errors import ModelFileError, SpecError, reason
from facespec.spec import SPEC_KEY, ModelSpec
from trt_runtime.kernels import PLUGIN, decode_attributes
from trt_runtime.onnx_file import read_onnx


class OnnxModel:
    """An ONNX detector, `content`, that has been read and checked; whatever runs it need not read the file again.

    Args:
        path: File written by `python -m export.to_onnx`, or a plugin form written by `python -m export.to_trt`.

    Attributes:
        spec: The `ModelSpec` it carries.
        is_plugin_form: Whether it ends in the plugin, which only TensorRT and the host kernels run.
        weights: Other files that hold its weights, links resolved; most models have none.

    Raises:
        ModelFileError: Missing, damaged, unsafe, or not a detector of this toolkit.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.content, header = read_onnx(path)
        if SPEC_KEY not in header.metadata:
            raise ModelFileError(
                f"{path}: an ONNX file, but not a detector written by this toolkit: python -m export.to_onnx writes one"
            )
        try:
            self.spec = ModelSpec.from_json(header.metadata[SPEC_KEY])
        except SpecError as error:
            raise ModelFileError(f"{path}: {error}") from None
        self.is_plugin_form = PLUGIN.domain in header.domains
        self.weights = [self.path.resolve().parent / name for name in header.external_files]

    @functools.cached_property
    def heads_graph(self) -> HeadsGraph:
        """The network without its decoding and NMS, made at the first use; see `cut_heads` for the errors."""
        try:
            return cut_heads(self.content, self.spec)
        except ModelFileError as error:
            raise ModelFileError(f"{self.path}: {error}") from None


def open_session(
    model: str | bytes, name: str | Path, threads: int | None = None, *, why: str = "OrtRetinaFace"
) -> Any:
    """Return an ONNX Runtime session on the CPU, of an encoded model or the path of one.

    `threads` are those of a call, None is every core; `name` and `why`, which says what needs it, are for messages.

    Raises:
        ModelFileError: ONNX Runtime cannot load the model.
        MissingPackageError: onnxruntime is not installed.
    """
    ort = require("onnxruntime", "cpu", why)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors come as exceptions
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # ONNX Runtime has a class for every kind of failure
        raise ModelFileError(f"{name}: ONNX Runtime cannot load it ({reason(error)})") from None


def load_graph(content: bytes, why: str) -> Any:
    """Return a decoded ONNX model; `why` says what needs the package onnx, for the message.

    Raises:
        ModelFileError: It cannot be decoded.
        MissingPackageError: The package onnx is not installed.
    """
    onnx = require("onnx", "cpu", why)
    try:
        return onnx.load_model_from_string(content)
    except Exception as error:  # of protobuf, which is not ours to import
        raise ModelFileError(f"not an ONNX file, or damaged ({reason(error, 100)})") from None


def find_plugin(model: Any) -> Any:
    """Return the plugin node of a decoded plugin form.

    Raises:
        ModelFileError: There is none, or something else beside it in its domain.
    """
    nodes = [node for node in model.graph.node if node.domain == PLUGIN.domain]
    if len(nodes) != 1 or nodes[0].op_type != PLUGIN.name:
        named = sum(node.op_type == PLUGIN.name for node in nodes)
        raise ModelFileError(f"expected one {PLUGIN.name} node in the graph, found {named} among {len(nodes)} plugins")
    return nodes[0]


def text(value: str | bytes) -> str:
    """Return a name of an ONNX model: protobuf hands back bytes where it is not UTF-8."""
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


def plugin_attributes(node: Any) -> dict[str, Any]:
    """Return the attributes of a plugin node that are numbers, lists of numbers or text; None for others."""
    kinds = {1: "f", 2: "i", 3: "s", 6: "floats", 7: "ints"}  # onnx.AttributeProto.AttributeType
    values = {item.name: getattr(item, kinds[item.type]) if item.type in kinds else None for item in node.attribute}
    return {text(name): plain(value) for name, value in values.items()}


def plain(value: Any) -> Any:
    """Return numbers as people write them: 0.4, and not what float32 makes of it; bytes as text."""
    if isinstance(value, bytes):
        return text(value)
    if isinstance(value, float):
        return float(str(np.float32(value))) if np.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    return [plain(item) for item in value]


def plugin_problem(attributes: dict[str, Any], spec: ModelSpec) -> str | None:
    """Return where the attributes of a plugin node are not those of this version, or not what a spec says; or None."""
    identity = {"plugin_version": PLUGIN.version, "plugin_namespace": PLUGIN.namespace}
    for name, value in {**identity, **decode_attributes(spec)}.items():
        value = plain(value)
        if attributes.get(name) != value:
            wanted = f"the spec says {value}"
            if name in identity:
                wanted = f"this version has {value}: export it again with python -m export.to_trt --onnx-only"
            return f"the plugin's {name} is {attributes.get(name)}, {wanted}"
    if attributes.get("channels_last") not in (0, 1):
        return f"the plugin's channels_last is {attributes.get('channels_last')}, it must be 0 or 1"
    return None


@dataclass(frozen=True)
class HeadsGraph:
    """A detector graph that ends at its head maps, as an encoded ONNX model."""

    content: bytes
    heads: list[str]  # names of its outputs, one for each pyramid level
    fixed_hw: tuple[int, int] | None  # the one size its input has
    half: bool  # it computes in fp16 where it does not in INT8


def cut_heads(content: bytes, spec: ModelSpec) -> HeadsGraph:
    """Return a detector graph without its decoding and NMS, which `trt_runtime.kernels.decode_nms` does.

    It is a plugin form, whose plugin must do what `spec` says, or a portable graph with head maps named `head_STRIDE`.

    Raises:
        ModelFileError: It has no head maps, or its plugin does something else.
        MissingPackageError: The package onnx is not installed.
    """
    why = "running the network without its decoding"
    model = load_graph(content, why)
    onnx = require("onnx", "cpu", why)
    graph = model.graph
    if any(node.domain == PLUGIN.domain for node in graph.node):
        plugin = find_plugin(model)
        attributes = plugin_attributes(plugin)
        if problem := plugin_problem(attributes, spec):
            raise ModelFileError(problem)
        heads = list(plugin.input)
        if attributes["channels_last"]:
            heads = _before_transposes(graph, heads)
    else:
        heads = [f"head_{stride}" for stride in spec.anchors.strides]
    _keep(graph, heads)
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    del graph.output[:]
    graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in heads)
    sides = [side.dim_value for item in graph.input for side in item.type.tensor_type.shape.dim[1:3]]
    fixed = (sides[0], sides[1]) if len(sides) == 2 and all(side > 0 for side in sides) else None
    return HeadsGraph(model.SerializeToString(), heads, fixed, half)


def _before_transposes(graph: Any, heads: list[str]) -> list[str]:
    """Return the names of the (B, C, H, W) maps of which a plugin is given (B, H, W, C) ones, as the export writes it.

    Raises:
        ModelFileError: It is given something else.
    """
    transposes = [node for node in graph.node if plugin_attributes(node) == {"perm": [0, 2, 3, 1]}]
    planar = {node.output[0]: node.input[0] for node in transposes if len(node.output) == len(node.input) == 1}
    if not set(heads) <= planar.keys():
        raise ModelFileError("its plugin says channels_last, and its inputs are no transposed head maps")
    return [planar[name] for name in heads]


def _keep(graph: Any, outputs: list[str]) -> None:
    """Remove from a graph everything the outputs do not need.

    Raises:
        ModelFileError: It does not compute them.
    """
    needed = set(outputs)
    kept = []
    for node in reversed(graph.node):  # ONNX keeps nodes in an order in which they can run
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    if not set(outputs) <= {name for node in kept for name in node.output}:
        raise ModelFileError("its head maps cannot be told apart: export it again with python -m export.to_onnx")
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [item for item in graph.initializer if item.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    del graph.value_info[:]
