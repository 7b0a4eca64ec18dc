"""Head maps with known content. Numpy only.

The content of an image is an array (priors, 16): background and face logit, box deltas (4), landmark deltas (5 x 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facespec.boxes import make_priors
from facespec.spec import AnchorSpec, ModelSpec

Content = NDArray[np.float32]
Rng = np.random.Generator

PER_FACE = 5
LEVELS_OF_SCORE = 1023
FACE_POINTS = np.array([[-0.2, -0.15], [0.2, -0.15], [0, 0.05], [-0.15, 0.25], [0.15, 0.25]], np.float32)


def head_maps(
    contents: Sequence[Content], size_hw: tuple[int, int], anchors: AnchorSpec, dtype: Any, channels_last: bool
) -> list[NDArray[Any]]:
    """Return the map of each level, (B, 16 * per_cell, H/s, W/s), in the layout asked for."""
    values = np.stack(contents).astype(dtype)
    batch, members = len(values), anchors.per_cell
    maps = []
    first = 0
    for rows, columns in anchors.grids_hw(size_hw):
        last = first + rows * columns * members
        cells = values[:, first:last].reshape(batch, rows, columns, members, 16)
        parts = [cells[..., a:b].reshape(batch, rows, columns, members * (b - a)) for a, b in ((0, 2), (2, 6), (6, 16))]
        level = np.concatenate(parts, axis=-1).transpose(0, 3, 1, 2)
        maps.append(level if channels_last else np.ascontiguousarray(level))
        first = last
    return maps


def no_faces(rng: Rng, priors: int) -> Content:
    """Return an image in which every logit difference is near -8."""
    content = rng.standard_normal((priors, 16), np.float32)
    content[:, :2] = np.clip(content[:, :2], -3, 3) / 2 + np.array([4, -4], np.float32)
    return content


def faces(rng: Rng, size_hw: tuple[int, int], spec: ModelSpec, candidates: int) -> Content:
    """Return an image with `candidates` priors over the threshold, about five on each of candidates / 5 faces.

    Up to 1023 candidates have scores that differ, also in fp16, so that an order without a rule for ties is the same.
    """
    priors = make_priors(spec.anchors, size_hw)
    content = no_faces(rng, len(priors))
    if not candidates:
        return content
    centre_variance, size_variance = spec.decode.variances
    count = -(-candidates // PER_FACE)
    columns = int(np.ceil(np.sqrt(count * size_hw[1] / size_hw[0])))
    rows = -(-count // columns)
    cell = np.array([size_hw[1] / columns, size_hw[0] / rows])
    free = np.ones(len(priors), bool)
    if candidates <= LEVELS_OF_SCORE:
        logits = (rng.permutation(LEVELS_OF_SCORE)[:candidates] + 1) / 128
    else:
        logits = rng.uniform(0, 8, candidates)
    for face in range(count):
        wanted = min(PER_FACE, candidates - face * PER_FACE)
        side = max(12.0, rng.uniform(0.3, 0.7) * cell.min())
        centre = (np.array([face % columns, face // columns]) + rng.uniform(0.4, 0.6, 2)) * cell
        far = np.abs(priors[:, :2] - centre).max(axis=1) / side + np.abs(np.log(priors[:, 2] / side))
        far[~free] = np.inf
        near = np.argpartition(far, wanted)[:wanted]
        free[near] = False
        chosen = priors[near]
        box = np.array([*centre, side, side]) + rng.normal(0, 0.03 * side, (wanted, 4))
        points = box[:, None, :2] + FACE_POINTS * box[:, None, 2:]
        content[near, 0] = 0
        content[near, 1] = logits[face * PER_FACE : face * PER_FACE + wanted]
        content[near, 2:4] = (box[:, :2] - chosen[:, :2]) / (centre_variance * chosen[:, 2:])
        content[near, 4:6] = np.log(box[:, 2:] / chosen[:, 2:]) / size_variance
        shift = (points - chosen[:, None, :2]) / (centre_variance * chosen[:, None, 2:])
        content[near, 6:] = shift.reshape(wanted, 10)
    return content


def scattered(rng: Rng, priors: int, candidates: int, spread: float = 1.0) -> Content:
    """Return an image with exactly `candidates` random priors over the threshold; `spread` scales the box deltas."""
    content = no_faces(rng, priors)
    content[:, 2:6] *= spread
    chosen = rng.permutation(priors)[:candidates]
    content[chosen, 0] = 0
    content[chosen, 1] = rng.uniform(0, 8, len(chosen))
    return content


def ties(rng: Rng, priors: int) -> Content:
    """Return an image in which half of the priors have one of four scores."""
    content = no_faces(rng, priors)
    chosen = rng.permutation(priors)[: priors // 2]
    content[chosen, 0] = rng.integers(0, 2, len(chosen))
    content[chosen, 1] = rng.integers(1, 4, len(chosen))
    return content


def same_place(rng: Rng, priors: NDArray[np.float32], candidates: int, spec: ModelSpec) -> Content:
    """Return an image whose candidates all decode to nearly the same box: all but one fall to NMS."""
    content = no_faces(rng, len(priors))
    chosen = rng.permutation(len(priors))[:candidates]
    content[chosen, 0] = 0
    content[chosen, 1] = rng.uniform(0, 8, len(chosen))
    boxes = np.array([100, 100, 60, 60]) + rng.normal(0, 0.3, (len(chosen), 4))
    content[chosen, 2:4] = (boxes[:, :2] - priors[chosen, :2]) / (spec.decode.variances[0] * priors[chosen, 2:])
    content[chosen, 4:6] = np.log(boxes[:, 2:] / priors[chosen, 2:]) / spec.decode.variances[1]
    return content


def mixed_batch(rng: Rng, size_hw: tuple[int, int], spec: ModelSpec) -> list[Content]:
    """Return eight images that have little in common."""
    priors = make_priors(spec.anchors, size_hw)
    count = len(priors)
    return [
        no_faces(rng, count),
        faces(rng, size_hw, spec, min(15, count // 8)),
        faces(rng, size_hw, spec, min(300, count // 8)),
        ties(rng, count),
        scattered(rng, count, count),
        same_place(rng, priors, count // 2, spec),
        scattered(rng, count, 1),
        rng.standard_normal((count, 16), np.float32),
    ]
