"""Parts of the detector graphs in ONNX operators: preprocessing, decoding and NMS, what goes in and comes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facespec.boxes import make_priors
from facespec.cli import require
from facespec.spec import ModelSpec

OPSET = 19
IR_VERSION = 9

HEAD_NAMES = ("head_8", "head_16", "head_32")
"""Names of the three merged head maps, (B, 32, H/s, W/s): class, box and landmark channels in this order."""

FLOAT, INT32, INT64 = 1, 6, 7  # onnx.TensorProto.DataType
_TYPES = {"int32": INT32, "float32": FLOAT}


class GraphBuilder:
    """Collects ONNX nodes; every method returns the name of a tensor, so that formulas read like formulas."""

    def __init__(self, prefix: str = "") -> None:
        self._onnx = require("onnx", "cpu", "making a detector graph")
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._prefix = prefix
        self._counter = 0

    def _name(self, kind: str) -> str:
        self._counter += 1
        return f"{self._prefix}{kind}_{self._counter}"

    def const(self, value: Any, dtype: Any) -> str:
        """Add a constant tensor."""
        array: NDArray[Any] = np.asarray(value, dtype)
        name = self._name("const")
        self.initializers.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        """Add a constant int64 vector: a shape, axes or indices."""
        return self.const(values, np.int64)

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """Add a node with one output."""
        name = out or self._name(kind.lower())
        self.nodes.append(self._onnx.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def op2(self, kind: str, *inputs: str, **attributes: Any) -> tuple[str, str]:
        """Add a node with two outputs."""
        first, second = self._name(kind.lower()), self._name(kind.lower())
        self.nodes.append(self._onnx.helper.make_node(kind, list(inputs), [first, second], name=first, **attributes))
        return first, second

    def slice(self, x: str, axis: int, start: int, stop: int) -> str:
        """Add x[start:stop] along an axis."""
        return self.op("Slice", x, self.ints(start), self.ints(stop), self.ints(axis))


def add_preprocessing(g: GraphBuilder, images: str, spec: ModelSpec) -> str:
    """uint8 (B, H, W, 3) BGR -> float32 (B, 3, H, W) minus the mean."""
    planes = g.op("Transpose", g.op("Cast", images, to=FLOAT), perm=[0, 3, 1, 2])
    return g.op("Sub", planes, g.const(np.reshape(spec.preprocess.mean_bgr, (1, 3, 1, 1)), np.float32))


def _priors(g: GraphBuilder, heads: Sequence[str], spec: ModelSpec, size_hw: tuple[int, int] | None) -> str:
    """(N, 4) priors: those of `facespec.make_priors`, or the same worked out from the shapes of the head maps."""
    if size_hw:
        return g.const(make_priors(spec.anchors, size_hw), np.float32)
    per_cell, levels = spec.anchors.per_cell, []
    for head, stride, sizes in zip(heads, spec.anchors.strides, spec.anchors.min_sizes, strict=True):
        shape = g.op("Shape", head)
        rows, columns = (g.op("Gather", shape, g.const(axis, np.int64)) for axis in (2, 3))
        cells = g.op("Range", g.const(0, np.int64), g.op("Mul", rows, columns), g.const(1, np.int64))
        grid = [g.op("Unsqueeze", g.op(kind, cells, columns), g.ints(1)) for kind in ("Mod", "Div")]  # x, y
        corner = g.op("Cast", g.op("Concat", *grid, axis=1), to=FLOAT)
        centre = g.op("Mul", g.op("Add", corner, g.const(0.5, np.float32)), g.const(stride, np.float32))
        # (cells, 2) -> (cells, per_cell, 2) and the sizes beside it
        shape3 = g.op("Concat", g.op("Shape", cells), g.ints(per_cell, 2), axis=0)
        centre = g.op("Expand", g.op("Unsqueeze", centre, g.ints(1)), shape3)
        size = g.op("Expand", g.const([[[s, s] for s in sizes]], np.float32), shape3)
        levels.append(g.op("Reshape", g.op("Concat", centre, size, axis=2), g.ints(-1, 4)))
    return g.op("Concat", *levels, axis=0)


def _slots(g: GraphBuilder, image_of_row: str, count_per_image: str) -> str:
    """(R, 2) positions (image, rank within the image) of rows that are grouped by image."""
    first = g.op("CumSum", count_per_image, g.const(0, np.int64), exclusive=1)
    rows = g.op("Size", image_of_row)
    ranks = g.op("Range", g.const(0, np.int64), rows, g.const(1, np.int64))
    rank = g.op("Sub", ranks, g.op("Gather", first, image_of_row))
    return g.op("Concat", *(g.op("Unsqueeze", x, g.ints(1)) for x in (image_of_row, rank)), axis=1)


def add_decode_nms(g: GraphBuilder, heads: Sequence[str], spec: ModelSpec, size_hw: tuple[int, int] | None) -> None:
    """Add decoding and NMS with standard operators, from the head maps to the five outputs.

    Only candidates over the threshold are gathered and decoded, and only the survivors' landmarks, so the cost follows
    the number of faces and not the number of priors.
    """
    decode, per_cell = spec.decode, spec.anchors.per_cell
    channels = 16 * per_cell
    # one row a cell, channels last: class (2 each), boxes (4 each), landmarks (10 each)
    rows = [g.op("Reshape", g.op("Transpose", head, perm=[0, 2, 3, 1]), g.ints(0, -1, channels)) for head in heads]
    cells = g.op("Concat", *rows, axis=1)
    # 0 * x is 0 for every finite x and NaN for the others
    probe = g.op("ReduceSum", g.op("Mul", cells, g.const(0, np.float32)), g.ints(1, 2), keepdims=0)
    broken = g.op("IsNaN", probe)

    pairs = g.op("Reshape", g.slice(cells, 2, 0, 2 * per_cell), g.ints(0, -1, 2))
    background, face = (g.op("Gather", pairs, g.const(c, np.int64), axis=2) for c in (0, 1))
    difference = g.op("Sub", face, background)  # (B, N): its sigmoid is the score
    above = g.op("GreaterOrEqual", difference, g.const(decode.logit_threshold, np.float32))
    above = g.op("And", above, g.op("Unsqueeze", g.op("Not", broken), g.ints(1)))

    # candidates: one row an image, ascending prior index, padded with -inf
    count = g.op("ReduceSum", g.op("Cast", above, to=INT64), g.ints(1), keepdims=0)
    width = g.op("Max", g.op("ReduceMax", count, keepdims=0), g.const(1, np.int64))
    hits = g.op("NonZero", above)  # (2, M): image, prior
    image, prior = (g.op("Gather", hits, g.const(row, np.int64), axis=0) for row in (0, 1))
    slots = _slots(g, image, count)
    padded = g.op("Concat", g.op("Shape", count), g.op("Unsqueeze", width, g.ints(0)), axis=0)
    empty = g.op("Expand", g.const(-np.inf, np.float32), padded)
    values = g.op("GatherND", difference, g.op("Transpose", hits, perm=[1, 0]))
    scores = g.op("ScatterND", empty, slots, values)
    priors = g.op("ScatterND", g.op("Expand", g.const(0, np.int64), padded), slots, prior)

    # the best top_k, sorted; equal scores keep the lower prior index
    limit = g.op("Unsqueeze", g.op("Min", width, g.const(decode.top_k, np.int64)), g.ints(0))
    best, order = g.op2("TopK", scores, limit, axis=1)
    priors = g.op("GatherElements", priors, order, axis=1)  # (B, k)

    anchor = g.op("Gather", _priors(g, heads, spec, size_hw), priors, axis=0)  # (B, k, 4)
    cell = g.op("Unsqueeze", g.op("Div", priors, g.const(per_cell, np.int64)), g.ints(2))
    member = g.op("Unsqueeze", g.op("Mod", priors, g.const(per_cell, np.int64)), g.ints(2))
    found = g.op("GatherND", cells, cell, batch_dims=1)  # (B, k, channels)
    centre, size = g.slice(anchor, 2, 0, 2), g.slice(anchor, 2, 2, 4)
    boxes = _select(g, g.slice(found, 2, 2 * per_cell, 6 * per_cell), member, per_cell, 4)
    shift = g.op("Mul", g.slice(boxes, 2, 0, 2), g.const(decode.variances[0], np.float32))
    growth = g.op("Exp", g.op("Mul", g.slice(boxes, 2, 2, 4), g.const(decode.variances[1], np.float32)))
    wh = g.op("Mul", size, growth)
    middle = g.op("Add", centre, g.op("Mul", shift, size))
    low = g.op("Sub", middle, g.op("Div", wh, g.const(2, np.float32)))
    boxes = g.op("Concat", low, g.op("Add", low, wh), axis=2)  # (B, k, 4)

    chosen = g.op(
        "NonMaxSuppression",
        boxes,
        g.op("Unsqueeze", best, g.ints(1)),
        g.ints(decode.max_detections),
        g.const([decode.iou_threshold], np.float32),
        g.const([np.finfo(np.float32).min], np.float32),  # leaves out the -inf padding
    )  # (S, 3): image, class, candidate; by image, then by score
    source = g.op("Gather", chosen, g.ints(0, 2), axis=1)
    image = g.op("Gather", chosen, g.const(0, np.int64), axis=1)
    batch = g.op("Range", g.const(0, np.int64), g.op("Size", count), g.const(1, np.int64))
    same = g.op("Equal", g.op("Unsqueeze", image, g.ints(1)), g.op("Unsqueeze", batch, g.ints(0)))
    kept = g.op("ReduceSum", g.op("Cast", same, to=INT64), g.ints(0), keepdims=0)
    target = _slots(g, image, kept)

    face_centre = g.op("GatherND", centre, source)  # (S, 2)
    face_scale = g.op("Mul", g.op("GatherND", size, source), g.const(decode.variances[0], np.float32))
    face_rows = g.slice(g.op("GatherND", found, source), 1, 6 * per_cell, 16 * per_cell)
    points = _select(g, face_rows, g.op("GatherND", member, source), per_cell, 10)
    points = g.op("Reshape", points, g.ints(-1, 5, 2))
    face_centre, face_scale = (g.op("Unsqueeze", x, g.ints(1)) for x in (face_centre, face_scale))
    points = g.op("Add", face_centre, g.op("Mul", points, face_scale))

    def output(name: str, rows: str, *tail: int) -> None:
        shape = g.op("Concat", g.op("Shape", count), g.ints(decode.max_detections, *tail), axis=0)
        g.op("ScatterND", g.op("Expand", g.const(0, np.float32), shape), target, rows, out=name)

    output("boxes", g.op("GatherND", boxes, source), 4)
    output("scores", g.op("Sigmoid", g.op("GatherND", best, source)))
    output("landmarks", points, 5, 2)
    g.op("Cast", kept, to=INT32, out="num_detections")
    reported = g.op("Where", broken, g.const(-1, np.int64), count)
    g.op("Cast", reported, to=INT32, out="num_candidates")


def _select(g: GraphBuilder, values: str, member: str, per_cell: int, width: int) -> str:
    """(..., per_cell * width) -> (..., width): the part of prior `member` (..., 1) of its cell."""
    part = g.slice(values, -1, 0, width)
    for index in range(1, per_cell):
        other = g.slice(values, -1, index * width, (index + 1) * width)
        part = g.op("Where", g.op("Equal", member, g.const(index, np.int64)), other, part)
    return part


def detector_outputs(spec: ModelSpec) -> list[Any]:
    """Return the declarations of the five outputs."""
    helper = require("onnx", "cpu", "making a detector graph").helper
    return [
        helper.make_tensor_value_info(name, _TYPES[kind], ["batch", *shape])
        for name, (kind, shape) in spec.decode.outputs.items()
    ]


def whole_model(
    nodes: Iterable[Any], constants: Iterable[Any], outputs: Iterable[Any], size_hw: tuple[int, int] | None
) -> Any:
    """Return an ONNX model of such nodes, whose input is `images`, at a fixed network size or at any."""
    onnx = require("onnx", "cpu", "making a detector graph")
    height, width = size_hw or ("height", "width")
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", height, width, 3])
    graph = onnx.helper.make_graph(list(nodes), "RetinaFace", [images], list(outputs), list(constants))
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="retinaface-trt")
    return model
