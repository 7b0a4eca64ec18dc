"""A heads graph in the precision that was asked for."""

from __future__ import annotations

import dataclasses

import onnx

from export.calibration import Calibration, calibrate
from export.options import MIN_INT8_SHARE, PRECISIONS, CalibrationOptions, Int8Recipe, check_calibration, load_recipe
from export.quantize import lint_qdq, mac_shares, to_fp16, to_int8
from facespec.errors import ModelFileError, SpecError
from facespec.spec import ModelSpec


def with_precision(
    heads_graph: onnx.ModelProto,
    precision: str,
    calibration: CalibrationOptions | None,
    size_hw: tuple[int, int],
    spec: ModelSpec,
    progress: bool = False,
) -> tuple[onnx.ModelProto, Calibration | None]:
    """Return a heads graph in a precision, and what INT8 was calibrated on.

    Args:
        heads_graph: From `export.portable.build_heads`, float32.
        precision: One of `PRECISIONS`. What INT8 leaves in float computes in float16.
        calibration: For INT8: images and recipe.
        size_hw: Network size to calibrate and to count at.
        spec: Of the model.
        progress: Whether to draw a progress bar.

    Raises:
        SpecError: INT8 without calibration images, no such precision, or a recipe that cannot be read.
        DataError: The images are no calibration set.
        ModelFileError: A weight does not fit, or the precision asked for is not what the graph would compute in.
    """
    if precision not in PRECISIONS:
        raise SpecError(f"no such precision: {precision}")
    used = None
    graph = heads_graph
    if precision == "fp16":
        graph = to_fp16(heads_graph)
    elif precision == "int8":
        check_calibration(precision, calibration)
        assert calibration is not None
        recipe = Int8Recipe()
        if calibration.recipe:
            recipe = load_recipe(calibration.recipe)
            names = [node.name for node in heads_graph.graph.node if node.op_type == "Conv"]
            lost = [part for part in recipe.float_layers if not any(part in name for name in names)]
            if lost:
                raise SpecError(f"{calibration.recipe}: no convolution of this network is named like {lost[0]!r}")
        used = dataclasses.replace(calibrate(heads_graph, calibration, size_hw, spec, progress), recipe=recipe)
        graph = to_fp16(to_int8(heads_graph, used.ranges, recipe))
        if problems := lint_qdq(graph):
            raise ModelFileError(problems[0])
    shares = mac_shares(graph, size_hw)
    if shares.get(precision, 0) < (MIN_INT8_SHARE if precision == "int8" else 1):
        raise ModelFileError(f"{precision} was asked for, the convolutions would compute in {shares}")
    return graph, used
