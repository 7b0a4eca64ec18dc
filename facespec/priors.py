"""Prior boxes (anchors) in pixels of the network input."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from facespec.spec import AnchorSpec


def make_priors(anchors: AnchorSpec, size_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Return the priors of an image as (N, 4) float32 rows (centre x, centre y, width, height) in pixels.

    Levels come in the order of `anchors.strides`, cells in row-major order, the priors of a cell next to each other.
    Cell (i, j) has its centre at ((j + 0.5) * stride, (i + 0.5) * stride). Every value is exact in float32.

    Source: the prior boxes of RetinaFace (Deng et al., CVPR 2020, section 3.3), in pixels instead of fractions.

    Args:
        anchors: Strides and sizes.
        size_hw: Height and width of the network input in pixels; need not be multiples of the strides.
    """
    levels = []
    for (rows, columns), stride, sizes in zip(
        anchors.grids_hw(size_hw), anchors.strides, anchors.min_sizes, strict=True
    ):
        level = np.empty((rows, columns, len(sizes), 4), np.float32)
        level[..., 0] = ((np.arange(columns) + 0.5) * stride)[None, :, None]
        level[..., 1] = ((np.arange(rows) + 0.5) * stride)[:, None, None]
        level[..., 2] = level[..., 3] = np.asarray(sizes, np.float32)
        levels.append(level.reshape(-1, 4))
    return np.concatenate(levels)
