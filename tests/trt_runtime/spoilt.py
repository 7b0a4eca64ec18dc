"""Pictures and models that are spoilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx

from facespec.letterbox import Frame
from trt_runtime.media.files import Pictures


class OddPictures(Pictures):
    """FFmpeg decodes no video into what it cannot convert, so that such frames are put among them."""

    count = 0

    def __call__(self, frame: Any, *new_frame: Any) -> Frame:
        self.count += 1
        return super().__call__(av.VideoFrame(64, 64, "rgb96le") if self.count in (1, 4) else frame, *new_frame)


def with_nan(path: Path, out: Path) -> Path:
    """Write a model whose first convolution has a filter of NaN; return its path."""
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, out)
    return out
